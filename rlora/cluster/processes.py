"""Processes of a job: creates the Ray actors of engines, learners and reward pools, and terminates them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlora import cards, machine
from rlora.cards import LearnerMemory, MemoryPlan
from rlora.cluster.actors import Remote, RemoteEngine, RemotePool, end_actors, report_starting, wait_for_results
from rlora.cluster.resources import assign_gpus, total_slots
from rlora.records import Adapter, Engine, RloraError
from rlora.settings import Config

if TYPE_CHECKING:  # these modules import torch
    from rlora.cluster.ranks import Ranks
    from rlora.rollout.task import ServedPolicy

_log = logging.getLogger(__name__)

LEARNER = "rlora.core.learner:Learner"
ENGINE = "rlora.engine.vllm_engine:Engine"
_START_TIMEOUT = 1800.0  # seconds for a replacement engine to start


class Processes:
    """The actors of a job. Starts engines, learners and pools according to the shared config, and terminates them.

    Processes that `create` starts ahead import their packages until they are used. `can_grow` says whether the Ray
    cluster may add nodes: if so, a lack of GPUs is not an error.
    """

    def __init__(self, config: Config, can_grow: bool) -> None:
        self.remotes: list[Remote] = []
        self.pools_by_setup: list[tuple[Any, list[RemotePool]]] = []
        self.placement_groups: dict[int, PlacementGroup] = {}  # by learner group; Ray removes them with the driver
        self.is_closed = False
        gpus = ray.cluster_resources().get("GPU", 0)
        cards.check_cpu_is_intended(gpus, wanted=config.engine.gpus != 0 or config.learner.gpus != 0)
        self.config = assign_gpus(config, gpus, can_grow)
        self.cuda = max(float(self.config.engine.gpus), float(self.config.learner.gpus)) > 0
        self.memory_plan = MemoryPlan()
        busy = max(1, config.engines) + (config.max_staleness > 0)  # processes that compute at the same time
        self.cores_per_process = max(1, machine.cores() // busy)
        self.base = ""
        self._put = lru_cache(maxsize=1)(ray.put)
        self._engines: dict[int, RemoteEngine] = {}  # created ahead, by number
        self._learners: dict[int, list[Remote]] = {}  # created ahead, by group

    def create(self, learn: bool) -> None:
        """Create the processes of the engines and, if `learn` is True, of the first learner group. Does not block.

        On CPU a learner is created later, because an engine takes longest to import its packages, and needs the cores.
        """
        self._engines = {number: self._create_engine(number) for number in range(self.config.engines)}
        if learn and self.cuda:
            self._learners = {0: self._create_learners(0)}

    def configure(self, config: Config, base: str, slots: int) -> None:
        """Set the arguments with which engines and learners are constructed.

        `config` is the shared config, which must agree with the constructor's `config` in the fields of
        `resources.SHARED`. `base` is the path of the base, and `slots` the number of versions that an engine holds.
        """
        self.base, self._put = base, lru_cache(maxsize=slots)(ray.put)
        engine = replace(config.engine, gpus=self.config.engine.gpus)
        self.config = replace(config, engine=engine, learner=replace(config.learner, gpus=self.config.learner.gpus))

    def wait(self) -> None:
        """Block until all actors have constructed their objects. Raises the first exception of a constructor."""
        wait_for_results({remote.built: remote for remote in self.remotes if remote.built}, report_starting)

    def start_engines(self, served: Sequence[ServedPolicy]) -> list[RemoteEngine]:
        """Start `Config.engines` engines for the policies in `served`, without blocking (see `wait`)."""
        return [self.start_engine(served, number) for number in range(self.config.engines)]

    def measure_learners(self, learners: Sequence[Ranks]) -> None:
        """Set `memory_plan` to the memory that learners take on each GPU. This blocks.

        Each learner computes the largest row of an update, and reports the memory that it has reserved.
        """
        usage: dict[str, LearnerMemory] = {}
        for uuid, size in (pair for ranks in learners for pair in ranks.rehearse()):
            previous = usage.get(uuid, LearnerMemory())
            usage[uuid] = LearnerMemory(previous.bytes + size, previous.gpus + float(self.config.learner.gpus))
        self.memory_plan = MemoryPlan(usage)

    def report(self, learners: Sequence[Ranks], engines: Sequence[RemoteEngine]) -> None:
        """Log the devices of learners and engines. Engines that start later on a GPU get the same KV cache size."""
        infos = [engine.about().result() for engine in engines]
        if self.cuda:
            self.memory_plan = replace(self.memory_plan, kv_cache=min((info.kv_cache for info in infos), default=0))
        lines = [*(ranks.about() for ranks in learners[:1]), *sorted({info.description for info in infos})]
        _log.info("; ".join(lines))

    def start_engine(self, served: Sequence[ServedPolicy], number: int) -> RemoteEngine:
        """Start engine `number` for the policies in `served`, without blocking."""
        engine = self._engines.pop(number, None) or self._create_engine(number)
        version = max(member.number for member in served)
        engine.build(self.config, self.base, total_slots(served), number, version, self.memory_plan)
        return engine

    def _share(self, adapter: Adapter) -> Any:
        """Put an adapter into Ray's object store, and return the reference. The last `slots` references are cached."""
        return self._put(adapter)

    def _create_engine(self, number: int) -> RemoteEngine:
        settings, threads = self.config.engine, self.config.engine.threads or self.cores_per_process
        environment = machine.engine_environment(threads, settings.kv_cache_gib or 2, self.cuda)
        gpus = float(settings.gpus) * settings.tensor_parallel_size
        options = _actor_options(settings.cpus, gpus, environment, "SPREAD")
        engine = RemoteEngine(self._share, f"engine {number}", options, ENGINE)
        self.remotes.append(engine)
        return engine

    def start_replacement(self, served: Sequence[ServedPolicy], number: int) -> Engine:
        """Start engine `number` in place of an engine that died, and block until the new engine is ready.

        Raises RloraError if the job has ended or if the start takes more than 30 minutes, and the constructor's errors.
        """
        if self.is_closed:
            raise RloraError(f"engine {number}: not started, because the job has ended")
        engine, deadline = self.start_engine(served, number), time.monotonic() + _START_TIMEOUT

        def check_deadline(remotes: list[Remote]) -> None:
            report_starting(remotes)
            if time.monotonic() > deadline:
                raise RloraError(
                    f"engine {number}: it was not ready after {_START_TIMEOUT:.0f} s; free the CPUs and GPUs that an "
                    "engine reserves (`ray status` lists what is in use), or lower engine.replicas"
                )

        try:
            wait_for_results({engine.built: engine}, check_deadline)
        except BaseException:
            engine.close()
            raise
        return cast(Engine, engine)

    def start_learners(self, group: int = 0) -> list[Remote]:
        """Start the `learner.replicas` learners of a group, without blocking.

        Policies are divided among `learner.concurrent` groups, and `group` is the index of one.
        """
        learners = self._learners.pop(group, None) or self._create_learners(group)
        for remote in learners:
            remote.build(self.config, self.base)
        return learners

    def _create_learners(self, group: int) -> list[Remote]:
        learner = self.config.learner
        cores = self.cores_per_process if self.config.max_staleness else machine.cores()
        total = learner.replicas * learner.concurrent
        gpus = float(learner.gpus)
        environment = machine.learner_environment(learner.threads or max(1, cores // total), gpus > 0)
        options = _actor_options(learner.cpus, gpus, environment, self._placement(group, learner.cpus, gpus))
        numbers = range(group * learner.replicas, (group + 1) * learner.replicas)
        remotes = [Remote(f"learner {number}" if total > 1 else "learner", options, LEARNER) for number in numbers]
        self.remotes += remotes
        return remotes

    def _placement(self, group: int, cpus: float, gpus: float) -> str | PlacementGroupSchedulingStrategy:
        """Return a strategy that packs a group's learners on few nodes, because they communicate in every update.

        Engines have no placement group, because they start and end one by one.
        """
        resources = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
        if self.config.learner.replicas == 1 or not resources:
            return "DEFAULT"
        if group not in self.placement_groups:
            self.placement_groups[group] = placement_group([resources] * self.config.learner.replicas, strategy="PACK")
        return PlacementGroupSchedulingStrategy(self.placement_groups[group])

    def pools(self, served: Sequence[ServedPolicy]) -> dict[str, list[RemotePool]]:
        """Return the reward pools of each policy, by the policy's name. Missing pools are started, without blocking.

        Policies whose reward functions have the same setup share their pools. A policy without reward functions whose
        env does not reply has an empty list.
        """
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
        """Terminate all actors. Blocks until their processes have ended, within the limits of `end_actors`."""
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
