"""Ray's home: the learner and the engines as actors, and nothing left behind when they end."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import cast

import ray

from rlora import machine
from rlora.cluster.actors import Remote, RemoteEngine, RemotePool, end_actors
from rlora.cluster.joining import join_ray
from rlora.cluster.ranks import Ranks, results_of, still_starting
from rlora.core.learner import Learner
from rlora.records import Engine, RloraError
from rlora.rollout.fleet import Fleet
from rlora.rollout.player import AgentLoop
from rlora.rollout.task import Task, setup_of
from rlora.scoring.scoring import Scoring
from rlora.settings import Config

ENGINE = "rlora.engine.vllm_engine:Engine"
_START = 1800.0  # seconds in which an engine that replaces another has to be ready


class _Crew:
    """The actors of a run: makes engines and learners as the config says, and ends them all."""

    def __init__(self, config: Config, base: str) -> None:
        self.config, self.base = config, base
        self.remotes: list[Remote] = []
        self.over = False
        self.cuda = ray.cluster_resources().get("GPU", 0) > 0
        at_once = config.engine.replicas + (config.max_staleness > 0)  # processes that compute at the same time
        self.share = max(1, machine.cores() // at_once)
        self.put = lru_cache(maxsize=config.max_staleness + 2)(ray.put)

    def wait(self) -> None:
        """Until all are built."""
        results_of({remote.built: remote for remote in self.remotes}, still_starting)

    def engine(self, task: Task, number: int, version: int) -> RemoteEngine:
        settings = self.config.engine
        environment = machine.engine_environment(settings.threads or self.share, settings.kv_cache_gib, self.cuda)
        reserved = settings.cpus, settings.gpus * settings.tensor_parallel_size * self.cuda, environment
        slots = self.config.max_staleness + 2  # versions that are served at a time
        made_of = self.config, self.base, task.chat.stop_token_ids, task.stop, slots, number, version
        made = RemoteEngine(self.put, f"engine {number}", *reserved, ENGINE, *made_of)
        self.remotes.append(made)
        return made

    def another_engine(self, task: Task, version: int, number: int) -> Engine:
        """One that is ready, in place of one that died. Raises RloraError where it is not in time."""
        if self.over:
            raise RloraError("engine: the run is over")
        made, deadline = self.engine(task, number, version), time.monotonic() + _START

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

    def learners(self) -> list[Remote]:
        learner = self.config.learner
        if self.cuda and learner.replicas > 1 and learner.gpus <= 0.5:
            raise RloraError(
                f"learner.gpus = {learner.gpus}: {learner.replicas} learners might share a GPU, and NCCL needs one "
                "for each; set learner.gpus to 1"
            )
        cores = self.share if self.config.max_staleness else machine.cores()
        environment = machine.learner_environment(learner.threads or max(1, cores // learner.replicas))
        reserved = learner.cpus, learner.gpus * self.cuda, environment
        made = []
        for rank in range(learner.replicas):
            role = f"learner {rank}" if learner.replicas > 1 else "learner"
            made.append(Remote(role, *reserved, "rlora.core.learner:Learner", self.config, self.base))
        self.remotes += made
        return made

    def pools(self, task: Task) -> list[RemotePool]:
        scoring = self.config.scoring
        made_of = setup_of(self.config, task.agent), scoring.workers
        made = [RemotePool(scoring.cpus, *made_of) for _ in range(scoring.replicas)]
        self.remotes += made
        return made

    def end(self) -> None:
        self.over = True
        engines = [remote for remote in self.remotes if isinstance(remote, RemoteEngine)]
        closing = {remote: remote.closing for remote in engines if remote.closing}
        for thread in closing.values():
            thread.join(timeout=15)
        end_actors([remote for remote in self.remotes if remote not in closing])


@contextmanager
def start(
    config: Config, task: Task, run: str, version: int = 0, learn: bool = True
) -> Iterator[tuple[Learner, Fleet, AgentLoop]]:
    """The learner of `run` (none, unless `learn`), a fleet of `engine.replicas` engines, and what has them scored.

    Ray places them all. `learner.replicas` learners are seen as one. `version` is the first one that will be served.

    Joins the Ray cluster of this job or machine, or starts one that ends with it. On leaving, however that comes
    about, every process is gone and so are its files in RAM.
    """
    machine.check_ram_directory()
    with _crew(config, task.base) as crew:
        learners = crew.learners() if learn else []
        engines = [crew.engine(task, number, version) for number in range(config.engine.replicas)]
        pools = crew.pools(task)
        crew.wait()
        room, engine = 2 * config.engine.max_num_seqs, partial(crew.another_engine, task, version)
        fleet = Fleet(engine, cast(list[Engine], engines), room, config.engine.patience, config.restarts)
        loop = AgentLoop(task, fleet, Scoring(config, pools, len(task.prompts)), run)
        try:
            yield cast(Learner, Ranks(crew.learners, learners, config.restarts)), fleet, loop
        finally:
            fleet.stop()
            loop.close()


@contextmanager
def learning(config: Config, base: str) -> Iterator[Learner]:
    """The learner alone, in the environment that it has beside engines."""
    with _crew(config, base) as crew:
        learners = crew.learners()
        crew.wait()
        yield cast(Learner, Ranks(crew.learners, learners, config.restarts))


@contextmanager
def _crew(config: Config, base: str) -> Iterator[_Crew]:
    """A crew on a Ray cluster; on leaving all of it ends."""
    join_ray()
    machine.on_signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # `ray job stop` sends it; Ray's own handler cleans nothing up
    crew = _Crew(config, base)
    try:
        yield crew
    finally:
        with machine.undisturbed():
            crew.end()
            ray.shutdown()
