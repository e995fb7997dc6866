"""The main job, or another config, under several seeds: what it gains, how fast, and a picture of it.

    python benchmarks/main_job.py [--quick] [--plot docs/curve.png]
    python benchmarks/main_job.py launch/calculator.toml --title "..." --seeds 1 --plot docs/calculator.png

Prints a table and, as its last line, a JSON object: `accuracy_before`, `accuracy_after`, `train_seconds` (lists, one
value a seed) and `gain_min`. `--quick` runs one seed for three steps. The runs are made one after the other.
"""

import argparse
import json
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
    parser.add_argument("config", nargs="?", default="launch/arithmetic.toml", help="what to train")
    parser.add_argument("--seeds", type=int, default=3, help="how many runs")
    parser.add_argument("--title", default="SmolLM2-135M, rank 1: “What is a + b?”, a and b from 1 to 11")
    parser.add_argument("--quick", action="store_true", help="one seed, three steps")
    parser.add_argument("--plot", type=Path, help="draw the rewards to this PNG file")
    options = parser.parse_args()
    seeds, extra = ([0], ["--steps", "3"]) if options.quick else (list(range(options.seeds)), [])
    with tempfile.TemporaryDirectory() as directory:
        runs = [train(options.config, seed, Path(directory) / str(seed), extra) for seed in seeds]
    table = Table("seed", "accuracy before", "after", "steps", "training", "reward by step")
    curves = [[line["reward/mean"] for line in lines] for _, lines in runs]
    for seed, (summary, _), rewards in zip(seeds, runs, curves, strict=True):
        before, after = (f"{summary[f'accuracy/{when}']:.3f}" for when in ("before", "after"))
        curve = " ".join(f"{reward:.2f}" for reward in rewards)
        table.add_row(str(seed), before, after, str(summary["steps"]), f"{summary['time/train']:.0f} s", curve)
    Console().print(table)
    if options.plot:
        _plot(curves, options.title, options.plot)
    before, after = ([summary[f"accuracy/{when}"] for summary, _ in runs] for when in ("before", "after"))
    figures = {
        "accuracy_before": before,
        "accuracy_after": after,
        "train_seconds": [summary["time/train"] for summary, _ in runs],
        "gain_min": min(b - a for a, b in zip(before, after, strict=True)),
    }
    print(json.dumps(figures))


def train(config: str, seed: int, run: Path, options: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary of one run, and its figures of each step."""
    command = [sys.executable, "-m", "rlora", "train", config, "--seed", str(seed), "--run-dir", str(run)]
    subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "summary.json").read_text()), lines


def _plot(curves: list[list[float]], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for seed, rewards in enumerate(curves):
        axes.plot(range(len(rewards)), rewards, label=f"seed {seed}")
    axes.set(xlabel="step", ylabel="mean reward of a step", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
