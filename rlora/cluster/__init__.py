"""Starts the processes of a job as Ray actors, and ends them.

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

import logging
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, cast

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlora import cards, machine
from rlora.cards import LearnerMemory, MemoryPlan
from rlora.cluster.actors import Remote, RemoteEngine, RemotePool, end_actors
from rlora.cluster.joining import join_ray
from rlora.cluster.ranks import Ranks, report_starting, wait_for_results
from rlora.core.learner import Learner
from rlora.records import Engine, RloraError
from rlora.rollout.fleet import Fleet
from rlora.rollout.player import AgentLoop
from rlora.rollout.task import ServedPolicy
from rlora.scoring.scoring import Scoring
from rlora.settings import Config

_log = logging.getLogger(__name__)

SHARED = (  # fields that all policies of a job share, because a process has them once
    "model", "dtype", "engine", "restarts", "learner.adapter", "learner.quantise", "learner.shard", "learner.replicas",
    "learner.concurrent", "learner.checkpointing", "learner.deterministic", "learner.threads", "learner.cpus",
    "learner.gpus",
)  # fmt: skip
ENGINE = "rlora.engine.vllm_engine:Engine"
_START_TIMEOUT = 1800.0  # seconds for a replacement engine to start


class _Actors:
    """The actors of a job: starts engines, learners and pools according to the shared config, and ends them all."""

    def __init__(self, config: Config, base: str, slots: int, can_grow: bool) -> None:
        self.base = base
        self.remotes: list[Remote] = []
        self.pools_by_setup: list[tuple[Any, list[RemotePool]]] = []
        self.placement_groups: dict[int, PlacementGroup] = {}  # by learner group; Ray removes them with the driver
        self.is_closed = False
        gpus = ray.cluster_resources().get("GPU", 0)
        cards.check_cpu_is_intended(gpus, wanted=config.engine.gpus != 0 or config.learner.gpus != 0)
        self.config = assign_gpus(config, gpus, can_grow)
        self.cuda = max(float(self.config.engine.gpus), float(self.config.learner.gpus)) > 0
        self.memory_plan = MemoryPlan()
        busy = config.engine.replicas + (config.max_staleness > 0)  # processes that compute at the same time
        self.cores_per_process = max(1, machine.cores() // busy)
        self.put_adapter = lru_cache(maxsize=slots)(ray.put)

    def wait(self) -> None:
        """Wait until all actors have built their objects."""
        wait_for_results({remote.built: remote for remote in self.remotes}, report_starting)

    def start_engines(self, served: Sequence[ServedPolicy]) -> list[RemoteEngine]:
        return [self.start_engine(served, number) for number in range(self.config.engine.replicas)]

    def measure_learners(self, learners: Sequence[Ranks]) -> None:
        """Let the learners compute their largest row, to find how much memory they leave on each GPU for engines."""
        usage: dict[str, LearnerMemory] = {}
        for uuid, size in (pair for ranks in learners for pair in ranks.rehearse()):
            previous = usage.get(uuid, LearnerMemory())
            usage[uuid] = LearnerMemory(previous.bytes + size, previous.gpus + float(self.config.learner.gpus))
        self.memory_plan = MemoryPlan(usage)

    def report(self, learners: Sequence[Ranks], engines: Sequence[RemoteEngine]) -> None:
        """Print what runs where, and give engines that start later a KV cache of the same size."""
        infos = [engine.about().result() for engine in engines]
        if self.cuda:
            self.memory_plan = replace(self.memory_plan, kv_cache=min(info.kv_cache for info in infos))
        lines = [*(ranks.about() for ranks in learners[:1]), *sorted({info.description for info in infos})]
        _log.info("; ".join(lines))

    def start_engine(self, served: Sequence[ServedPolicy], number: int) -> RemoteEngine:
        settings, threads = self.config.engine, self.config.engine.threads or self.cores_per_process
        environment = machine.engine_environment(threads, settings.kv_cache_gib or 2, self.cuda)
        gpus = float(settings.gpus) * settings.tensor_parallel_size
        options = _actor_options(settings.cpus, gpus, environment, "SPREAD")
        task, slots, version = served[0].task, _total_slots(served), max(member.number for member in served)
        arguments = self.config, self.base, task.chat.stop_token_ids, task.stop, slots, number, version
        engine = RemoteEngine(self.put_adapter, f"engine {number}", options, ENGINE, *arguments, self.memory_plan)
        self.remotes.append(engine)
        return engine

    def start_replacement(self, served: Sequence[ServedPolicy], number: int) -> Engine:
        """Start an engine for one that died, and wait for it. Raises RloraError if it is not ready in time."""
        if self.is_closed:
            raise RloraError("engine: the run has ended")
        engine, deadline = self.start_engine(served, number), time.monotonic() + _START_TIMEOUT

        def check_deadline(remotes: list[Remote]) -> None:
            report_starting(remotes)
            if time.monotonic() > deadline:
                raise RloraError(f"engine {number}: it was not ready after {_START_TIMEOUT:.0f} s")

        try:
            wait_for_results({engine.built: engine}, check_deadline)
        except BaseException:
            engine.close()
            raise
        return cast(Engine, engine)

    def start_learners(self, group: int = 0) -> list[Remote]:
        """Start the `learner.replicas` learners of a group. Policies are divided among `learner.concurrent` groups."""
        learner = self.config.learner
        cores = self.cores_per_process if self.config.max_staleness else machine.cores()
        total = learner.replicas * learner.concurrent
        gpus = float(learner.gpus)
        environment = machine.learner_environment(learner.threads or max(1, cores // total), gpus > 0)
        options = _actor_options(learner.cpus, gpus, environment, self._placement(group, learner.cpus, gpus))
        remotes = []
        for number in range(group * learner.replicas, (group + 1) * learner.replicas):
            role = f"learner {number}" if total > 1 else "learner"
            remotes.append(Remote(role, options, "rlora.core.learner:Learner", self.config, self.base))
        self.remotes += remotes
        return remotes

    def _placement(self, group: int, cpus: float, gpus: float) -> str | PlacementGroupSchedulingStrategy:
        """Scheduling strategy that packs a group's learners on few nodes, because they communicate in every update.

        Engines have no placement group, because they start and end one by one.
        """
        resources = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
        if self.config.learner.replicas == 1 or not resources:
            return "DEFAULT"
        if group not in self.placement_groups:
            self.placement_groups[group] = placement_group([resources] * self.config.learner.replicas, strategy="PACK")
        return PlacementGroupSchedulingStrategy(self.placement_groups[group])

    def pools(self, served: Sequence[ServedPolicy]) -> dict[str, list[RemotePool]]:
        """Each policy's reward pools. Policies whose reward functions have the same setup share them."""
        by_policy: dict[str, list[RemotePool]] = {}
        for member in served:
            scoring, setup = member.config.scoring, member.task.scoring
            if not (setup.rewards or setup.env):
                by_policy[member.policy] = []
                continue
            key = setup, scoring.workers, scoring.cpus, scoring.replicas
            pools = next((pools for existing, pools in self.pools_by_setup if existing == key), None)
            if pools is None:
                pools = [RemotePool(scoring.cpus, setup, scoring.workers) for _ in range(scoring.replicas)]
                self.pools_by_setup.append((key, pools))
                self.remotes += pools
            by_policy[member.policy] = pools
        return by_policy

    def close(self) -> None:
        self.is_closed = True
        engines = [remote for remote in self.remotes if isinstance(remote, RemoteEngine)]
        closing = {remote: remote.closing for remote in engines if remote.closing}
        for thread in closing.values():
            thread.join(timeout=15)
        end_actors([remote for remote in self.remotes if remote not in closing])


