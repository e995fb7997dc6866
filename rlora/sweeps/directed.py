"""The turns of a sweep: who is due, and between two turns what was asked for, and what halving decides."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlora.cluster import versions_of
from rlora.records import RloraError
from rlora.run import directory
from rlora.run.run import Run, reason
from rlora.run.turns import Turns, first, going, rounds
from rlora.sweeps.members import Member

if TYPE_CHECKING:
    from rlora.sweeps.sweep import Sweep


class Directed:
    """`Turns` over the runs of members that train together, in the order of `rounds` or `first`.

    `runs` is the list that the loop drives: members join it, and one that goes on takes the place of the run that it
    was. Every decision is in the diary before it takes effect.
    """

    def __init__(self, sweep: "Sweep", group: Sequence[Member], runs: list[Run]) -> None:
        self.sweep, self.group, self.runs = sweep, list(group), runs
        self._noted: set[int] = set()  # runs whose end is in the diary
        self._waiting: list[Member] = []  # that find no slot yet

    def __call__(self, runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
        """What is asked between two turns decides who is due in the next."""
        active: list[Run] = []
        turns = self.order(active)
        while True:
            self.note_ends()
            self.answer()
            self.halve()
            self.admit()
            rung = self.sweep.rung_of(self.group)  # those that have come to it wait for the others
            active[:] = [run for run in going(self.runs) if rung is None or run.number < rung]
            due = next(turns, None)
            if due is None:
                return
            start = time.perf_counter()
            yield due
            self.sweep.display.turn(self.runs, due, time.perf_counter() - start)

    @property
    def order(self) -> Turns:
        """`first` where engines and learners have cards of their own, so that both can be busy."""
        return first if self.runs[0].job.is_apart else rounds

    def note_ends(self) -> None:
        """Write down which members have failed or finished since."""
        for run in self.runs:
            if id(run) in self._noted or run.is_here:
                continue
            self._noted.add(id(run))
            if run.failure:
                self.sweep.diary.note("failed", run.policy, run.number, why=reason(run.failure))
            elif run.number >= run.config.steps:
                self.sweep.diary.note("finished", run.policy, run.number)
            self.sweep.let_go(run.policy, run.failure)

    def answer(self) -> None:
        """Do what was asked for since the turn before. What can't be done is refused, with the reason in the diary."""
        for number, asked in self.sweep.asked():
            try:
                getattr(self, f"_{asked['what']}")(number, asked)
            except (RloraError, OSError, LookupError) as error:
                self.sweep.diary.note("refused", asked["member"], why=str(error), request=number)
                directory.warn(f"{asked['what']} {asked['member']}: {error}")

    def halve(self) -> None:
        """At a rung, once every member that goes on has come to it, drop the lesser configurations."""
        rung = self.sweep.rung_of(self.group)
        if rung is None or any(run.number < rung for run in going(self.runs)):
            return
        there = [run for run in going(self.runs) if run.number >= rung]
        members = [self.sweep.members[run.policy] for run in there]
        lines = {run.policy: run.figures for run in there}
        dropped = self.sweep.halving.dropped(rung, members, lines)
        self.sweep.diary.note(
            "halved", at=rung, dropped=dropped, kept=[m.name for m in members if m.name not in dropped]
        )
        for run in there:
            if run.policy in dropped:
                self._leave(run)

    def admit(self) -> None:
        """Begin the members for which there is a slot by now."""
        for member in list(self._waiting):
            taken = sum(versions_of(run.config) for run in self.runs if run.is_here)
            if taken + versions_of(member.config) <= self.runs[0].job.slots:
                self._waiting.remove(member)
                self._begin(member)

    # --- what can be asked for ---

    def _pause(self, number: int, asked: Mapping[str, Any]) -> None:
        run = self._running(asked["member"])
        self.sweep.diary.note("paused", run.policy, run.number, why="asked for", request=number)
        self._leave(run)

    def _drop(self, number: int, asked: Mapping[str, Any]) -> None:
        run = next((run for run in going(self.runs) if run.policy == asked["member"]), None)
        self.sweep.diary.note("dropped", asked["member"], run.number if run else 0, why="asked for", request=number)
        if run:
            self._leave(run)

    def _go(self, number: int, asked: Mapping[str, Any]) -> None:
        member = self.sweep.members[asked["member"]]
        self._of_this_group(member)
        self.sweep.diary.note("went on", member.name, request=number)
        self._waiting.append(member)

    def _fork(self, number: int, asked: Mapping[str, Any]) -> None:
        member = self.sweep.forked(asked)
        self._of_this_group(self.sweep.members[asked["member"]])
        facts = {"of": asked["member"], "version": asked["version"], "changes": asked["changes"]}
        self.sweep.diary.note("forked", member.name, asked["version"], request=number, **facts)
        self.sweep.members[member.name] = member
        self.group.append(member)
        self._waiting.append(member)

    def _running(self, name: str) -> Run:
        for run in going(self.runs):
            if run.policy == name:
                return run
        raise RloraError(f"{name}: it does not train now")

    def _of_this_group(self, member: Member) -> None:
        if member.name not in {each.name for each in self.group}:
            raise RloraError(
                f"{member.name}: it shares no process with those that train now; it trains in its own turn"
            )

    def _begin(self, member: Member) -> None:
        """Open a member's run, in the place of the one that it was."""
        try:
            run = self.sweep.opened(member)
        except (RloraError, OSError) as error:
            self.sweep.diary.note("failed", member.name, why=str(error))
            directory.warn(f"{member.name}: {error}")
            return
        self.sweep.diary.note("began", member.name, run.number)
        self.runs[:] = [each for each in self.runs if each.policy != member.name] + [run]
        job = self.runs[0].job
        with run.alone():
            job.join(run.served)
            run.begin(job)

    def _leave(self, run: Run) -> None:
        run.leave()
        self._noted.add(id(run))
        self.sweep.let_go(run.policy)
