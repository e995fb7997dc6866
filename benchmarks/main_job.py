"""Train the main job, or another config, with several seeds: gain, time, and a plot.

    python benchmarks/main_job.py [--quick] [--plot docs/curve.png]
    python benchmarks/main_job.py launch/calculator.toml --title "..." --seeds 1 --plot docs/calculator.png
    python benchmarks/main_job.py launch/arithmetic.toml --evaluate.every 8       # any field of the config

Prints a table and, as its last line, a JSON object: `accuracy_before`, `accuracy_after` and `train_seconds` (lists with
one value per seed), and `gain_min`. `--quick` runs one seed for three steps. The runs are made one after the other. The
plot shows the mean reward of each step, and the held-out accuracy of each evaluated version with its 95% interval.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", nargs="?", default="launch/arithmetic.toml", help="the config to train")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs")
    parser.add_argument("--title", default="SmolLM2-135M, rank 1: “What is a + b?”, a and b from 1 to 11")
    parser.add_argument("--quick", action="store_true", help="one seed, three steps")
    parser.add_argument("--plot", type=Path, help="draw the rewards to this PNG file")
    options, extra = parser.parse_known_args()
    seeds, extra = ([0], [*extra, "--steps", "3"]) if options.quick else (list(range(options.seeds)), extra)
    with tempfile.TemporaryDirectory() as directory:
        runs = [train(options.config, seed, Path(directory) / str(seed), extra) for seed in seeds]
    named = (re.fullmatch(r"accuracy/(\w+/)before", name) for name in runs[0][0])
    sets = ["", *(match[1] for match in named if match)]
    columns = [f"{name}accuracy {when}" for name in sets for when in ("before", "after")]
    table = Table("seed", *columns, "steps", "training", "reward by step")
    curves = [[line["reward/mean"] for line in lines] for _, lines in runs]
    for seed, (summary, _), rewards in zip(seeds, runs, curves, strict=True):
        accuracies = [
            "{:.3f} ({:.3f} to {:.3f})".format(
                *(summary[f"accuracy/{name}{when}{end}"] for end in ("", "/low", "/high"))
            )
            for name in sets
            for when in ("before", "after")
        ]
        curve = " ".join(f"{reward:.2f}" for reward in rewards)
        table.add_row(str(seed), *accuracies, str(summary["steps"]), f"{summary['time/train']:.0f} s", curve)
    Console(width=200).print(table)
    if options.plot:
        _plot(curves, [evaluated(*run) for run in runs], options.title, options.plot)
    before, after = ([summary[f"accuracy/{when}"] for summary, _ in runs] for when in ("before", "after"))
    figures = {
        "accuracy_before": before,
        "accuracy_after": after,
        "train_seconds": [summary["time/train"] for summary, _ in runs],
        "gain_min": min(b - a for a, b in zip(before, after, strict=True)),
    }
    print(json.dumps(figures))


def train(config: str, seed: int, run: Path, options: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train one run. Returns its summary, and the metrics of each step."""
    command = [sys.executable, "-m", "rlora", "train", config, "--seed", str(seed), "--run-dir", str(run)]
    subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "summary.json").read_text()), lines


def evaluated(summary: dict[str, Any], lines: list[dict[str, Any]]) -> list[list[float]]:
    """A row per evaluated version: number, held-out accuracy, and the ends of its interval."""
    ends = ("", "/low", "/high")
    between = [line for line in lines if line.get("accuracy/version")]
    return [
        [0, *(summary[f"accuracy/before{end}"] for end in ends)],
        *([line["accuracy/version"], *(line[f"accuracy/held_out{end}"] for end in ends)] for line in between),
        [summary["steps"], *(summary[f"accuracy/after{end}"] for end in ends)],
    ]


def _plot(curves: list[list[float]], held_out: list[list[list[float]]], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for seed, (rewards, points) in enumerate(zip(curves, held_out, strict=True)):
        axes.plot(
            range(len(rewards)), rewards, color=f"C{seed}", alpha=0.5, label=f"seed {seed}: mean reward of a step"
        )
        versions, accuracy, low, high = zip(*points, strict=True)
        below, above = ([abs(a - b) for a, b in zip(accuracy, end, strict=True)] for end in (low, high))
        shifted = [version + 0.4 * seed for version in versions]
        axes.errorbar(
            shifted, accuracy, [below, above], color=f"C{seed}", fmt="o", capsize=3, label="held-out accuracy, 95%"
        )
    axes.set(xlabel="step", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
