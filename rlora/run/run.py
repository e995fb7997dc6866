"""A run: everything that belongs to one policy, and what a step of the loop does with it."""

import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from upath import UPath

from rlora.core.setup import Setup
from rlora.records import Adapter, Cursor, Group, Proof, RloraError, UpdateStats
from rlora.rollout.fleet import Fleet
from rlora.rollout.player import AgentLoop
from rlora.rollout.stream import Collection, Rollouts
from rlora.rollout.task import Served, Task
from rlora.run import directory
from rlora.run.checkpoint import Bundle
from rlora.run.directory import warn
from rlora.run.evaluation import HeldOut
from rlora.run.health import Health, refuse_to_go_on
from rlora.run.resume import cursor_for, describe
from rlora.run.writer import Saver
from rlora.settings import Config
from rlora.telemetry.metrics import Metrics


class Observer(Protocol):
    """Receives the figures of each training step, for example to forward them to a tracker.

    An exception raised by an observer is reported as a warning and does not end the run.
    """

    def on_step(self, run: "Run", figures: Mapping[str, Any]) -> None:
        """`figures` is the step's line of metrics.jsonl."""
        ...


class Callback:
    """An observer that calls a function with the figures of each step."""

    def __init__(self, function: Callable[[Mapping[str, Any]], object]) -> None:
        self.function = function

    def on_step(self, run: "Run", figures: Mapping[str, Any]) -> None:
        """Call it."""
        self.function(figures)


class RunLearner(Protocol):
    """What a run asks of its learner."""

    def open(self, policy: str, setup: Setup, saved: bytes | None = None) -> Adapter: ...
    def start_update(self, policy: str, groups: Sequence[Group]) -> Callable[[], tuple[Adapter, UpdateStats]]: ...
    def state(self, policy: str) -> bytes: ...
    def close(self, policy: str) -> None: ...


class Job(Protocol):
    """What a run asks of the job that it is in."""

    @property
    def fleet(self) -> Fleet: ...
    @property
    def learners(self) -> Mapping[str, RunLearner]: ...
    @property
    def loops(self) -> Mapping[str, AgentLoop]: ...
    @property
    def slots(self) -> int: ...  # versions that engines hold at a time
    @property
    def is_apart(self) -> bool: ...  # whether engines and learners have cards of their own
    def join(self, served: Served) -> None: ...
    def leave(self, policy: str) -> None: ...