def _actor_options(cpus: float, gpus: float, environment: Mapping[str, str], strategy: Any) -> dict[str, Any]:
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}  # some versions of Ray leave GPUs visible
    return {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "runtime_env": {"env_vars": {**environment, **hidden}},
        "scheduling_strategy": strategy,
    }


def slots_needed(config: Config) -> int:
    """Number of versions of a policy that an engine serves at a time.

    The newest one, `max_staleness` older ones, one that is being delivered, and one that is being evaluated.
    """
    return config.max_staleness + 2 + (config.evaluate.every > 0)


def _total_slots(served: Sequence[ServedPolicy]) -> int:
    return sum(slots_needed(member.config) for member in served)


class Job:
    """The learners and the engine fleet of a job, and an agent loop per policy.

    Policies may join and leave. Those that are present at the same time must fit the slots the job was started with.
    """

    def __init__(self, actors: _Actors, ranks: Sequence[Ranks], fleet: Fleet, slots: int) -> None:
        self.fleet, self.slots, self.config = fleet, slots, actors.config
        self.learners: dict[str, Ranks] = {}  # by policy
        self.loops: dict[str, AgentLoop] = {}
        self._actors, self._ranks = actors, ranks

    @property
    def is_apart(self) -> bool:
        """Whether engines and learners have separate GPUs, so that they can compute at the same time."""
        return self._actors.cuda and min(float(self.config.engine.gpus), float(self.config.learner.gpus)) >= 1

    def join(self, served: ServedPolicy) -> None:
        """Assign a learner and an agent loop to a policy. It may have been in the job before."""
        policy = served.policy
        scoring = Scoring(served.config, self._actors.pools([served])[policy], len(served.task.prompts))
        self.loops[policy] = AgentLoop(served.task, self.fleet, scoring, policy)
        if self._ranks:
            assigned = list(self.learners.values())
            self.learners[policy] = self.learners.get(policy) or min(self._ranks, key=assigned.count)

    def leave(self, policy: str) -> None:
        """End a policy's agent loop, and unload its versions from all engines."""
        self.fleet.leave(policy)
        self.learners.pop(policy).close(policy)
        self.loops.pop(policy).close()


