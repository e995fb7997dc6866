"""Results of a sweep: its members, the ranking of its configurations, and confidence intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import mpmath
from upath import UPath

from rlora.run import directory
from rlora.sweeps.diary import DIARY, complete_lines, member_states
from rlora.sweeps.sweep import read_members
from rlora.telemetry.metrics import progress

OVER_LAST = 4  # number of last steps that a member's reward is averaged over
ACCURACY, NLL = "accuracy after training", "held-out log p per token after training"


@dataclass(frozen=True)
class MemberResult:
    """Progress and results of a member."""

    name: str
    configuration: str  # the member's changes as text, without the fields of `Halving.pool`
    changes: Mapping[str, Any]  # `Member.changes`
    status: str
    rewards: Sequence[float]  # `progress` of each step: the mean reward, if there are rewards
    initial_accuracy: float | None  # on held-out prompts, before training; None if not evaluated
    final_accuracy: float | None  # on held-out prompts or pairs, after training; None if not evaluated yet
    first: int = 0  # completed steps at the start: those of the version that a fork started from
    origin: str = ""  # name of the member that a fork started from; forks are configurations of their own
    final_nll: float | None = None  # of SFT, on held-out examples, after training

    @property
    def reward(self) -> float | None:
        """Mean reward of the last `OVER_LAST` steps; None before the first step."""
        return fmean(self.rewards[-OVER_LAST:]) if self.rewards else None

    def value(self, metric: str) -> float:
        """Return the value that members are compared by, higher is better. `metric` is from `metric_of`."""
        by_metric = {ACCURACY: self.final_accuracy, NLL: None if self.final_nll is None else -self.final_nll}
        return by_metric.get(metric, self.reward) or 0.0


@dataclass(frozen=True)
class Standing:
    """Result of a configuration: the values of its finished members."""

    configuration: str
    values: Sequence[float]  # per member: accuracy after training, or mean reward of the last steps

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return fmean(self.values)

    @property
    def half(self) -> float:
        """Half-width of the mean's 95% confidence interval over members (Student's t); infinite for one member."""
        count = len(self.values)
        return quantile(count - 1) * stdev(self.values) / math.sqrt(count) if count > 1 else math.inf

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"{self.mean:.3f} (one member)"
        low, high = self.mean - self.half, self.mean + self.half
        return f"{self.mean:.3f} (95% {low:.3f} to {high:.3f}, {len(self.values)} members)"


def quantile(freedom: float) -> float:
    """Return the 0.975 quantile of Student's t distribution with `freedom` degrees of freedom."""
    excess = lambda t: mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - 0.05  # noqa: E731
    return float(mpmath.findroot(excess, (1.5, 13.0), solver="anderson"))


def read_results(path: Path) -> list[MemberResult]:
    """Read the results of the sweep in the directory `path`, by member. Raises RloraError if there is no sweep."""
    members, pool = read_members(path)
    lines, results = complete_lines(path / DIARY), []
    states = member_states(lines)
    origins = {line["member"]: (line["of"], line["version"]) for line in lines if line["event"] == "forked"}
    for member in members:
        run = UPath(path / member.name)
        summary = directory.summary(run)
        label = ", ".join(f"{field} = {value}" for field, value in member.changes.items() if field not in pool)
        origin, first = origins.get(member.name, ("", 0))
        results.append(
            MemberResult(
                member.name, (label or "as given") + f", forked from {origin}@{first}" * bool(origin), member.changes,
                states[member.name].status if member.name in states else "waiting",
                [progress(line) or 0.0 for line in directory.figures(run)],
                summary.get("accuracy/before"), summary.get("accuracy/after", summary.get("held_out/accuracy/after")),
                first, origin, summary.get("held_out/nll/after"),
            )
        )  # fmt: skip
    return results


def metric_of(done: Sequence[MemberResult]) -> str:
    """Return the metric that finished members are compared by: the held-out accuracy or log-likelihood after training,
    or the mean reward if a member lacks both."""
    if done and all(member.final_accuracy is not None for member in done):
        return ACCURACY
    if done and all(member.final_nll is not None for member in done):
        return NLL
    return f"mean reward of the last {OVER_LAST} steps"


def standings(members: Sequence[MemberResult]) -> tuple[str, list[Standing]]:
    """Return the name of the metric that configurations are compared by, and their results, the best first.

    Only finished members count.
    """
    done = [member for member in members if member.status == "finished"]
    metric, values = metric_of(done), dict[str, list[float]]()
    for member in done:
        values.setdefault(member.configuration, []).append(member.value(metric))
    ranking = [Standing(configuration, results) for configuration, results in values.items()]
    return metric, sorted(ranking, key=lambda standing: standing.mean, reverse=True)


def verdict(members: Sequence[MemberResult]) -> str:
    """Return a text that names the best configuration, and the configurations that are not significantly worse."""
    metric, ranking = standings(members)
    if not ranking:
        return "no member has finished"
    best, *remaining = ranking
    lines = [f"best configuration {best.configuration}: {metric} {best}"]
    similar = [standing for standing in remaining if not _is_better(best, standing)]
    if len(best.values) == 1:
        lines.append("it has one member: train more seeds for a confidence interval (--over seed=0,1,2)")
        if several := next((standing for standing in remaining if len(standing.values) > 1), None):
            lines.append(f"best with several members: {several.configuration} {several}")
    elif similar:
        lines.append(f"not significantly worse: {'; '.join(f'{item.configuration} {item}' for item in similar)}")
    elif remaining:
        lines.append("every other configuration is significantly worse (Welch's t-test, 95%)")
    return "\n".join(lines)


def _is_better(a: Standing, b: Standing) -> bool:
    mean, half = difference(a, b)
    return mean > half


def difference(a: Standing, b: Standing) -> tuple[float, float]:
    """Return the mean of `a` minus the mean of `b`, and the half-width of the 95% confidence interval (Welch 1947).

    The half-width is infinite if `a` or `b` has only one member.
    """
    mean, counts = a.mean - b.mean, [len(a.values), len(b.values)]
    if min(counts) < 2:
        return mean, math.inf
    parts = [stdev(standing.values) ** 2 / count for standing, count in zip((a, b), counts, strict=True)]
    if not sum(parts):
        return mean, 0.0
    freedom = sum(parts) ** 2 / sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    return mean, quantile(freedom) * math.sqrt(sum(parts))
