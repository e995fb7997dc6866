"""Plots a sweep: the learning curve of every member, and the result by learning rate and rank."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rlora.records import RloraError
from rlora.sweeps.results import NLL, OVER_LAST, MemberResult, standings

_LR, _RANK = "learner.lr", "learner.rank"
_LONGEST = 40  # characters of a name in the plot


def plot(members: list[MemberResult], file: Path) -> None:
    """Write the plot to `file`, whose suffix is the format. Raises RloraError if matplotlib is not installed."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise RloraError(f"--plot: {error}; install it with pip install 'rlora[plot]'") from error
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2), layout="constrained")
    configurations = list(dict.fromkeys(member.configuration for member in members))
    colours = dict(zip(configurations, pyplot.get_cmap("turbo")(_spaced(len(configurations))), strict=True))
    for name, colour in colours.items():
        curves = []
        for member in (member for member in members if member.configuration == name and member.rewards):
            curves.append(_smoothed(member.rewards))
            steps = range(member.first, member.first + len(member.rewards))
            left.plot(steps, curves[-1], color=colour, lw=0.6, alpha=0.5)
            if member.status == "dropped":
                left.plot(steps[-1], curves[-1][-1], "x", color=colour)
        if curves:
            means = [fmean(values) for values in zip(*curves, strict=False)]  # as far as all members have got
            left.plot(range(member.first, member.first + len(means)), means, color=colour, label=_short(name), lw=1.6)
    title = f"Each member (thin; x: dropped) and configuration, mean of {OVER_LAST} steps"
    left.set(xlabel="step", ylabel="log p per token" if standings(members)[0] == NLL else "mean reward", title=title)
    if len(configurations) <= 24:
        left.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.16))
    _compare(right, members, colours)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _compare(axes: Any, members: list[MemberResult], colours: dict[str, Any]) -> None:
    """Plot each finished member as a point: by learning rate with a line per rank, or by configuration.

    A fork is not plotted by learning rate, because part of its steps had a different one.
    """
    label, ranking = standings(members)
    axes.set(ylabel=label)
    done = [member for member in members if member.status == "finished" and not member.origin]
    values = {member.name: member.value(label) for member in done}
    rates = {member.changes.get(_LR) for member in done}
    if len(rates) > 1 and all(isinstance(rate, int | float) for rate in rates):
        ranks = sorted({member.changes.get(_RANK, 0) for member in done})
        for number, rank in enumerate(ranks):
            peers = [member for member in done if member.changes.get(_RANK, 0) == rank]
            x, y = [member.changes[_LR] for member in peers], [values[member.name] for member in peers]
            points = axes.plot(x, y, "o", ms=4)
            by_rate = [
                (rate, [values[member.name] or 0.0 for member in peers if member.changes[_LR] == rate])
                for rate in sorted({member.changes[_LR] for member in peers})
            ]
            name = f"rank {rank}" if rank else "mean"
            means = [sum(group) / len(group) for _, group in by_rate]
            axes.plot(
                [rate for rate, _ in by_rate], means, "-", color=points[0].get_color(), label=name, zorder=-number
            )
        axes.set(xscale="log", xlabel="learning rate", title="Each seed, and the mean by rank")
        axes.set_xticks([*rates], [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.legend(fontsize=8)
        return
    for height, standing in enumerate(reversed(ranking)):
        axes.plot(standing.values, [height] * len(standing.values), "o", color=colours[standing.configuration], ms=4)
        axes.plot(standing.mean, height, "|", color="black", ms=14)
    axes.set(xlabel=label, ylabel="", title="Each member, and the mean")
    axes.set_yticks(range(len(ranking)), [_short(standing.configuration) for standing in reversed(ranking)], fontsize=7)


def _smoothed(rewards: Sequence[float]) -> list[float]:
    """Return the mean of each step and up to `OVER_LAST` - 1 steps before."""
    return [fmean(rewards[max(0, end - OVER_LAST) : end]) for end in range(1, len(rewards) + 1)]


def _short(name: str) -> str:
    """Return the name of a configuration, with its end only if it is so long that it would leave no room to plot."""
    return name if len(name) <= _LONGEST else f"...{name[-_LONGEST:]}"


def _spaced(count: int) -> list[float]:
    return [0.05 + 0.9 * number / max(1, count - 1) for number in range(count)]
