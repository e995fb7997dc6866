"""How long a user waits: for the first token and the first step of `rlora train`, and for the first line of commands.

    .venv/bin/python benchmarks/start.py              about five minutes on two cores
    .venv/bin/python benchmarks/start.py --runs 1     one run of `rlora train` in place of three, without other commands

`rlora train` runs the main job for one step without evaluation, with warm file and numba caches: a first run, which is
not counted, fills them. Times are in seconds since the command. Marks are set in the driver and in the processes of
engine and learner; the phases of a step come from its line of metrics. `rlora eval` evaluates the trained adapter on 8
prompts. PYTHONPATH selects the package that is measured, for a comparison with another checkout.

The last line printed is one JSON object.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
FILE = "RLORA_START_MARKS"  # environment variable: where marks are written, also by Ray's workers
RLORA = [sys.executable, "-m", "rlora"]


def mark(name: str) -> None:
    with open(os.environ[FILE], "a") as file:
        file.write(json.dumps([name, time.time()]) + "\n")


# --- in the processes of the job ---


def __getattr__(name: str) -> Any:
    """MarkedEngine and MarkedLearner. Their modules are imported in their processes only, which takes seconds."""
    if name not in ("MarkedEngine", "MarkedLearner"):
        raise AttributeError(name)
    role = name[6:].lower()
    mark(f"{role}: process started")
    if role == "engine":
        from rlora.engine import vllm_engine as module
    else:
        from rlora.core import learner as module  # type: ignore[no-redef]
    mark(f"{role}: imports done")
    globals()[name] = _marked(getattr(module, name[6:]), role)
    return globals()[name]


def _marked(kind: Any, role: str) -> Any:
    class Marked(kind):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            mark(f"{role}: build begins")
            super().__init__(*arguments)
            mark(f"{role}: built")
            if role == "engine":
                self._mark_first_token()

        def _mark_first_token(self) -> None:
            step = self.llm.step

            def first_step() -> Any:
                self.llm.step = step
                outputs = step()
                mark("first token")
                return outputs

            self.llm.step = first_step

    return Marked


class _Marks(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        for start, name in {"run: ": "data loaded", "learner on": "all processes ready"}.items():
            if message.startswith(start):
                mark(name)


def driver(arguments: Sequence[str]) -> None:
    """`rlora train` with marks."""
    mark("interpreter started")
    from rlora import cluster
    from rlora.cli import main

    mark("command line imported")
    try:
        from rlora.cluster import processes

        processes.LEARNER = f"{HERE}:MarkedLearner"
    except ImportError:  # a package from before processes were started ahead
        processes = cluster  # type: ignore[assignment]
    processes.ENGINE = f"{HERE}:MarkedEngine"
    join = cluster.join_ray

    def join_ray() -> bool:
        mark("Ray: start begins")
        is_local = join()
        mark("Ray: started")
        return is_local

    cluster.join_ray = join_ray
    logging.getLogger("rlora").addHandler(_Marks())
    sys.argv = ["rlora", "train", *arguments]
    main.main()


# --- in the benchmark ---


def train(run: Path) -> dict[str, float]:
    """Train one step. Returns seconds since the command by mark, and those of the step's phases."""
    marks = run.with_suffix(".marks")
    arguments = [str(ROOT / "launch" / "arithmetic.toml"), "--steps=1", "--evaluate.prompts=0", f"--run-dir={run}"]
    begin = time.time()
    command = [sys.executable, str(HERE), "--driver", *arguments]
    process = subprocess.Popen(command, env=os.environ | {FILE: str(marks)}, stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and (lines := metrics.read_text().splitlines())):
        time.sleep(0.02)
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode} before its first step")
    end = time.time()
    process.wait()
    times: dict[str, float] = {}
    for name, at in map(json.loads, marks.read_text().splitlines()):
        times.setdefault(name, at - begin)
    step = {f"step: {key}": value for key, value in json.loads(lines[0]).items() if key.startswith("time/")}
    return {**times, "first step": end - begin, **step}


def first_line(*arguments: str) -> tuple[float, float]:
    """Seconds to a command's first line, and to its end."""
    begin = time.time()
    process = subprocess.Popen([*RLORA, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    line = process.stdout.readline()
    first = time.time() - begin
    rest = process.stdout.read()
    if process.wait():
        raise SystemExit(f"rlora {' '.join(arguments)} failed:\n{line}{rest}")
    return first, time.time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    config = str(ROOT / "launch" / "arithmetic.toml")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        train(place / "warm")
        runs = [train(place / f"run-{number}") for number in range(options.runs)]
        commands: dict[str, tuple[float, float]] = {}
        if options.runs > 1:
            rows = place / "rows.jsonl"
            rows.write_text('{"prediction": "The answer is \\\\boxed{4}", "gold": "4"}\n')
            for name, arguments in {
                "--help": ["--help"],
                "train --help": ["train", "--help"],
                "runs": ["runs", str(place)],
                "show": ["show", "prompt", config],
                "check": ["check", config],
                "grade": ["grade", str(rows), f"--out={place / 'graded.jsonl'}"],
                "eval": ["eval", str(place / "run-0"), "--prompts=8"],
            }.items():
                commands[name] = min(first_line(*arguments) for _ in range(2))
    typical = {name: median(run[name] for run in runs if name in run) for name in runs[0]}
    table = Table("since `rlora train`", "seconds")
    for name, seconds in sorted(typical.items(), key=lambda pair: (pair[0].startswith("step: "), pair[1])):
        table.add_row(name, f"{seconds:.1f}")
    console = Console()
    console.print(table)
    if commands:
        table = Table("command", "first line", "end")
        for name, (first, end) in commands.items():
            table.add_row(name, f"{first:.1f}", f"{end:.1f}")
        console.print(table)
    print(
        json.dumps(
            {
                "to_first_token": round(typical["first token"], 2),
                "to_first_step": round(typical["first step"], 2),
                "runs": [round(run["first step"], 2) for run in runs],
                "commands": {name: [round(seconds, 2) for seconds in pair] for name, pair in commands.items()},
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--driver"]:
        driver(sys.argv[2:])
    else:
        main()
