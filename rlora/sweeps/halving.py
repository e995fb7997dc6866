"""Successive halving: at a few steps the better part of the configurations goes on, and the others are dropped.

Li et al. 2018, "Hyperband", JMLR 18(185), algorithm "SuccessiveHalving". What is halved are configurations, each by the
mean over its seeds, and never single runs: a run's reward scatters by its seed (Eimer et al. 2023, arXiv:2306.01324).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from rlora.records import RloraError
from rlora.sweeps.members import Member


@dataclass(frozen=True)
class Halving:
    """When configurations are dropped, how many stay, and by what."""

    at: tuple[int, ...] = ()  # steps, the rungs
    keep: float = 0.5  # share of the configurations that goes on, rounded up
    by: str = "reward/mean"  # a figure of metrics.jsonl, the higher the better
    over_last: int = 4  # steps that it is averaged over
    pool: tuple[str, ...] = ("seed",)  # fields by which members are repetitions of one configuration

    @staticmethod
    def of(table: Mapping[str, Any]) -> "Halving":
        """Of a table of a TOML file. Raises RloraError for a field that there is not."""
        given: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
        try:
            return Halving(**given)
        except TypeError as error:
            there = ", ".join(each.name for each in fields(Halving))
            raise RloraError(f"halving: {error}; there are {there}") from None

    def check(self, members: Sequence[Member]) -> None:
        """Raise RloraError for what can't be done."""
        if not self.at:
            return
        fewest = min(members, key=lambda each: each.config.steps)
        for rung in self.at:
            if not 0 < rung < fewest.config.steps:
                raise RloraError(
                    f"--halve-at {rung}: {fewest.name} has steps = {fewest.config.steps}; give steps between 0 and that"
                )
        if list(self.at) != sorted(set(self.at)):
            raise RloraError(f"--halve-at {','.join(map(str, self.at))}: give steps that increase")
        if not 0 < self.keep < 1:
            raise RloraError(f"--keep {self.keep:g}: give a share between 0 and 1, such as 0.5")
        if self.over_last < 1:
            raise RloraError(f"halving.over_last = {self.over_last}: give 1 or more")
        if len({each.configuration(self.pool) for each in members}) < 2:
            pooled = ", ".join(self.pool)
            raise RloraError(
                f"--halve-at: the members differ in {pooled} only, so they are one configuration, and there is nothing "
                "to choose between; leave it out, or add an axis"
            )

    def dropped(
        self, rung: int, members: Sequence[Member], lines: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> list[str]:
        """The names of the members that are dropped at a rung; configurations that are level with one that stays, stay.

        `lines` has each member's lines of metrics.jsonl.
        """
        found: dict[str, list[float]] = {}
        for each in members:
            values = self.values(rung, lines[each.name])
            found.setdefault(each.configuration(self.pool), []).append(fmean(values) if values else -math.inf)
        scores = {configuration: fmean(values) for configuration, values in found.items()}
        ordered = sorted(scores.values(), reverse=True)
        least = ordered[math.ceil(self.keep * len(ordered)) - 1]
        return [each.name for each in members if scores[each.configuration(self.pool)] < least]

    def values(self, rung: int, lines: Iterable[Mapping[str, Any]]) -> list[float]:
        """The last values of the figure before a rung."""
        values = [line[self.by] for line in lines if line["step"] < rung and line.get(self.by) is not None]
        return values[-self.over_last :]
