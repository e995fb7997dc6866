"""Successive halving: at some steps the better configurations continue, and the worse ones are dropped.

Li et al. 2018, "Hyperband", JMLR 18(185), algorithm "SuccessiveHalving". Compares configurations by the mean over their
seeds, never single runs, because rewards vary with the seed (Eimer et al. 2023, arXiv:2306.01324).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from rlora.records import RloraError
from rlora.sweeps.members import Member
from rlora.telemetry.metrics import progress


@dataclass(frozen=True)
class Halving:
    """Rule of successive halving: when configurations are dropped, how many remain, and by which metric.

    A rung is a step at which configurations are dropped.
    """

    at: tuple[int, ...] = ()  # the rungs, in increasing order; empty: nothing is dropped
    keep: float = 0.5  # share of the configurations that continues, rounded up
    by: str = ""  # metric of metrics.jsonl, higher is better; -held_out/nll: lower is better; "": `progress`
    over_last: int = 4  # number of steps that the metric is averaged over
    pool: tuple[str, ...] = ("seed",)  # members that differ only in these fields have one configuration

    @staticmethod
    def of(table: Mapping[str, Any]) -> "Halving":
        """Build the rule from a table of a TOML file. Raises RloraError for an unknown field."""
        values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
        try:
            return Halving(**values)
        except TypeError as error:
            names = ", ".join(field.name for field in fields(Halving))
            raise RloraError(f"halving: {error}; use only the fields {names}") from None

    def check(self, members: Sequence[Member]) -> None:
        """Raise RloraError if the rule is invalid for the members."""
        if not self.at:
            return
        fewest = min(members, key=lambda member: member.config.steps)
        for rung in self.at:
            if not 0 < rung < fewest.config.steps:
                raise RloraError(
                    f"--halve-at {rung}: {fewest.name} has steps = {fewest.config.steps}, and members must be dropped "
                    f"before that step; use steps from 1 to {fewest.config.steps - 1}"
                )
        if list(self.at) != sorted(set(self.at)):
            increasing = ",".join(map(str, sorted(set(self.at))))
            raise RloraError(
                f"--halve-at {','.join(map(str, self.at))}: each step must be larger than the step before; use "
                f"--halve-at {increasing}"
            )
        if not 0 < self.keep < 1:
            raise RloraError(
                f"--keep {self.keep:g}: some configurations must continue, and some must not; use a share above 0 and "
                "below 1, such as 0.5"
            )
        if self.over_last < 1:
            raise RloraError(
                f"halving.over_last = {self.over_last}: the metric is a mean over this number of steps; use 1 or more"
            )
        if len({member.configuration(self.pool) for member in members}) < 2:
            pooled = ", ".join(self.pool)
            raise RloraError(
                f"--halve-at: the members differ in {pooled} only, so there is only one configuration; remove "
                "--halve-at, or add an axis, as in --over learner.rank=1,8"
            )

    def dropped(
        self, rung: int, members: Sequence[Member], lines: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> list[str]:
        """Return the names of the members that are dropped at a rung.

        The share `keep` of the configurations remains, and those with the same mean as the worst that remains.

        `lines` has each member's lines of metrics.jsonl, by name.
        """
        means: dict[str, list[float]] = {}  # of each member, by configuration
        for member in members:
            values = self.values(rung, lines[member.name])
            means.setdefault(member.configuration(self.pool), []).append(fmean(values) if values else -math.inf)
        scores = {configuration: fmean(values) for configuration, values in means.items()}
        ordered = sorted(scores.values(), reverse=True)
        threshold = ordered[math.ceil(self.keep * len(ordered)) - 1]
        return [member.name for member in members if scores[member.configuration(self.pool)] < threshold]

    def values(self, rung: int, lines: Iterable[Mapping[str, Any]]) -> list[float]:
        """Return the last `over_last` values of the metric before a rung, from lines of metrics.jsonl."""
        values = [self._value(line) for line in lines if line["step"] < rung]
        return [value for value in values if value is not None][-self.over_last :]

    def _value(self, line: Mapping[str, Any]) -> float | None:
        if not self.by:
            return progress(line)
        value = line.get(self.by.removeprefix("-"))
        return -value if value is not None and self.by.startswith("-") else value
