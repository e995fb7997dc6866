"""Schedule of a sweep: the runs of each turn, and between turns the users' requests and successive halving."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlora.cluster.resources import slots_needed
from rlora.records import RloraError
from rlora.run.run import Run, reason
from rlora.run.turns import Turns, active, first, rounds
from rlora.sweeps.members import Member

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from rlora.sweeps.sweep import Sweep


class SweepTurns:
    """Turn rule (`rlora.run.turns`) of the members in `group`, which train together, based on `rounds` or `first`.

    `runs` is the list that the loop drives. Runs of new members are added to the list, and the run of a continued
    member replaces the member's previous run. Every decision is in the diary before the decision takes effect.
    """

    def __init__(self, sweep: "Sweep", group: Sequence[Member], runs: list[Run]) -> None:
        self.sweep, self.group, self.runs = sweep, list(group), runs
        self._noted: set[int] = set()  # ids of runs whose end is in the diary
        self._waiting: list[Member] = []  # members for which the engines have no slot yet
        self._actions = {"pause": self._pause, "go": self._go, "drop": self._drop, "fork": self._fork}

    def __call__(self, runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
        """Yield the runs of each turn, as soon as a turn is due. Handles requests and halving before each turn."""
        eligible: list[Run] = []
        turns = self.order(eligible)
        while True:
            self.note_ends()
            self.handle_requests()
            self.halve()
            self.begin_waiting()
            rung = self.sweep.next_rung(self.group)  # members at the rung wait until all have reached it
            eligible[:] = [run for run in active(self.runs) if rung is None or run.number < rung]
            due = next(turns, None)
            if due is None:
                return
            start = time.perf_counter()
            yield due
            self.sweep.display.turn(self.runs, due, time.perf_counter() - start)

    @property
    def order(self) -> Turns:
        """`first` if engines and learners have separate GPUs and can compute at the same time, otherwise `rounds`."""
        return first if self.runs[0].job.is_apart else rounds

    def note_ends(self) -> None:
        """Add members that failed or finished since the last call to the diary. Release their locks and trackers."""
        for run in self.runs:
            if id(run) in self._noted or run.is_open:
                continue
            self._noted.add(id(run))
            if run.failure:
                self.sweep.diary.note("failed", run.policy, run.number, why=reason(run.failure))
            elif run.number >= run.config.steps:
                self.sweep.diary.note("finished", run.policy, run.number)
            self.sweep.release(run.policy, run.failure)

    def handle_requests(self) -> None:
        """Carry out the requests since the last turn. An impossible request causes a warning and an event `refused`."""
        for number, request in self.sweep.requests():
            with self.sweep.refusing(number, request):
                self._actions[request["what"]](number, request)

    def halve(self) -> None:
        """Drop the worse configurations at a rung of `Halving`, once every active member has reached the rung."""
        rung = self.sweep.next_rung(self.group)
        if rung is None or any(run.number < rung for run in active(self.runs)):
            return
        runs = [run for run in active(self.runs) if run.number >= rung]
        members = [self.sweep.members[run.policy] for run in runs]
        lines = {run.policy: run.figures for run in runs}
        dropped = self.sweep.halving.dropped(rung, members, lines)
        self.sweep.diary.note(
            "halved", at=rung, dropped=dropped, kept=[m.name for m in members if m.name not in dropped]
        )
        for run in runs:
            if run.policy in dropped:
                self._leave(run)

    def begin_waiting(self) -> None:
        """Begin waiting members for which the engines have free slots."""
        for member in list(self._waiting):
            taken = sum(slots_needed(run.config) for run in self.runs if run.is_open)
            if taken + slots_needed(member.config) <= self.runs[0].job.slots:
                self._waiting.remove(member)
                self._begin(member)

    # --- requests, named by the field `what` of wanted.jsonl ---

    def _pause(self, number: int, request: Mapping[str, Any]) -> None:
        run = self._running(request["member"])
        self.sweep.diary.note("paused", run.policy, run.number, why="requested", request=number)
        self._leave(run)

    def _drop(self, number: int, request: Mapping[str, Any]) -> None:
        run = next((run for run in active(self.runs) if run.policy == request["member"]), None)
        self.sweep.diary.note("dropped", request["member"], run.number if run else 0, why="requested", request=number)
        self._waiting = [member for member in self._waiting if member.name != request["member"]]
        if run:
            self._leave(run)

    def _go(self, number: int, request: Mapping[str, Any]) -> None:
        member = self.sweep.members[request["member"]]
        self._check_group(member)
        self.sweep.diary.note("went on", member.name, request=number)
        self._waiting.append(member)

    def _fork(self, number: int, request: Mapping[str, Any]) -> None:
        self._check_group(self.sweep.members[request["member"]])
        member = self.sweep.note_fork(number, request, self.runs[0].job.config)
        self.group.append(member)
        self._waiting.append(member)

    def _running(self, name: str) -> Run:
        for run in active(self.runs):
            if run.policy == name:
                return run
        raise RloraError(f"{name}: only a member in training can be paused; repeat the request when this member trains")

    def _check_group(self, member: Member) -> None:
        """Raise RloraError if the member is not in this group, so that the processes may not fit the member."""
        if member.name not in {peer.name for peer in self.group}:
            raise RloraError(
                f"{member.name}: the member is not in the group that trains now; repeat the request when the group of "
                "this member trains. If the member was paused when the sweep was resumed, stop the sweep, repeat the "
                "request, and resume the sweep with `rlora sweep --resume`"
            )

    def _begin(self, member: Member) -> None:
        """Open a member's run, in place of the member's previous run."""
        try:
            run = self.sweep.open_member(member)
        except (RloraError, OSError) as error:
            self.sweep.diary.note("failed", member.name, why=str(error))
            _log.warning(f"{member.name}: {error}")
            return
        self.sweep.diary.note("began", member.name, run.number)
        self.runs[:] = [previous for previous in self.runs if previous.policy != member.name] + [run]
        job = self.runs[0].job
        with run.isolated():
            job.join(run.served)
            run.begin(job)

    def _leave(self, run: Run) -> None:
        run.leave()
        self._noted.add(id(run))
        self.sweep.release(run.policy)
