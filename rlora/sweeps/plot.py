"""A picture of a sweep: the curve of every member, and the reward against the learning rate for each rank."""

from pathlib import Path
from typing import Any

from rlora.records import RloraError
from rlora.sweeps.results import Ended, standings

_LR, _RANK = "learner.lr", "learner.rank"


def plot(members: list[Ended], file: Path) -> None:
    """Draw it into a file, PNG or whatever its ending says. Raises RloraError where matplotlib is not installed."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise RloraError(f"--plot: {error}; install it by pip install 'rlora[plot]'") from error
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2), layout="constrained")
    configurations = list(dict.fromkeys(each.configuration for each in members))
    colours = dict(zip(configurations, pyplot.get_cmap("turbo")(_spaced(len(configurations))), strict=True))
    for number, each in enumerate(members):
        first = each.configuration not in {before.configuration for before in members[:number]}
        left.plot(each.rewards, color=colours[each.configuration], label=each.configuration if first else None, lw=1.2)
        if each.status == "dropped" and each.rewards:
            left.plot(len(each.rewards) - 1, each.rewards[-1], "x", color=colours[each.configuration])
    left.set(xlabel="version", ylabel="mean reward", title="Every member (x: dropped)")
    if len(configurations) <= 16:
        left.legend(fontsize=7)
    _compare(right, members, colours)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _compare(axes: Any, members: list[Ended], colours: dict[str, Any]) -> None:
    """Each finished member as a point: over the learning rates, a line a rank, or else over the configurations."""
    label, found = standings(members)
    axes.set(ylabel=label)
    done = [each for each in members if each.status == "finished"]
    values = {each.name: each.after if "accuracy" in label else each.reward for each in done}
    rates = {each.changes.get(_LR) for each in done}
    if len(rates) > 1 and all(isinstance(rate, int | float) for rate in rates):
        ranks = sorted({each.changes.get(_RANK, 0) for each in done})
        for number, rank in enumerate(ranks):
            own = [each for each in done if each.changes.get(_RANK, 0) == rank]
            points = axes.plot([each.changes[_LR] for each in own], [values[each.name] for each in own], "o", ms=4)
            means = [
                (rate, [values[each.name] or 0.0 for each in own if each.changes[_LR] == rate])
                for rate in sorted({each.changes[_LR] for each in own})
            ]
            name = f"rank {rank}" if rank else "mean"
            line = [sum(of) / len(of) for _, of in means]
            axes.plot([rate for rate, _ in means], line, "-", color=points[0].get_color(), label=name, zorder=-number)
        axes.set(xscale="log", xlabel="learning rate", title="Each seed, and the mean by rank")
        axes.legend(fontsize=8)
        return
    for place, each in enumerate(reversed(found)):
        axes.plot(each.values, [place] * len(each.values), "o", color=colours[each.configuration], ms=4)
        axes.plot(each.mean, place, "|", color="black", ms=14)
    axes.set(xlabel=label, ylabel="", title="Each member, and the mean")
    axes.set_yticks(range(len(found)), [each.configuration for each in reversed(found)], fontsize=7)


def _spaced(count: int) -> list[float]:
    return [0.05 + 0.9 * number / max(1, count - 1) for number in range(count)]
