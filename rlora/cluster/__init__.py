"""Starts the processes of a job as Ray actors, and terminates them.

Processes and threads of a job:

    driver                     `rlora train` or `rlora sweep`
     |    main thread          the loop                                                    train.py
     |    agent loops          1 asyncio thread per policy: plays and scores prompts       rollout/player.py
     |    fleet                1 thread for the engines' callbacks, 1 per engine start     rollout/fleet.py
     |    checkpoint writers   1 thread per run while it writes a bundle                   run/writer.py
     |    tracker readers      1 thread per tracker: reads its messages                    trackers/tracking.py
     |
     |-Ray--> learner actors   learner.concurrent groups of learner.replicas processes;    core/learner.py
     |                         a group shares each update (all-reduce by gloo or NCCL)     cluster/ranks.py
     |
     |-Ray--> engine actors    engine.replicas, each with an asyncio loop that takes       cluster/actors.py
     |                         calls, and 1 thread that builds and steps vLLM              engine/vllm_engine.py
     |
     |-Ray--> pool actors      scoring.replicas per distinct set of reward functions       scoring/pool.py
     |         |-pipe--> reward processes: scoring.workers per pool, fed by 1 thread each  scoring/worker.py
     |
     |-pipe-> trackers         1 process per tracker: follows the run's directory          trackers/process.py
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import ray

from rlora import machine
from rlora.cluster.joining import join_ray
from rlora.cluster.processes import Processes
from rlora.cluster.resources import check_sampling_on_gpu, shared_config, total_slots
from rlora.records import Engine
from rlora.rollout.fleet import Fleet
from rlora.settings import Config

if TYPE_CHECKING:  # these modules import torch and transformers, which takes seconds
    from rlora.cluster.ranks import Ranks
    from rlora.core.learner import Learner
    from rlora.rollout.player import AgentLoop
    from rlora.rollout.task import ServedPolicy

_log = logging.getLogger(__name__)

_starter = ThreadPoolExecutor(1)  # starts Ray, one job after the other; Python waits for its thread at exit
_ahead: list[Future[Processes]] = []  # what `starting` creates, until `start` uses it: at most one


class Job:
    """The learners and the engine fleet of a job, and an agent loop per policy; `start` yields it.

    Policies may join and leave. At any time the versions of all present policies (`resources.slots_needed` each) must
    fit the `slots` that the engines were started with.
    """

    def __init__(self, processes: Processes, ranks: Sequence[Ranks], fleet: Fleet, slots: int) -> None:
        self.fleet, self.slots, self.config = fleet, slots, processes.config
        self.learners: dict[str, Ranks] = {}  # by policy
        self.loops: dict[str, AgentLoop] = {}
        self._processes, self._ranks = processes, ranks

    @property
    def is_apart(self) -> bool:
        """Whether engines and learners have separate GPUs, so that they can compute at the same time."""
        return self._processes.cuda and min(float(self.config.engine.gpus), float(self.config.learner.gpus)) >= 1

    def join(self, served: ServedPolicy) -> None:
        """Assign a group of learners and an agent loop to a policy, which may have been in the job before.

        Starts reward pools, without waiting for them, unless the job has pools for the same reward functions.
        """
        from rlora.rollout.player import AgentLoop
        from rlora.scoring.scoring import Scoring

        policy = served.policy
        scoring = Scoring(served.config, self._processes.pools([served])[policy], len(served.task.prompts))
        self.loops[policy] = AgentLoop(served.task, self.fleet, scoring, policy)
        if self._ranks:
            assigned = list(self.learners.values())
            self.learners[policy] = self.learners.get(policy) or min(self._ranks, key=assigned.count)

    def leave(self, policy: str) -> None:
        """End a policy's agent loop, and unload the policy's versions from all engines.

        The policy's requests fail with StaleError. Waits for the thread of the agent loop, but not for the engines.
        """
        self.fleet.leave(policy)
        if learner := self.learners.pop(policy, None):
            learner.close(policy)
        self.loops.pop(policy).close()


@contextmanager
def starting(*configs: Config, learn: bool = True) -> Iterator[None]:
    """Start Ray and the processes of a job in a thread, for a call of `start` in this context.

    The processes import their packages while the caller loads prompts and reward functions. `configs` are the configs
    of the job's policies; `learn` says whether the job needs learners. Neither end of the context blocks: `start`
    raises the errors of the thread, and without a call of `start` the thread also ends the processes, so that an error
    in the caller's data is shown immediately.
    """
    staleness = max(config.max_staleness for config in configs)
    previous = machine.on_signal(signal.SIGTERM, _exit)
    _ahead.append(_starter.submit(_create, replace(configs[0], max_staleness=staleness), learn))
    try:
        yield
    finally:
        while _ahead:
            if not (created := _ahead.pop()).cancel():  # it may wait until an earlier one has ended
                _starter.submit(_end_unused, created)
        machine.on_signal(signal.SIGTERM, previous)


@contextmanager
def start(served: Sequence[ServedPolicy], learn: bool = True) -> Iterator[Job]:
    """Start the learners (unless `learn` is False), a fleet of `engine.replicas` engines, and the reward pools.

    Blocks until all processes are ready. Joins the Ray cluster of this job or machine, or starts a cluster that ends
    with the context. Policies are divided among `learner.concurrent` groups of `learner.replicas` learners; the
    learners of a group share each update. When the context has ended, also after an error, all processes have ended and
    their files in RAM are removed. Raises RloraError if the policies differ in a field that they have to share
    (`resources.shared_config`), if the engines do not support their sampling settings (`check_sampling_on_gpu`), and
    the error of a process that can't start.
    """
    from rlora.cluster.ranks import Ranks

    machine.check_ram_directory()
    _log.info("starting engines and learners, which can take a minute")
    config, slots = shared_config(served), total_slots(served)
    with _processes(config, served[0].task.base, slots) as processes:
        if processes.cuda:
            check_sampling_on_gpu(*(member.config for member in served))
        count = min(config.learner.concurrent, len(served)) if learn else 0
        groups = [processes.start_learners(group) for group in range(count)]
        engines = [] if processes.cuda else processes.start_engines(served)
        processes.pools(served)
        processes.wait()
        restarts = config.restarts
        ranks = [Ranks(partial(processes.start_learners, n), remotes, restarts) for n, remotes in enumerate(groups)]
        if processes.cuda:  # after the learners: vLLM counts memory that others take during its start as its own
            processes.measure_learners(ranks)
            engines = processes.start_engines(served)
            processes.wait()
        processes.report(ranks, engines)
        room, replacement = 2 * config.engine.sequences(processes.cuda), partial(processes.start_replacement, served)
        fleet = Fleet(replacement, cast(list[Engine], engines), room, config.engine.patience, restarts)
        job = Job(processes, ranks, fleet, slots)
        try:
            for member in served:
                job.join(member)
            yield job
        finally:
            fleet.stop()
            for loop in job.loops.values():
                loop.close()


@contextmanager
def learning(config: Config, base: str) -> Iterator[Learner]:
    """Start `learner.replicas` learners of the base in the directory `base`, without engines.

    Blocks until the learners are ready, and yields an object with the interface of `Learner`. The processes have the
    same environment variables as in a job with engines, and end with the context.
    """
    from rlora.cluster.ranks import Ranks

    with _processes(config, base) as processes:
        remotes = processes.start_learners()
        processes.wait()
        yield cast("Learner", Ranks(processes.start_learners, remotes, config.restarts))


@contextmanager
def _processes(config: Config, base: str, slots: int = 1) -> Iterator[Processes]:
    """Join or start a Ray cluster. At the end of the context, terminate the actors that were started in it."""
    processes = (_ahead.pop() if _ahead else _starter.submit(_create, config)).result()
    machine.on_signal(signal.SIGTERM, _exit)  # sent by `ray job stop`; Ray's own handler cleans nothing up
    try:
        processes.configure(config, base, slots)
        yield processes
    finally:
        with machine.undisturbed():
            _end(processes)


def _create(config: Config, learn: bool | None = None) -> Processes:
    """Join or start Ray. Unless `learn` is None, also create engines, and learners if it is True."""
    is_local = join_ray()
    try:
        processes = Processes(config, can_grow=not is_local)  # another cluster may have an autoscaler
        if learn is not None:
            processes.create(learn)
    except BaseException:
        ray.shutdown()
        raise
    return processes


def _end_unused(created: Future[Processes]) -> None:
    with suppress(Exception):  # if they could not be created, the caller's own error counts
        _end(created.result())


def _end(processes: Processes) -> None:
    processes.close()
    ray.shutdown()


def _exit(*_: object) -> None:
    _log.warning("ended by SIGTERM")
    sys.exit(143)