class Run:
    """One policy's training: its config, task, directory, stream of groups, bundles, figures and failure.

    `place` is the directory that `directory.create` made; its name is the policy's, and unique in the job. `start` is
    the bundle to go on from. What a run leaves in its directory: bundles/<number>/, all that a run goes on from, with
    the adapter in PEFT's format; metrics.jsonl, a line a step; summary.json.
    """

    def __init__(
        self, config: Config, task: Task, setup: Setup, place: UPath, start: Bundle | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:  # fmt: skip
        self.config, self.task, self.setup, self.place, self.observers = config, task, setup, place, tuple(observers)
        self.policy, self.start = place.name, start
        self.failure: BaseException | None = None
        self.adapter: Adapter | None = None  # the current version, once the run has begun
        self._open = ExitStack()
        self.together = False  # whether others train beside it
        self.is_quiet = False  # whether something else shows its steps
        self._left = False
        self._engines: int | None = None  # that it has asked for
        self._proofs: list[Proof] = []
        self._collection: Collection
        self._updated: Callable[[], tuple[Adapter, UpdateStats]]

    @property
    def served(self) -> Served:
        """What engines sample for it."""
        return Served(self.policy, self.config, self.task, self.number)

    @property
    def number(self) -> int:
        """Of the current version: the steps that are done."""
        if self.adapter is None:
            return self.start.version if self.start else 0
        return self.adapter.number

    @property
    def figures(self) -> Sequence[Mapping[str, Any]]:
        """Of each step that is done; metrics.jsonl has them once they are written, which may be later."""
        return self.health.lines

    @property
    def going(self) -> bool:
        """Whether there are steps left, nothing has failed, and it was not left."""
        return self.is_here and self.number < self.config.steps

    @property
    def is_here(self) -> bool:
        """Whether it has not failed, and was not left."""
        return not (self.failure or self._left)

    @property
    def is_done(self) -> bool:
        """Whether it has done its last step, and is not at its end yet."""
        return self.is_here and not self.going

    @property
    def due(self) -> bool:
        """Whether `collect` would not wait: the step's groups are there."""
        return self.stream.due

    def begin(self, job: Job) -> None:
        """Open the policy, from its bundle or fresh; have its accuracy measured, and the first prompts sampled."""
        self.job, self.fleet, self.learner = job, job.fleet, job.learners[self.policy]
        config, start, place = self.config, self.start, self.place
        origin = directory.Origin.here(place, self.task)
        self.saver = self._open.enter_context(Saver(place, config, origin, start))
        self.metrics = self._open.enter_context(
            Metrics(config.steps, self.policy if self.together else "", self.is_quiet)
        )
        self.adapter = self.learner.open(self.policy, self.setup, start.state if start else None)
        directory.keep_config(place, config)  # now that all of it is found to work
        if not start:
            self.saver.save(self.adapter, self.learner.state(self.policy), Cursor())
        self.health = Health(config, directory.figures(place))
        fleet, loop = job.fleet, job.loops[self.policy]
        self.held_out = HeldOut(config, place, self.task, origin.first, fleet, loop, self.metrics.tell)
        cursor = cursor_for(config, start, origin) if start else Cursor()
        self.stream = Rollouts(config, self.task.prompts, fleet, loop, cursor)
        self.metrics.start(self.number, fleet.stats())
        self.held_out.resume(self.number)
        self.deliver()

    def collect(self) -> None:
        """Wait for the step's groups, in the order in which their prompts were sent."""
        with self.metrics.timed("wait"):
            self._collection = self.stream.take(self.number)

    def start_update(self) -> None:
        """Hand the step's groups to the learner."""
        self._updated = self.learner.start_update(self.policy, self._collection.groups)

    def finish_update(self) -> None:
        """Wait for the next version. Log a line of figures, and have a bundle written in the background."""
        with self.metrics.timed("update"):
            adapter, update = self._updated()
        step, metrics, saver, self.adapter = self.number, self.metrics, self.saver, adapter
        collection, fleet = self._collection, self.fleet.stats()
        others = self.held_out.figures(adapter.number)
        figures = metrics.log(step, self._proofs, collection, update, fleet, saver.saved, adapter, others)
        ills = self._look_after(figures)
        line = json.dumps(figures | {f"health/{name}": self.health.holding[name] for name in ills})
        with metrics.timed("save"):
            saver.save(adapter, self.learner.state(self.policy), self.stream.cursor, collection, line)
        for observer in self.observers:
            self._tell(observer, json.loads(line))
        self.held_out.refuse()
        refuse_to_go_on(self.config, update)
        self.health.refuse(ills)

    def deliver(self) -> None:
        """Deliver the current version to every engine, proven; have the next prompts sampled under it, or after the
        last step the held-out ones."""
        if (engines := directory.wanted_engines(self.place)) and engines != self._engines:
            self.fleet.resize(engines)
            self._engines = engines
        oldest = self.number - self.config.max_staleness
        with self.metrics.timed("swap"):
            self._proofs = self.fleet.swap(self.current, oldest, self.held_out.version)
        if self.going:
            self.stream.send(self.number)
        self.held_out.start(self.current)

    def end(self) -> None:
        """Wait for the accuracy after training, write the summary, and leave learner and engines to others."""
        self.held_out.end()
        directory.summarise(self.place, describe(self.place, self.current) | self.metrics.totals())
        self.leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What fails within ends this run, and no other."""
        try:
            with directory.keeping_unscored(self.place):
                yield
        except Exception as error:
            self.failure = error
            if self.together:  # alone, it raises the error at once
                warn(f"{self.policy} failed after {self.number} steps, and the others go on\n{_told(error)}")
            self.leave()

    def leave(self) -> None:
        """Write what is not written yet, and leave the learner and the engines to others."""
        self._left = True
        self.close(self.failure)
        if self.adapter:
            self.job.leave(self.policy)

    def close(self, error: BaseException | None = None) -> None:
        """Write what is not written yet; `error` is what ends the run, where it is not at its end."""
        try:
            self._open.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except Exception as another:
            self.failure = self.failure or another

    @property
    def current(self) -> Adapter:
        """The current version, once the run has begun."""
        assert self.adapter
        return self.adapter

    def _look_after(self, figures: Mapping[str, Any]) -> dict[str, str]:
        """Return the rules of health that hold now. What holds since this step is told, and noted in the summary."""
        before = set(self.health.holding)
        ills = self.health.look(figures)
        for name in ills.keys() - before:
            warn(f"{self.policy}, step {self.number}: {name}: {ills[name]}")
        if ills.keys() - before:
            directory.summarise(self.place, {"health": self.health.fired})
        return ills

    def _tell(self, observer: Observer, figures: Mapping[str, Any]) -> None:
        try:
            observer.on_step(self, figures)
        except Exception as error:
            what = f"{type(observer).__name__}.on_step raised {type(error).__name__}: {error}"
            warn(f"{self.policy}: {what}; training goes on")


@contextmanager
def kept(runs: Sequence[Run]) -> Iterator[None]:
    """Have each run's last bundle written, whatever ends the job. What ended a run is raised at the end."""
    for run in runs:
        run.together |= len(runs) > 1
    try:
        yield
    except BaseException as error:
        with ExitStack() as stack:  # all of them, also where one is interrupted
            for run in runs:
                stack.callback(run.close, error)
        raise
    _raise_failures(runs)


def _raise_failures(runs: Sequence[Run]) -> None:
    """Raise what ended a lone run; of several which failed, and why."""
    failed = [run for run in runs if run.failure is not None]
    if not failed:
        return
    if len(runs) == 1:
        assert failed[0].failure
        raise failed[0].failure
    reasons = "\n".join(f"{run.policy}, after {run.number} steps: {reason(run.failure)}" for run in failed)
    raise RloraError(f"{len(failed)} of {len(runs)} runs failed:\n{reasons}") from failed[0].failure


def reason(error: BaseException | None) -> str:
    """Return what an error says, with its type unless its message explains it."""
    return str(error) if isinstance(error, RloraError) else f"{type(error).__name__}: {error}"


def _told(error: Exception) -> str:
    """An error that its message explains, or a traceback."""
    return str(error) if isinstance(error, RloraError) else "".join(traceback.format_exception(error))
