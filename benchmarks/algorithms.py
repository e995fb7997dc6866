"""Learning curves of the algorithms on the main job's task, under the same seeds.

    python benchmarks/algorithms.py [--seeds 0 1] [--algorithms grpo ppo] [--plot docs/algorithms.png]

Trains launch/arithmetic-ppo.toml with each `algorithm.name`, one run after the other. Prompts and their order, steps,
minibatches (four per update), learning rate and schedule are the same. Prints a table and, as its last line, a JSON
object. It contains a list over the seeds for each of `<algorithm>/last` (mean reward of the last five steps),
`<algorithm>/accuracy` (greedy, held out, after training), `<algorithm>/seconds`, `<algorithm>/update_seconds` (the
learner's part of them) and `ppo/explained_variance` (for each step).
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from main_job import train
from rich.console import Console
from rich.table import Table

CONFIG = "launch/arithmetic-ppo.toml"
ALGORITHMS = ["grpo", "dr-grpo", "cispo", "gspo", "rloo", "ppo"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="three steps")
    parser.add_argument("--plot", type=Path, help="draw the rewards to this PNG file")
    options = parser.parse_args()
    extra = ["--steps", "3"] if options.quick else []
    curves: dict[str, list[list[float]]] = {}
    figures: dict[str, list[Any]] = {}
    table = Table("algorithm", "seed", "last five steps", "accuracy after", "training", "updates", "reward by step")
    with tempfile.TemporaryDirectory() as directory:
        for seed in options.seeds:
            for name in options.algorithms:
                settings = ["--algorithm.name", name, "--algorithm.minibatches", "4"]
                summary, lines = train(CONFIG, seed, Path(directory) / f"{name}-{seed}", settings + extra)
                rewards = [line["reward/mean"] for line in lines]
                curves.setdefault(name, []).append(rewards)
                measured = {
                    "last": fmean(rewards[-5:]),
                    "accuracy": summary["accuracy/after"],
                    "seconds": summary["time/train"],
                    "update_seconds": sum(line["time/update"] for line in lines),
                }
                if name == "ppo":
                    explained = [line["critic/explained_variance"] for line in lines]
                    figures.setdefault("ppo/explained_variance", []).append(explained)
                for figure, value in measured.items():
                    figures.setdefault(f"{name}/{figure}", []).append(value)
                shown = [f"{measured['last']:.3f}", f"{measured['accuracy']:.3f}"]
                shown += [f"{measured['seconds']:.0f} s", f"{measured['update_seconds']:.0f} s"]
                table.add_row(name, str(seed), *shown, " ".join(f"{reward:.2f}" for reward in rewards))
    Console(width=200).print(table)
    if options.plot:
        plot(curves, options.plot)
    print(json.dumps(figures))


def plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Draw one panel per algorithm and one line per seed, with the other algorithms in grey behind them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(curves))
    figure, grid = pyplot.subplots(
        -(-len(curves) // columns),
        columns,
        figsize=(9, 5),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    panels: list[Any] = list(grid.flat)
    for axes, (name, seeds) in zip(panels, curves.items(), strict=False):
        for other in (rewards for runs in curves.values() for rewards in runs):
            axes.plot(other, color="0.85", linewidth=0.8)
        for rewards in seeds:
            axes.plot(rewards)
        axes.set(title=name, ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.supxlabel("step")
    figure.supylabel("mean reward of 64 completions")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
