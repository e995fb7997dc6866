"""The loss of SFT by rank and number of examples, beside the capacity of an adapter: 2 bits per parameter.

    python benchmarks/capacity.py runs/sft/capacity docs/capacity.png

Prints a row per number of examples and plots the finished members of a sweep of launch/sft.toml over `learner.rank` (or
full fine-tuning) and the number of examples, `env_args.split=train[:64]` and so on. Each member trains on its examples
for two epochs. The information in the examples is the loss of the base on held-out examples, in bits, times their
tokens. "LoRA Without Regret" (Thinking Machines, 2025) expects an adapter to fall behind full fine-tuning where this
exceeds its capacity. 2 bits per parameter is the capacity that Allen-Zhu and Li measured for whole models
(arXiv:2404.05405).
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from safetensors import safe_open
from upath import UPath

from rlora.config import read
from rlora.run import directory
from rlora.sweeps.results import read_results

BITS = 2.0  # per parameter


@dataclass(frozen=True)
class Point:
    """A finished member. Losses are in nats per token."""

    rank: int  # 0 for full fine-tuning
    examples: int
    bits: float  # information in its examples
    parameters: int
    before: float  # held-out loss
    after: float
    train: float  # loss of the second epoch's batches, each before its update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("plot", type=Path, nargs="?")
    options = parser.parse_args()
    names = [member.name for member in read_results(options.sweep) if member.status == "finished"]
    points = sorted(
        (point(options.sweep / name) for name in names), key=lambda item: (item.examples, item.rank or math.inf)
    )
    print("| examples | information | held-out loss before |", " | ".join(label(rank) for rank in ranks(points)), "|")
    print("|---" * (3 + len(ranks(points))), "|", sep="")
    for examples in dict.fromkeys(item.examples for item in points):
        row = [item for item in points if item.examples == examples]
        cells = " | ".join(f"{item.after:.3f} ({item.train:.3f})" for item in row)
        print(f"| {examples} | {row[0].bits / 1e3:.0f} kbit | {row[0].before:.3f} | {cells} |")
    if options.plot:
        plot(points, options.plot)


def point(run: Path) -> Point:
    config, summary = read(run / "config.toml"), directory.summary(UPath(run))
    lines = directory.figures(UPath(run))
    first, second = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    before, after = summary["held_out/nll/before"], summary["held_out/nll/after"]
    bits = before / math.log(2) * sum(line["completion/tokens"] for line in first)
    return Point(
        0 if config.learner.full_finetuning else config.learner.rank,
        config.prompts_per_step * len(first),
        bits,
        parameters(run / "bundles" / str(config.steps)),
        before,
        after,
        fmean(line["loss"] for line in second),
    )


def parameters(bundle: Path) -> int:
    """Count the numbers in a bundle's file of weights, from its header."""
    (file,) = bundle.glob("*model.safetensors")
    with safe_open(file, "pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def plot(points: Sequence[Point], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharex=True)
    colours = dict(zip(ranks(points), pyplot.get_cmap("viridis_r")([0.1, 0.35, 0.6, 0.85, 1.0]), strict=False))
    for rank, colour in colours.items():
        curve = [item for item in points if item.rank == rank]
        style = {"color": colour if rank else "black", "ls": "-" if rank else "--", "marker": "o", "ms": 4}
        for axes, losses in zip(panels, ([i.after for i in curve], [i.train for i in curve]), strict=True):
            axes.plot([item.bits for item in curve], losses, label=label(rank), **style)
            if rank:
                axes.axvline(BITS * curve[0].parameters, color=colour, lw=1, ls=":")
    for axes, title in zip(panels, ("Held-out loss after training", "Training loss of the second epoch"), strict=True):
        axes.set(xscale="log", xlabel="information in the examples, bits (dotted: 2 per parameter)", title=title)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="-log p per token, nats")
    panels[0].axhline(fmean(item.before for item in points), color="0.5", lw=1)
    panels[0].legend(title="grey: before training")
    figure.savefig(file, dpi=110)


def ranks(points: Sequence[Point]) -> list[int]:
    """All ranks in ascending order; full fine-tuning, 0, comes last."""
    return sorted({item.rank for item in points}, key=lambda rank: rank or math.inf)


def label(rank: int) -> str:
    return f"rank {rank}" if rank else "full fine-tuning"


if __name__ == "__main__":
    main()