@contextmanager
def start(served: Sequence[ServedPolicy], learn: bool = True) -> Iterator[Job]:
    """Start the learners (unless `learn` is False), a fleet of `engine.replicas` engines, and the reward pools.

    Joins the Ray cluster of this job or machine, or starts one that ends with the context. Policies are divided among
    `learner.concurrent` groups of `learner.replicas` learners; a group shares each update. At the end of the context,
    also after an error, all processes have ended and their files in RAM are removed.
    Raises RloraError if the policies differ in a field that they have to share.
    """
    machine.check_ram_directory()
    config = shared_config(served)
    with _start_actors(config, served[0].task.base, _total_slots(served)) as actors:
        count = min(config.learner.concurrent, len(served)) if learn else 0
        groups = [actors.start_learners(group) for group in range(count)]
        engines = [] if actors.cuda else actors.start_engines(served)
        actors.pools(served)
        actors.wait()
        restarts = config.restarts
        ranks = [Ranks(partial(actors.start_learners, n), remotes, restarts) for n, remotes in enumerate(groups)]
        if actors.cuda:  # after the learners: vLLM counts memory that others take during its start as its own
            actors.measure_learners(ranks)
            engines = actors.start_engines(served)
            actors.wait()
        actors.report(ranks, engines)
        room, replace_engine = 2 * config.engine.sequences(actors.cuda), partial(actors.start_replacement, served)
        fleet = Fleet(replace_engine, cast(list[Engine], engines), room, config.engine.patience, restarts)
        job = Job(actors, ranks, fleet, _total_slots(served))
        try:
            for member in served:
                job.join(member)
            yield job
        finally:
            fleet.stop()
            for loop in job.loops.values():
                loop.close()


