"""Starts the learners, the engines and the processes that score as Ray actors, and ends them all."""

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
from rlora.cluster.ranks import Ranks, results_of, still_starting
from rlora.core.learner import Learner
from rlora.records import Engine, RloraError
from rlora.rollout.fleet import Fleet
from rlora.rollout.player import AgentLoop
from rlora.rollout.task import ServedPolicy
from rlora.scoring.scoring import Scoring
from rlora.settings import Config

SHARED = (  # settings that a process has once
    "model", "dtype", "engine", "restarts", "learner.adapter", "learner.quantise", "learner.shard", "learner.replicas",
    "learner.concurrent", "learner.checkpointing", "learner.deterministic", "learner.threads", "learner.cpus",
    "learner.gpus",
)  # fmt: skip
ENGINE = "rlora.engine.vllm_engine:Engine"
_START = 1800.0  # seconds in which an engine that replaces another has to be ready


class _Crew:
    """The actors of a job: makes engines and learners as the shared settings say, and ends them all."""

    def __init__(self, config: Config, base: str, versions: int, grows: bool) -> None:
        self.base = base
        self.remotes: list[Remote] = []
        self.scorers: list[tuple[Any, list[RemotePool]]] = []  # by what they were set up with
        self.packed: dict[int, PlacementGroup] = {}  # of learners, by their place; Ray removes them with the driver
        self.over = False
        gpus = ray.cluster_resources().get("GPU", 0)
        cards.check_cpu_is_intended(gpus, wanted=config.engine.gpus != 0 or config.learner.gpus != 0)
        self.config = placed(config, gpus, grows)
        self.cuda = max(float(self.config.engine.gpus), float(self.config.learner.gpus)) > 0
        self.beside = MemoryPlan()
        at_once = config.engine.replicas + (config.max_staleness > 0)  # processes that compute at the same time
        self.share = max(1, machine.cores() // at_once)
        self.put = lru_cache(maxsize=versions)(ray.put)

    def wait(self) -> None:
        """Until all are built."""
        results_of({remote.built: remote for remote in self.remotes}, still_starting)

    def engines(self, served: Sequence[ServedPolicy]) -> list[RemoteEngine]:
        return [self.engine(served, number) for number in range(self.config.engine.replicas)]

    def look_at_cards(self, learners: Sequence[Ranks]) -> None:
        """Have the learners compute their largest row, that engines know what is left of their cards."""
        held: dict[str, LearnerMemory] = {}
        for uuid, size in (each for ranks in learners for each in ranks.rehearse()):
            before = held.get(uuid, LearnerMemory())
            held[uuid] = LearnerMemory(before.bytes + size, before.gpus + float(self.config.learner.gpus))
        self.beside = MemoryPlan(held)

    def tell(self, learners: Sequence[Ranks], engines: Sequence[RemoteEngine]) -> None:
        """Say what runs where; an engine that starts later gets as large a KV cache."""
        about = [engine.about().result() for engine in engines]
        if self.cuda:
            self.beside = replace(self.beside, kv_cache=min(each.kv_cache for each in about))
        words = [*(ranks.about() for ranks in learners[:1]), *sorted({each.words for each in about})]
        print("; ".join(words), flush=True)

    def engine(self, served: Sequence[ServedPolicy], number: int) -> RemoteEngine:
        settings = self.config.engine
        environment = machine.engine_environment(settings.threads or self.share, settings.kv_cache_gib or 2, self.cuda)
        gpus = float(settings.gpus) * settings.tensor_parallel_size
        options = _options(settings.cpus, gpus, environment, "SPREAD")
        slots = _versions(served)
        task, version = served[0].task, max(each.number for each in served)
        made_of = self.config, self.base, task.chat.stop_token_ids, task.stop, slots, number, version, self.beside
        made = RemoteEngine(self.put, f"engine {number}", options, ENGINE, *made_of)
        self.remotes.append(made)
        return made

    def another_engine(self, served: Sequence[ServedPolicy], number: int) -> Engine:
        """One that is ready, in place of one that died. Raises RloraError where it is not in time."""
        if self.over:
            raise RloraError("engine: the run is over")
        made, deadline = self.engine(served, number), time.monotonic() + _START

        def late(remotes: list[Remote]) -> None:
            still_starting(remotes)
            if time.monotonic() > deadline:
                raise RloraError(f"engine {number}: it was not ready after {_START:.0f} s")

        try:
            results_of({made.built: made}, late)
        except BaseException:
            made.close()
            raise
        return cast(Engine, made)

    def learners(self, place: int = 0) -> list[Remote]:
        """Those that share each update of the policies that are dealt to that place of `learner.concurrent`."""
        learner = self.config.learner
        cores = self.share if self.config.max_staleness else machine.cores()
        everyone = learner.replicas * learner.concurrent
        gpus = float(learner.gpus)
        environment = machine.learner_environment(learner.threads or max(1, cores // everyone), gpus > 0)
        options = _options(learner.cpus, gpus, environment, self._packed(place, learner.cpus, gpus))
        made = []
        for number in range(place * learner.replicas, (place + 1) * learner.replicas):
            role = f"learner {number}" if everyone > 1 else "learner"
            made.append(Remote(role, options, "rlora.core.learner:Learner", self.config, self.base))
        self.remotes += made
        return made

    def _packed(self, place: int, cpus: float, gpus: float) -> str | PlacementGroupSchedulingStrategy:
        """What puts the learners that share each update on as few nodes as possible: they speak all the time.

        Engines get no placement group, for they come and go one by one.
        """
        reserved = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
        if self.config.learner.replicas == 1 or not reserved:
            return "DEFAULT"
        if place not in self.packed:
            self.packed[place] = placement_group([reserved] * self.config.learner.replicas, strategy="PACK")
        return PlacementGroupSchedulingStrategy(self.packed[place])

    def pools(self, served: Sequence[ServedPolicy]) -> dict[str, list[RemotePool]]:
        """What scores each policy's episodes: the same processes for those whose reward functions are set up alike."""
        found: dict[str, list[RemotePool]] = {}
        for each in served:
            scoring, setup = each.config.scoring, each.task.scoring
            if not (setup.rewards or setup.env):
                found[each.policy] = []
                continue
            alike = setup, scoring.workers, scoring.cpus, scoring.replicas
            pools = next((pools for another, pools in self.scorers if another == alike), None)
            if pools is None:
                pools = [RemotePool(scoring.cpus, setup, scoring.workers) for _ in range(scoring.replicas)]
                self.scorers.append((alike, pools))
                self.remotes += pools
            found[each.policy] = pools
        return found

    def end(self) -> None:
        self.over = True
        engines = [remote for remote in self.remotes if isinstance(remote, RemoteEngine)]
        closing = {remote: remote.closing for remote in engines if remote.closing}
        for thread in closing.values():
            thread.join(timeout=15)
        end_actors([remote for remote in self.remotes if remote not in closing])


def _options(cpus: float, gpus: float, environment: Mapping[str, str], strategy: Any) -> dict[str, Any]:
    """Those of a Ray actor."""
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}  # some versions of Ray leave the cards in sight
    return {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "runtime_env": {"env_vars": {**environment, **hidden}},
        "scheduling_strategy": strategy,
    }


def versions_of(config: Config) -> int:
    """How many versions of a policy are served at a time.

    The newest, as many before it as may be learned from, one that is on its way, and one that is evaluated meanwhile.
    """
    return config.max_staleness + 2 + (config.evaluate.every > 0)


def _versions(served: Sequence[ServedPolicy]) -> int:
    return sum(versions_of(each.config) for each in served)


class Job:
    """What a job has for its policies: learners, the fleet of engines, and a loop each that plays and scores prompts.

    Policies may come and go. What is there at the same time has to fit what the job was started for.
    """

    def __init__(self, crew: _Crew, ranks: Sequence[Ranks], fleet: Fleet, slots: int) -> None:
        self.fleet, self.slots, self.config = fleet, slots, crew.config
        self.learners: dict[str, Ranks] = {}  # by policy
        self.loops: dict[str, AgentLoop] = {}
        self._crew, self._ranks = crew, ranks

    @property
    def is_apart(self) -> bool:
        """Whether each engine and learner has cards of its own, so that they can be busy at the same time."""
        return self._crew.cuda and min(float(self.config.engine.gpus), float(self.config.learner.gpus)) >= 1

    def join(self, served: ServedPolicy) -> None:
        """Have a learner, and a loop, for a policy, which may have been here before."""
        policy = served.policy
        scoring = Scoring(served.config, self._crew.pools([served])[policy], len(served.task.prompts))
        self.loops[policy] = AgentLoop(served.task, self.fleet, scoring, policy)
        if self._ranks:
            dealt = list(self.learners.values())
            self.learners[policy] = self.learners.get(policy) or min(self._ranks, key=dealt.count)

    def leave(self, policy: str) -> None:
        """End what plays a policy's prompts, and serve none of its versions."""
        self.fleet.leave(policy)
        self.learners.pop(policy).close(policy)
        self.loops.pop(policy).close()


@contextmanager
def start(served: Sequence[ServedPolicy], learn: bool = True) -> Iterator[Job]:
    """Start the learners (unless not `learn`), a fleet of `engine.replicas` engines, and what scores.

    Ray places them all. Policies are dealt out among `learner.concurrent` learners, each of which is
    `learner.replicas` processes that share every update. Joins the Ray cluster of this job or machine, or
    starts one that ends with it. On leaving, however that comes about, every process is gone and so are its files in
    RAM.
    Raises RloraError where the policies differ in a setting that they share.
    """
    machine.check_ram_directory()
    config = shared(served)
    with _crew(config, served[0].task.base, _versions(served)) as crew:
        count = min(config.learner.concurrent, len(served)) if learn else 0
        made = [crew.learners(place) for place in range(count)]
        engines = [] if crew.cuda else crew.engines(served)
        crew.pools(served)
        crew.wait()
        ranks = [Ranks(partial(crew.learners, n), remotes, config.restarts) for n, remotes in enumerate(made)]
        if crew.cuda:  # after the learners: vLLM takes for its own what a card loses while it starts
            crew.look_at_cards(ranks)
            engines = crew.engines(served)
            crew.wait()
        crew.tell(ranks, engines)
        room, engine = 2 * config.engine.sequences(crew.cuda), partial(crew.another_engine, served)
        fleet = Fleet(engine, cast(list[Engine], engines), room, config.engine.patience, config.restarts)
        job = Job(crew, ranks, fleet, _versions(served))
        try:
            for each in served:
                job.join(each)
            yield job
        finally:
            fleet.stop()
            for loop in job.loops.values():
                loop.close()


def shared(served: Sequence[ServedPolicy]) -> Config:
    """The settings of the job's processes: what all policies have in common, and the largest of what they need.

    Raises RloraError, naming the field, where two policies differ in what a process has once.
    """
    first, *others = served
    for other in others:
        for name in SHARED:
            ours, theirs = (attrgetter(name)(each.config) for each in (first, other))
            if ours != theirs:
                raise RloraError(
                    f"{name} = {theirs!r} of {other.policy}: {first.policy} has {ours!r}, and policies that train "
                    "together share it; give them the same, or train them one after the other"
                )
        if bool(other.config.max_staleness) != bool(first.config.max_staleness) and not first.config.learner.threads:
            raise RloraError(
                f"max_staleness = {other.config.max_staleness} of {other.policy}: {first.policy} has "
                f"{first.config.max_staleness}, and by it the learner's threads are chosen, on which roundings depend; "
                "set learner.threads for both"
            )
        if first.config.learner.full_finetuning:
            raise RloraError(
                f'learner.adapter = "none": a learner has one policy then, and {first.policy} and {other.policy} are '
                "two; train them one after the other"
            )
        if (names := [each.policy for each in served]).count(other.policy) > 1:
            raise RloraError(f"policy {other.policy}: there are two of {names}; give each a name of its own")
        if other.task.stop != first.task.stop:
            raise RloraError(
                f"{other.policy}: its env or chat.stop ends a message with {list(other.task.stop)}, that of "
                f"{first.policy} with {list(first.task.stop)}; policies that train together share it"
            )
    configs = [each.config for each in served]
    learner = replace(
        first.config.learner,
        rank=max(config.learner.rank for config in configs),
        head=any(config.learner.head for config in configs),
        start_from=next((config.learner.start_from for config in configs if config.learner.start_from), ""),
    )
    longest = max(configs, key=lambda config: config.max_model_len)
    staleness = max(config.max_staleness for config in configs)
    return replace(first.config, learner=learner, sampling=longest.sampling, max_staleness=staleness)


def placed(config: Config, cluster_gpus: float, grows: bool = False) -> Config:
    """With the GPUs that each engine and learner reserves. Raises RloraError for what can't be, such as more than there
    are, unless the cluster `grows`."""
    engine, learner = config.engine, config.learner
    learners, parts = learner.replicas * learner.concurrent, engine.tensor_parallel_size
    if not cluster_gpus:
        return replace(config, engine=replace(engine, gpus=0.0), learner=replace(learner, gpus=0.0))
    enough = engine.replicas * parts + learners <= cluster_gpus
    of_learner = (1.0 if enough or learner.replicas > 1 else 0.5) if learner.gpus == "auto" else learner.gpus
    of_engine = (1.0 if enough or parts > 1 else 0.5) if engine.gpus == "auto" else engine.gpus
    if parts > 1 and of_engine < 1:
        raise RloraError(
            f"engine.gpus = {of_engine}: with engine.tensor_parallel_size = {parts} an engine takes whole cards; leave "
            "engine.gpus out"
        )
    if learner.replicas > 1 and 0 < of_learner < 1:
        raise RloraError(
            f"learner.gpus = {of_learner}: {learner.replicas} learners might share a GPU, and NCCL needs one for each; "
            "leave learner.gpus out"
        )
    needed = engine.replicas * parts * of_engine + learners * of_learner
    if needed > cluster_gpus and not grows:
        raise RloraError(
            f"GPU: {engine.replicas} engines of {parts * of_engine:g} and {learners} learners of {of_learner:g} GPUs "
            f"are {needed:g} in all, and Ray has {cluster_gpus:g}; lower engine.replicas, "
            "engine.tensor_parallel_size or learner.replicas, or let them share cards by engine.gpus and learner.gpus"
        )
    return replace(
        config, engine=replace(engine, gpus=float(of_engine)), learner=replace(learner, gpus=float(of_learner))
    )


@contextmanager
def learning(config: Config, base: str) -> Iterator[Learner]:
    """The learner alone, in the environment that it has beside engines."""
    with _crew(config, base) as crew:
        learners = crew.learners()
        crew.wait()
        yield cast(Learner, Ranks(crew.learners, learners, config.restarts))


@contextmanager
def _crew(config: Config, base: str, versions: int = 1) -> Iterator[_Crew]:
    """A crew on a Ray cluster; on leaving all of it ends."""
    ours = join_ray()
    machine.on_signal(signal.SIGTERM, _end)  # `ray job stop` sends it; Ray's own handler cleans nothing up
    crew = _Crew(config, base, versions, grows=not ours)  # others may have an autoscaler
    try:
        yield crew
    finally:
        with machine.undisturbed():
            crew.end()
            ray.shutdown()


def _end(*_: object) -> None:
    print("rlora: ended by SIGTERM", file=sys.stderr, flush=True)
    sys.exit(143)
