"""A sweep compared with the same runs one after the other: time and memory, and the cost of steps and updates.

    python benchmarks/sweep.py [--quick] [--only small,large,halved,memory]
    python benchmarks/sweep.py --prices

The sweep has eight members of launch/arithmetic.toml, four learning rates x two seeds, each with 4 prompts x 8
completions (`small`) or 16 x 8 (`large`), and 48 steps. It is compared with separate runs, each started and ended by
itself. `halved` is the large sweep, with half of the learning rates dropped at a quarter and at half of the steps.
`--quick` makes 12 steps. Prints a table and, as its last line, a JSON object: `small_ratio`, `large_ratio` and
`halved_ratio`, the seconds of the sweep divided by those of the runs; `small_steady` and so on, without start and
evaluation; `engine_ratio_small` and `engine_ratio_large`, for the seconds in which the engine was busy;
`second_member_mib`, the memory of an additional member, summed over all processes.

`--prices` prints, for one engine and one learner, the seconds of a decoding step by rows and adapters, and those of an
update by groups.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "launch/arithmetic.toml"
RATES, SEEDS = (1e-4, 3e-4, 5e-4, 1e-3), (0, 1)
PROMPTS = {"small": 4, "large": 16}
ROWS, ADAPTERS, GROUPS = (32, 64, 128, 256, 512, 1024), (0, 1, 2, 8, 16), (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="12 steps")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--only", default="small,large,halved,memory", help="comma-separated parts")
    parser.add_argument("--prices", action="store_true", help="measure a decoding step and an update")
    options = parser.parse_args()
    if options.prices:
        print(json.dumps(prices()))
        return
    steps, parts, figures = 12 if options.quick else options.steps, options.only.split(","), dict[str, Any]()
    table = Table("", "8 runs", "sweep", "ratio", "without start and evaluation", "engine")
    with tempfile.TemporaryDirectory() as directory:
        root, alone = Path(directory), dict[str, Spent]()
        for part in (part for part in parts if part != "memory"):
            size = "small" if part == "small" else "large"
            shape = ["--prompts-per-step", str(PROMPTS[size]), "--group-size", "8", "--steps", str(steps)]
            if size not in alone:
                alone[size] = one_by_one(root / f"{size}-runs", shape)
            halving = ["--halve-at", f"{steps // 4},{steps // 2}"] if part == "halved" else []
            swept = sweep(root / part, [*shape, *halving])
            ratio, steady, engine = (ours / theirs for ours, theirs in zip(swept, alone[size], strict=True))
            figures |= {f"{part}_ratio": ratio, f"{part}_steady": steady}
            if part != "halved":
                figures[f"engine_ratio_{part}"] = engine
            cells = [f"{alone[size].whole:.0f} s", f"{swept.whole:.0f} s", f"{ratio:.2f}"]
            table.add_row(part, *cells, f"{steady:.2f}", f"{engine:.2f}")
            if part == "halved":
                kept = [json.loads(line) for line in (root / part / "sweep.jsonl").read_text().splitlines()]
                print("finished:", *[line["member"] for line in kept if line["event"] == "finished"])
        Console().print(table)
        if "memory" in parts:
            figures["second_member_mib"] = more_memory(root)
    print(json.dumps(figures))


class Spent(tuple[float, float, float]):
    """Seconds: in total, of the steps, and with the engine busy."""

    @property
    def whole(self) -> float:
        return self[0]


def one_by_one(directory: Path, shape: Sequence[str]) -> Spent:
    """Train each member as a separate run."""
    spent = []
    for rate in RATES:
        for seed in SEEDS:
            run, start = directory / f"{rate}-{seed}", time.perf_counter()
            fields = ["--learner.lr", str(rate), "--seed", str(seed), "--run-dir", str(run)]
            _rlora("train", CONFIG, *fields, *shape)
            lines = _lines(run / "metrics.jsonl")
            busy = sum(line["time/sampling"] or 0.0 for line in lines)
            spent.append((time.perf_counter() - start, sum(line["time/step"] for line in lines), busy))
    return Spent(map(sum, zip(*spent, strict=True)))


def sweep(directory: Path, shape: Sequence[str]) -> Spent:
    """Train all members in one sweep."""
    start = time.perf_counter()
    axes = ["--over", f"learner.lr={','.join(map(str, RATES))}", "--over", f"seed={','.join(map(str, SEEDS))}"]
    _rlora("sweep", CONFIG, *axes, *shape, "--run-dir", str(directory))
    total, turns = time.perf_counter() - start, _lines(directory / "metrics.jsonl")
    busy = sum(turn["engine/busy"] * turn["time/turn"] for turn in turns)
    return Spent((total, sum(turn["time/turn"] for turn in turns), busy))


def more_memory(directory: Path) -> float:
    """Peak MiB of a sweep of three members minus that of two, summed over all processes."""
    peaks = []
    for count in (2, 3):
        rates = ",".join(str(rate) for rate in RATES[:count])
        shape = ["--prompts-per-step", "4", "--group-size", "8", "--steps", "8", "--evaluate.prompts", "0"]
        command = [sys.executable, "-m", "rlora", "sweep", CONFIG, "--over", f"learner.lr={rates}", *shape]
        process = psutil.Popen([*command, "--run-dir", str(directory / f"memory-{count}")], cwd=ROOT, stdout=sys.stderr)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _proportional(process))
            time.sleep(0.5)
        peaks.append(peak)
    return (peaks[1] - peaks[0]) / 2**20


def _proportional(process: psutil.Process) -> int:
    """Bytes of a process and its descendants; shared memory counts once."""
    total = 0
    for child in [process, *process.children(recursive=True)]:
        try:
            total += child.memory_full_info().pss
        except psutil.Error:  # the process has ended
            continue
    return total


def prices() -> dict[str, Any]:
    """Seconds of a decoding step, by rows and adapters, and of an update, by groups."""
    from rlora import cluster
    from rlora.config import read
    from rlora.core.setup import Setup
    from rlora.records import BASE, Sampling
    from rlora.rollout.task import ServedPolicy, load_task

    config = read(ROOT / CONFIG)
    config = replace(config, engine=replace(config.engine, max_num_seqs=max(ROWS)))
    task, names = load_task(config), [f"p{number}" for number in range(max(ADAPTERS))]
    figures: dict[str, Any] = {"decoding": {}, "update": {}}
    table = Table("rows", *(f"{count} adapters" for count in ADAPTERS), title="milliseconds per decoding step")
    with cluster.start([ServedPolicy(name, config, task) for name in names]) as job:
        adapters = [job.learners[name].open(name, Setup.of(replace(config, seed=n))) for n, name in enumerate(names)]
        for adapter in adapters:
            job.fleet.swap(adapter)
        (engine,) = job.fleet.engines
        engine.load(BASE).result()
        groups: list[Any] = []
        for rows in ROWS:
            cells = []
            for count in ADAPTERS:
                chosen = adapters[:count] or [BASE]
                seconds = []
                for _ in range(3):
                    busy = engine.stats().result().busy_seconds
                    pairs = [(task.prompts[n % len(task.prompts)], chosen[n % len(chosen)]) for n in range(rows // 8)]
                    futures = [
                        engine.generate(prompt, Sampling(16, 1.0, 8), adapter.version) for prompt, adapter in pairs
                    ]
                    sampled = [future.result() for future in futures]
                    longest = max(len(episode.completion_ids) for group in sampled for episode in group.episodes)
                    seconds.append((engine.stats().result().busy_seconds - busy) / longest)
                    groups = sampled if count == 1 else groups
                figures["decoding"][f"{rows}/{count}"] = median(seconds)
                cells.append(f"{1000 * median(seconds):.0f}")
            table.add_row(str(rows), *cells)
        Console().print(table)
        scored = [
            replace(group, episodes=tuple(replace(e, reward=float(n % 2)) for n, e in enumerate(group.episodes)))
            for group in groups
        ]
        for count in GROUPS:
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                job.learners[names[0]].update(names[0], scored[:count])
                seconds.append(time.perf_counter() - start)
            figures["update"][count] = median(seconds)
    print("seconds per update, by informative groups of 8:", figures["update"])
    return figures


def _rlora(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "rlora", *arguments], cwd=ROOT, check=True, stdout=sys.stderr)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