def shared_config(served: Sequence[ServedPolicy]) -> Config:
    """Config of the job's processes: the fields that all policies share, and the maximum of what they need.

    Raises RloraError, naming the field, if two policies differ in a field that they have to share.
    """
    first, *rest = served
    for member in rest:
        for name in SHARED:
            expected, value = (attrgetter(name)(policy.config) for policy in (first, member))
            if value != expected:
                raise RloraError(
                    f"{name} = {value!r} of {member.policy}: {first.policy} has {expected!r}, and policies that train "
                    "together share this field; set the same value, or train them one after the other"
                )
        if bool(member.config.max_staleness) != bool(first.config.max_staleness) and not first.config.learner.threads:
            raise RloraError(
                f"max_staleness = {member.config.max_staleness} of {member.policy}: {first.policy} has "
                f"{first.config.max_staleness}. Whether it is 0 decides the learner's default number of threads, which "
                "affects rounding; set learner.threads for both"
            )
        if first.config.learner.full_finetuning:
            raise RloraError(
                f'learner.adapter = "none": a learner then trains one policy only, not both {first.policy} and '
                f"{member.policy}; train them one after the other"
            )
        if (names := [policy.policy for policy in served]).count(member.policy) > 1:
            raise RloraError(f"policy {member.policy}: the name occurs twice in {names}; give each policy its own name")
        if member.task.stop != first.task.stop:
            raise RloraError(
                f"{member.policy}: its env or chat.stop ends messages with {list(member.task.stop)}, and that of "
                f"{first.policy} with {list(first.task.stop)}; policies that train together share stop strings: set "
                "the same ones, or train them one after the other"
            )
    configs = [member.config for member in served]
    learner = replace(
        first.config.learner,
        rank=max(config.learner.rank for config in configs),
        head=any(config.learner.head for config in configs),
        start_from=next((config.learner.start_from for config in configs if config.learner.start_from), ""),
    )
    longest = max(configs, key=lambda config: config.max_model_len)
    staleness = max(config.max_staleness for config in configs)
    return replace(first.config, learner=learner, sampling=longest.sampling, max_staleness=staleness)


def assign_gpus(config: Config, cluster_gpus: float, can_grow: bool = False) -> Config:
    """Resolve `engine.gpus` and `learner.gpus`: what each engine (per tensor-parallel rank) and learner reserves.

    Raises RloraError if that is impossible, or if the cluster has too few GPUs and can't grow.
    """
    engine, learner = config.engine, config.learner
    learners, parts = learner.replicas * learner.concurrent, engine.tensor_parallel_size
    if not cluster_gpus:
        return replace(config, engine=replace(engine, gpus=0.0), learner=replace(learner, gpus=0.0))
    enough = engine.replicas * parts + learners <= cluster_gpus
    learner_gpus = (1.0 if enough or learner.replicas > 1 else 0.5) if learner.gpus == "auto" else learner.gpus
    engine_gpus = (1.0 if enough or parts > 1 else 0.5) if engine.gpus == "auto" else engine.gpus
    if parts > 1 and engine_gpus < 1:
        raise RloraError(
            f"engine.gpus = {engine_gpus}: with engine.tensor_parallel_size = {parts} an engine takes whole GPUs; "
            "leave engine.gpus out"
        )
    if learner.replicas > 1 and 0 < learner_gpus < 1:
        raise RloraError(
            f"learner.gpus = {learner_gpus}: {learner.replicas} learners might share a GPU, and NCCL needs one per "
            "process; leave learner.gpus out"
        )
    needed = engine.replicas * parts * engine_gpus + learners * learner_gpus
    if needed > cluster_gpus and not can_grow:
        raise RloraError(
            f"GPU: engines need {engine.replicas} x {parts * engine_gpus:g} and learners {learners} x {learner_gpus:g} "
            f"GPUs, {needed:g} in total, and Ray has {cluster_gpus:g}; lower engine.replicas, "
            "engine.tensor_parallel_size or learner.replicas, or let them share GPUs by engine.gpus and learner.gpus"
        )
    return replace(
        config, engine=replace(engine, gpus=float(engine_gpus)), learner=replace(learner, gpus=float(learner_gpus))
    )


@contextmanager
def learning(config: Config, base: str) -> Iterator[Learner]:
    """Start learners without engines, in the environment that they have with engines."""
    with _start_actors(config, base) as actors:
        remotes = actors.start_learners()
        actors.wait()
        yield cast(Learner, Ranks(actors.start_learners, remotes, config.restarts))


@contextmanager
def _start_actors(config: Config, base: str, slots: int = 1) -> Iterator[_Actors]:
    """Join or start a Ray cluster; at the end of the context, end all actors in it."""
    is_local = join_ray()
    machine.on_signal(signal.SIGTERM, _exit)  # sent by `ray job stop`; Ray's own handler cleans nothing up
    actors = _Actors(config, base, slots, can_grow=not is_local)  # another cluster may have an autoscaler
    try:
        yield actors
    finally:
        with machine.undisturbed():
            actors.close()
            ray.shutdown()


def _exit(*_: object) -> None:
    _log.warning("ended by SIGTERM")
    sys.exit(143)
