"""A run: the state of one policy's training, and the parts of a step that the loop calls."""

import json
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor
from upath import UPath

from rlora.core.learner import Groups
from rlora.core.setup import Setup
from rlora.records import Adapter, Group, Receipt, RloraError, UpdateStats
from rlora.rollout.cursor import Cursor
from rlora.rollout.examples import Examples
from rlora.rollout.fleet import Fleet
from rlora.rollout.player import AgentLoop
from rlora.rollout.stream import Collection, Rollouts
from rlora.rollout.task import ServedPolicy, Task
from rlora.run import checkpoint, directory
from rlora.run.checkpoint import Bundle
from rlora.run.evaluation import HeldOut
from rlora.run.health import Health, check_updates
from rlora.run.held_out_loss import HeldOutLoss
from rlora.run.resume import cursor_for, describe
from rlora.run.writer import CheckpointWriter
from rlora.settings import Config
from rlora.telemetry.metrics import Metrics
from rlora.telemetry.weights import Weights, weights_line

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Receives the metrics of each training step, for example to forward them to a tracker.

    An exception in an observer is reported as a warning and does not end the run.
    """

    def on_step(self, run: "Run", figures: Mapping[str, Any]) -> None:
        """Called after each step of `run`, which waits until this method returns.

        `figures` is the step's line of metrics.jsonl.
        """
        ...


class Callback:
    """An observer that calls a function with the metrics of each step."""

    def __init__(self, function: Callable[[Mapping[str, Any]], object]) -> None:
        self.function = function

    def on_step(self, run: "Run", figures: Mapping[str, Any]) -> None:
        """Call the function with `figures`."""
        self.function(figures)


class RunLearner(Protocol):
    """Methods of a learner that a run calls. `rlora.cluster.ranks.Ranks` implements this protocol."""

    def open(self, policy: str, setup: Setup, saved: bytes | None = None) -> Adapter: ...
    def base_norms(self, policy: str) -> dict[str, float]: ...
    def start_update(self, policy: str, groups: Sequence[Group]) -> Callable[[], tuple[Adapter, UpdateStats]]: ...
    def forward(self, policy: str, groups: Groups, reference: bool = False) -> list[list[Tensor]]: ...
    def state(self, policy: str) -> bytes: ...
    def close(self, policy: str) -> None: ...


class Stream(Protocol):
    """Gives each step its groups. `Rollouts` samples them, `Examples` takes them from a data set."""

    @property
    def cursor(self) -> Cursor: ...
    @property
    def pending(self) -> list[Future[Group]]: ...
    @property
    def due(self) -> bool: ...
    def send(self, version: int) -> None: ...
    def take(self, version: int) -> Collection: ...


class Job(Protocol):
    """Attributes and methods of a job that a run uses. `rlora.cluster.Job` implements this protocol."""

    @property
    def fleet(self) -> Fleet: ...
    @property
    def learners(self) -> Mapping[str, RunLearner]: ...
    @property
    def loops(self) -> Mapping[str, AgentLoop]: ...
    @property
    def config(self) -> Config: ...  # with which the processes started
    @property
    def slots(self) -> int: ...  # number of versions that each engine can keep loaded
    @property
    def is_apart(self) -> bool: ...  # whether engines and learners have separate devices
    def join(self, served: ServedPolicy) -> None: ...
    def leave(self, policy: str) -> None: ...


class Run:
    """One policy's training: config, task, directory, stream of groups, bundles, metrics and failure.

    `path` is the directory that `directory.create` made; the name of the directory is the policy's name, unique in the
    job. `task` has the prompts and rewards, `setup` the learner's settings. `start` is the bundle to resume from.
    `observers` receive the metrics of each step. The loop (`train.drive`) calls `begin`; for each step `collect`,
    `start_update`, `finish_update` and `deliver`; then `end`. These methods raise the errors that end the run.
    Files: bundles/<version>/ (see `rlora.run.checkpoint`), metrics.jsonl with one line per step, summary.json.
    """

    def __init__(
        self, config: Config, task: Task, setup: Setup, path: UPath, start: Bundle | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:  # fmt: skip
        self.config, self.task, self.setup, self.path, self.observers = config, task, setup, path, tuple(observers)
        self.policy, self.start = path.name, start
        self.failure: BaseException | None = None
        self.adapter: Adapter | None = None  # the current version; None before `begin`
        self._open = ExitStack()
        self.has_peers = False  # whether other runs train in the same job
        self.is_quiet = False  # whether to print no progress lines
        self._has_left = False
        self._engines: int | None = None  # the number that was requested last
        self._receipts: list[Receipt] = []
        self._collection: Collection
        self._await_update: Callable[[], tuple[Adapter, UpdateStats]]

    @property
    def served(self) -> ServedPolicy:
        """The policy with config, task and the number of its current version, as `cluster.start` expects it."""
        return ServedPolicy(self.policy, self.config, self.task, self.number)

    @property
    def number(self) -> int:
        """Number of the current version, which is the number of completed steps."""
        if self.adapter is None:
            return self.start.version if self.start else 0
        return self.adapter.number

    @property
    def figures(self) -> Sequence[Mapping[str, Any]]:
        """The metrics of each step so far. metrics.jsonl is written in the background, so the file can lag behind."""
        return self.health.lines

    @property
    def is_active(self) -> bool:
        """Whether the run is in the job, has not failed and has steps left."""
        return self.is_open and self.number < self.config.steps

    @property
    def is_open(self) -> bool:
        """Whether the run is in the job and has not failed."""
        return not (self.failure or self._has_left)

    @property
    def is_done(self) -> bool:
        """Whether the run has done its last step but `end` has not been called yet."""
        return self.is_open and not self.is_active

    @property
    def due(self) -> bool:
        """Whether `collect` returns without waiting: the groups are complete, or the time for late groups is over."""
        return self.stream.due

    def begin(self, job: Job) -> None:
        """Open the policy on the learner, new or from its bundle, and `deliver` its version.

        Blocks until the engines have verified the version. Raises RloraError, for example if the adapter does not fit.
        """
        self.job, self.fleet, self.learner = job, job.fleet, job.learners[self.policy]
        config, start, path = self.config, self.start, self.path
        origin = directory.Provenance.current(path, self.task)
        self.writer = self._open.enter_context(CheckpointWriter(path, config, origin, start))
        self.metrics = self._open.enter_context(
            Metrics(config.steps, self.policy if self.has_peers else "", self.is_quiet)
        )
        self.adapter = self.learner.open(self.policy, self.setup, start.state if start else None)
        directory.update_config(path, config)  # only now, after all checks of the new config
        if not start:
            self.writer.save(self.adapter, self.learner.state(self.policy), Cursor())
        self.weights = Weights(self.learner.base_norms(self.policy), checkpoint.adapters(path, self.adapter))
        directory.write_matrices(path, self.weights.base_norms)
        self.health = Health(config, directory.figures(path))
        fleet, loop, task = job.fleet, job.loops[self.policy], self.task
        cursor = cursor_for(config, start, origin) if start else Cursor()
        self.stream: Stream
        self.held_out: HeldOut | HeldOutLoss
        if task.examples:
            self.stream = Examples(config, task.examples, cursor)
            self.held_out = HeldOutLoss(config, path, task, origin.first, self.learner, self.metrics.log_line)
        else:
            self.stream = Rollouts(config, task.prompts, fleet, loop, cursor)
            self.held_out = HeldOut(config, path, task, origin.first, fleet, loop, self.metrics.log_line)
        self.metrics.start(self.number, fleet.stats())
        self.held_out.resume(self.number)
        self.deliver()

    def collect(self) -> None:
        """Wait for the step's groups, in the order in which their prompts were sent.

        Raises RewardError if the reward functions fail, and RloraError if no engine is left.
        """
        with self.metrics.timed("wait"):
            self._collection = self.stream.take(self.number)

    def start_update(self) -> None:
        """Start the learner's update on the step's groups, without blocking. `finish_update` raises its errors."""
        self._await_update = self.learner.start_update(self.policy, self._collection.groups)

    def finish_update(self) -> None:
        """Wait for the new version, log the step's metrics, and write a bundle in the background.

        Also blocks while the previous bundle is being written, and calls the observers. Raises RewardError if an
        evaluation failed, and RloraError for too many skipped updates, a rule of `health.stop` or failing writes.
        """
        with self.metrics.timed("update"):
            adapter, update = self._await_update()
        step, metrics, writer, self.adapter = self.number, self.metrics, self.writer, adapter
        collection, fleet = self._collection, self.fleet.stats()
        moved, matrices = self.weights.measure(adapter)
        extra = self.held_out.figures(adapter.number) | moved
        figures = metrics.log(step, self._receipts, collection, update, fleet, writer.saved, adapter, extra)
        remedies = self._check_health(figures)
        line = json.dumps(figures | {f"health/{name}": self.health.holding[name] for name in remedies})
        with metrics.timed("save"):
            state, cursor = self.learner.state(self.policy), self.stream.cursor
            writer.save(adapter, state, cursor, collection, line, weights_line(step, matrices), update.trained)
        for observer in self.observers:
            self._notify(observer, json.loads(line))
        self.held_out.check_rewards()
        check_updates(self.config, update)
        self.health.check_stop(remedies)

    def deliver(self) -> None:
        """Deliver the current version to every engine, and wait until the engines have verified the version.

        Then send the next prompts, and start an evaluation if the version is due for one, without waiting for results.
        Raises DeliveryError if an engine serves something else, and RloraError if no engine is left.
        """
        if (engines := directory.requested_engines(self.path)) and engines != self._engines:
            self.fleet.resize(engines)
            self._engines = engines
        oldest = self.number - self.config.max_staleness
        with self.metrics.timed("swap"):
            self._receipts = self.fleet.swap(self.current, oldest, self.held_out.version)
        if self.is_active:
            self.stream.send(self.number)
        self.held_out.start(self.current)

    def end(self) -> None:
        """Wait for the evaluation after training, write the summary and leave the job. Raises RewardError."""
        self.held_out.end()
        directory.summarise(self.path, describe(self.path, self.current) | self.metrics.totals())
        self.leave()

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """End this run, and no other run, if the context raises an Exception, which is stored in `failure`."""
        try:
            with directory.saving_unscored(self.path):
                yield
        except Exception as error:
            self.failure = error
            if self.has_peers:  # a single run raises the error at its end
                _log.warning(
                    f"{self.policy} failed after {self.number} steps; the other runs continue\n{_description(error)}"
                )
            self.leave()

    def leave(self) -> None:
        """Leave the job: wait for pending writes, and close the policy on learner and engines.

        The error of a failed write is stored in `failure`.
        """
        self._has_left = True
        self.close(self.failure)
        if self.adapter:
            self.job.leave(self.policy)

    def close(self, error: BaseException | None = None) -> None:
        """Wait for pending writes. `error` is the exception that ends the run, None if the run ends normally.

        The error of a failed write is stored in `failure`, unless the run has failed before.
        """
        try:
            self._open.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except Exception as write_error:
            self.failure = self.failure or write_error

    @property
    def current(self) -> Adapter:
        """The current version. Requires `begin`."""
        assert self.adapter
        return self.adapter

    def _check_health(self, figures: Mapping[str, Any]) -> dict[str, str]:
        """Return the health rules whose condition is met, with their remedies.

        A rule whose condition was not met after the previous step causes a warning and is added to the summary.
        """
        previous = set(self.health.holding)
        remedies = self.health.update(figures)
        for name in remedies.keys() - previous:
            _log.warning(f"{self.policy}, step {self.number}: {name}: {remedies[name]}")
        if remedies.keys() - previous:
            directory.summarise(self.path, {"health": self.health.fired})
        return remedies

    def _notify(self, observer: Observer, figures: Mapping[str, Any]) -> None:
        try:
            observer.on_step(self, figures)
        except Exception as error:
            message = f"{type(observer).__name__}.on_step raised {type(error).__name__}: {error}"
            _log.warning(f"{self.policy}: {message}; training continues")


@contextmanager
def closing(runs: Sequence[Run]) -> Iterator[None]:
    """Raise the errors that ended runs, at the end of the context.

    If the context itself raises an exception, first finish the pending writes of all runs.
    """
    for run in runs:
        run.has_peers |= len(runs) > 1
    try:
        yield
    except BaseException as error:
        with ExitStack() as stack:  # close the remaining runs if one is interrupted
            for run in runs:
                stack.callback(run.close, error)
        raise
    _raise_failures(runs)


def _raise_failures(runs: Sequence[Run]) -> None:
    """Raise the error of a single run, or one RloraError that lists the failed runs and their errors."""
    failed = [run for run in runs if run.failure is not None]
    if not failed:
        return
    if len(runs) == 1:
        assert failed[0].failure
        raise failed[0].failure
    reasons = "\n".join(f"{run.policy}, after {run.number} steps: {reason(run.failure)}" for run in failed)
    raise RloraError(f"{len(failed)} of {len(runs)} runs failed:\n{reasons}") from failed[0].failure


def reason(error: BaseException | None) -> str:
    """Return the message of an error, with the type of the error unless that is RloraError."""
    return str(error) if isinstance(error, RloraError) else f"{type(error).__name__}: {error}"


def _description(error: Exception) -> str:
    """Return the message of an RloraError, or the traceback of any other error."""
    return str(error) if isinstance(error, RloraError) else "".join(traceback.format_exception(error))
