"""What a sweep has come to: its members side by side, which configuration to take, and how sure that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import mpmath
from upath import UPath

from rlora.run import directory
from rlora.sweeps.diary import DIARY, fates, whole_lines
from rlora.sweeps.sweep import read_members

_OVER_LAST = 4  # steps over which the reward of a member that has no accuracy is averaged


@dataclass(frozen=True)
class Ended:
    """A member, as far as it has come."""

    name: str
    configuration: str  # what it changes, but for the fields of the pool
    changes: Mapping[str, Any]
    status: str
    rewards: Sequence[float]  # by step
    before: float | None  # accuracy on held-out prompts
    after: float | None

    @property
    def reward(self) -> float | None:
        """Mean reward of its last steps."""
        return fmean(self.rewards[-_OVER_LAST:]) if self.rewards else None


@dataclass(frozen=True)
class Standing:
    """A configuration, over its members that have finished."""

    configuration: str
    values: Sequence[float]  # of each member: its accuracy after, or its last rewards

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def half(self) -> float:
        """Half of the 95% confidence interval of the mean over the members (Student's t); infinite for one member."""
        count = len(self.values)
        return quantile(count - 1) * stdev(self.values) / math.sqrt(count) if count > 1 else math.inf

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.mean:.3f} (one member)"
        low, high = self.mean - self.half, self.mean + self.half
        return f"{self.mean:.3f} (95% {low:.3f} to {high:.3f}, {len(self.values)} members)"


def quantile(freedom: float) -> float:
    """The 0.975 quantile of Student's t distribution, by degrees of freedom."""
    beyond = lambda t: mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - 0.05  # noqa: E731
    return float(mpmath.findroot(beyond, (1.5, 13.0), solver="anderson"))


def ended(place: Path) -> list[Ended]:
    """The members of the sweep in a directory. Raises RloraError where none is there."""
    members, pool = read_members(place)
    known, found = fates(whole_lines(place / DIARY)), []
    for member in members:
        run = UPath(place / member.name)
        summary = directory.summary(run)
        label = ", ".join(f"{field} = {value}" for field, value in member.changes.items() if field not in pool)
        found.append(
            Ended(
                member.name, label or "as given", member.changes,
                known[member.name].status if member.name in known else "waiting",
                [line["reward/mean"] or 0.0 for line in directory.figures(run)],
                summary.get("accuracy/before"), summary.get("accuracy/after"),
            )
        )  # fmt: skip
    return found


def standings(members: Sequence[Ended]) -> tuple[str, list[Standing]]:
    """The figure that configurations are compared by, and each by its members that have finished, the best first."""
    done = [each for each in members if each.status == "finished"]
    by_accuracy = bool(done) and all(each.after is not None for each in done)
    figure = "accuracy after training" if by_accuracy else f"mean reward of the last {_OVER_LAST} steps"
    values: dict[str, list[float]] = {}
    for each in done:
        values.setdefault(each.configuration, []).append((each.after if by_accuracy else each.reward) or 0.0)
    found = [Standing(configuration, own) for configuration, own in values.items()]
    return figure, sorted(found, key=lambda each: each.mean, reverse=True)


def verdict(members: Sequence[Ended]) -> str:
    """Which configuration to take, and which others can't be told from it."""
    figure, found = standings(members)
    if not found:
        return "no member has finished"
    best, *others = found
    lines = [f"take {best.configuration}: {figure} {best}"]
    level = [each for each in others if not _is_better(best, each)]
    if len(best.values) == 1:
        lines.append("it is of one member: train more seeds to know how sure that is (--over seed=0,1,2)")
    elif level:
        lines.append(f"can't be told from it: {'; '.join(f'{each.configuration} {each}' for each in level)}")
    elif others:
        lines.append("each other configuration is worse by more than chance (Welch's t test, 95%)")
    return "\n".join(lines)


def _is_better(best: Standing, other: Standing) -> bool:
    mean, half = difference(best, other)
    return mean > half


def difference(one: Standing, other: Standing) -> tuple[float, float]:
    """The difference of two means, and half of its 95% interval (Welch 1947); infinite for one member."""
    mean, counts = one.mean - other.mean, [len(one.values), len(other.values)]
    if min(counts) < 2:
        return mean, math.inf
    parts = [stdev(each.values) ** 2 / count for each, count in zip((one, other), counts, strict=True)]
    if not sum(parts):
        return mean, 0.0
    freedom = sum(parts) ** 2 / sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    return mean, quantile(freedom) * math.sqrt(sum(parts))
