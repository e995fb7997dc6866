"""A sweep against the same runs one after the other: seconds, engine, memory; and the prices that they are made of.

    python benchmarks/sweep.py [--quick] [--only small,large,halved,memory]
    python benchmarks/sweep.py --prices

Eight members of launch/arithmetic.toml, four learning rates by two seeds, each of 4 prompts x 8 completions (`small`)
or of 16 x 8 (`large`), 48 steps; and the same as runs of their own, each started and ended by itself. `halved` is the
large sweep that drops half of the learning rates at a quarter and at a half of the steps. `--quick`: 12 steps. Prints a
table and, as its last line, a JSON object: `small_ratio`, `large_ratio`, `halved_ratio`, seconds of the sweep over
those of the runs; `small_steady` and so on, without start and evaluation; `engine_ratio_small`, `engine_ratio_large`,
seconds in which the engine was busy; `second_member_mib`, what one member more takes in all processes together.

`--prices` prints, on one engine and one learner, the seconds of a decoding step by rows and by adapters, and those of
an update by groups.
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
    parser.add_argument("--only", default="small,large,halved,memory", help="parts, between commas")
    parser.add_argument("--prices", action="store_true", help="of a decoding step and of an update")
    options = parser.parse_args()
    if options.prices:
        print(json.dumps(prices()))
        return
    steps, parts, figures = 12 if options.quick else options.steps, options.only.split(","), dict[str, Any]()
    table = Table("", "8 runs", "sweep", "ratio", "without start and evaluation", "engine")
    with tempfile.TemporaryDirectory() as directory:
        place, alone = Path(directory), dict[str, Spent]()
        for part in (part for part in parts if part != "memory"):
            size = "small" if part == "small" else "large"
            shape = ["--prompts-per-step", str(PROMPTS[size]), "--group-size", "8", "--steps", str(steps)]
            if size not in alone:
                alone[size] = one_by_one(place / f"{size}-runs", shape)
            halving = ["--halve-at", f"{steps // 4},{steps // 2}"] if part == "halved" else []
            swept = sweep(place / part, [*shape, *halving])
            ratio, steady, engine = (ours / theirs for ours, theirs in zip(swept, alone[size], strict=True))
            figures |= {f"{part}_ratio": ratio, f"{part}_steady": steady}
            if part != "halved":
                figures[f"engine_ratio_{part}"] = engine
            cells = [f"{alone[size].whole:.0f} s", f"{swept.whole:.0f} s", f"{ratio:.2f}"]
            table.add_row(part, *cells, f"{steady:.2f}", f"{engine:.2f}")
            if part == "halved":
                kept = [json.loads(line) for line in (place / part / "sweep.jsonl").read_text().splitlines()]
                print("finished:", *[line["member"] for line in kept if line["event"] == "finished"])
        Console().print(table)
        if "memory" in parts:
            figures["second_member_mib"] = more_memory(place)
    print(json.dumps(figures))


class Spent(tuple[float, float, float]):
    """Seconds: in all; of the steps; in which the engine was busy."""

    @property
    def whole(self) -> float:
        return self[0]


def one_by_one(place: Path, shape: Sequence[str]) -> Spent:
    """Each member as a run by itself."""
    spent = []
    for rate in RATES:
        for seed in SEEDS:
            run, start = place / f"{rate}-{seed}", time.perf_counter()
            own = ["--learner.lr", str(rate), "--seed", str(seed), "--run-dir", str(run)]
            _rlora("train", CONFIG, *own, *shape)
            lines = _lines(run / "metrics.jsonl")
            busy = sum(line["time/sampling"] or 0.0 for line in lines)
            spent.append((time.perf_counter() - start, sum(line["time/step"] for line in lines), busy))
    return Spent(map(sum, zip(*spent, strict=True)))


def sweep(place: Path, shape: Sequence[str]) -> Spent:
    """All members together."""
    start = time.perf_counter()
    axes = ["--over", f"learner.lr={','.join(map(str, RATES))}", "--over", f"seed={','.join(map(str, SEEDS))}"]
    _rlora("sweep", CONFIG, *axes, *shape, "--run-dir", str(place))
    whole, turns = time.perf_counter() - start, _lines(place / "metrics.jsonl")
    busy = sum(turn["engine/busy"] * turn["time/turn"] for turn in turns)
    return Spent((whole, sum(turn["time/turn"] for turn in turns), busy))


def more_memory(place: Path) -> float:
    """MiB that a sweep of three members takes beyond one of two, at most, over all their processes."""
    peaks = []
    for count in (2, 3):
        rates = ",".join(str(rate) for rate in RATES[:count])
        shape = ["--prompts-per-step", "4", "--group-size", "8", "--steps", "8", "--evaluate.prompts", "0"]
        command = [sys.executable, "-m", "rlora", "sweep", CONFIG, "--over", f"learner.lr={rates}", *shape]
        process = psutil.Popen([*command, "--run-dir", str(place / f"memory-{count}")], cwd=ROOT, stdout=sys.stderr)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _proportional(process))
            time.sleep(0.5)
        peaks.append(peak)
    return (peaks[1] - peaks[0]) / 2**20


def _proportional(process: psutil.Process) -> int:
    """Bytes of a process and all under it; what several share counts once."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:  # it has ended
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
    found: dict[str, Any] = {"decoding": {}, "update": {}}
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
                under = adapters[:count] or [BASE]
                seconds = []
                for _ in range(3):
                    before = engine.stats().result().busy_seconds
                    pairs = [(task.prompts[n % len(task.prompts)], under[n % len(under)]) for n in range(rows // 8)]
                    asked = [
                        engine.generate(prompt, Sampling(16, 1.0, 8), adapter.version) for prompt, adapter in pairs
                    ]
                    sampled = [each.result() for each in asked]
                    longest = max(len(episode.completion_ids) for group in sampled for episode in group.episodes)
                    seconds.append((engine.stats().result().busy_seconds - before) / longest)
                    groups = sampled if count == 1 else groups
                found["decoding"][f"{rows}/{count}"] = median(seconds)
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
            found["update"][count] = median(seconds)
    print("seconds per update, by informative groups of 8:", found["update"])
    return found


def _rlora(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "rlora", *arguments], cwd=ROOT, check=True, stdout=sys.stderr)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
