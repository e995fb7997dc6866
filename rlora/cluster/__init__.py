"""Ray's home: the learner and the engines as actors, and nothing left behind when they end."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from rlora import machine
from rlora.cluster.actors import LostError, Remote, RemoteEngine, RemotePool, end_actors
from rlora.cluster.joining import join_ray
from rlora.core.learner import Learner
from rlora.records import Adapter, Engine, Group, RloraError
from rlora.rollout.fleet import Fleet
from rlora.rollout.player import AgentLoop
from rlora.rollout.task import Task, setup_of
from rlora.scoring.scoring import Scoring
from rlora.settings import Config

ENGINE = "rlora.engine.vllm_engine:Engine"
_PATIENCE = 30.0  # seconds until we say that Ray has found no place for an actor
_START = 1800.0  # seconds in which an engine that replaces another has to be ready


class _Ranks:
    """Learners that share each update, seen as one: the first answers, and what changes them is called on all.

    Where one dies, all are made anew by `make`, go on from the last state, and do the update again; after `restarts`
    times in a row RloraError is raised.
    """

    def __init__(self, make: Callable[[], list[Remote]], remotes: list[Remote], restarts: int) -> None:
        self._make, self._remotes, self._restarts = make, remotes, restarts
        self._state: bytes | None = None  # after the last update; None while it is as it was built
        self._join()

    def update(self, groups: Sequence[Group]) -> Any:
        """`Learner.update` on all; the state after it is kept too, so that what is returned is never lost."""

        def updated() -> tuple[Any, bytes]:
            return self._on_all("update", [(shared,)] * len(self._remotes)), self._on_first("state")

        shared = ray.put(groups)
        result, self._state = self._despite_deaths(updated)
        return result

    def resume(self, state: bytes) -> Adapter:
        self._state = state
        adapter: Adapter = self._despite_deaths(self._resumed)
        return adapter

    def adapter(self) -> Adapter:
        adapter: Adapter = self._despite_deaths(partial(self._on_first, "adapter"))
        return adapter

    def state(self) -> bytes:
        state: bytes = self._state or self._despite_deaths(partial(self._on_first, "state"))
        return state

    def _despite_deaths(self, call: Callable[[], Any]) -> Any:
        deaths = 0
        while True:
            try:
                if deaths:
                    self._make_anew()
                return call()
            except Exception as error:
                if not (isinstance(error, LostError) or self._one_died()):
                    raise
                deaths += 1
                if deaths > self._restarts:
                    raise
                print(f"{error}\nIt is started again, and goes on from its last state.", flush=True)

    def _one_died(self) -> bool:
        """Whether an error of one learner is that another is gone: it hears of that before Ray does."""
        if len(self._remotes) == 1:
            return False
        for remote in self._remotes:
            with suppress(GetTimeoutError):  # it waits for another
                try:
                    ray.get(remote.actor.place.remote(), timeout=5)
                except RayActorError:
                    return True
        return False

    def _make_anew(self) -> None:
        end_actors(self._remotes)
        self._remotes = self._make()
        _results({remote.built: remote for remote in self._remotes}, _still_starting)
        self._join()
        if self._state:
            self._resumed()

    def _join(self) -> None:
        if len(self._remotes) > 1:
            address = self._remotes[0].wait(self._remotes[0].actor.address.remote())
            self._on_all("join", [(address, rank, len(self._remotes)) for rank, _ in enumerate(self._remotes)])

    def _resumed(self) -> Any:
        shared = ray.put(self._state)
        return self._on_all("resume", [(shared,)] * len(self._remotes))

    def _on_first(self, method: str) -> Any:
        return self._remotes[0].wait(self._remotes[0].actor.call.remote(method))

    def _on_all(self, method: str, arguments: list[tuple[Any, ...]]) -> Any:
        """The first one's result. An error of any is raised at once: the others would wait for it for ever."""
        calls = {
            remote.actor.call.remote(method, *own): remote for remote, own in zip(self._remotes, arguments, strict=True)
        }
        return _results(calls)[next(iter(calls))]


def _results(calls: Mapping[Any, Remote], late: Callable[[list[Remote]], None] = lambda _: None) -> dict[Any, Any]:
    """What each call gives. The first error is raised at once; `late` is told now and then whom we still wait for."""
    results: dict[Any, Any] = {}
    while waiting := [call for call in calls if call not in results]:
        ended, _ = ray.wait(waiting, timeout=_PATIENCE)
        for call in ended:
            results[call] = calls[call].wait(call)
        if not ended:
            late([calls[call] for call in waiting])
    return results


def _still_starting(remotes: list[Remote]) -> None:
    waiting = ", ".join(remote.role for remote in remotes)
    print(f"still starting: {waiting}; Ray has {ray.available_resources()} free for them", flush=True)


class _Crew:
    """The actors of a run: makes engines and learners as the config says, and ends them all."""

    def __init__(self, config: Config, base: str, run: str) -> None:
        self.config, self.base, self.run = config, base, run
        self.remotes: list[Remote] = []
        self.over = False
        self.cuda = ray.cluster_resources().get("GPU", 0) > 0
        at_once = config.engine.replicas + (config.max_staleness > 0)  # processes that compute at the same time
        self.share = max(1, machine.cores() // at_once)
        self.put = lru_cache(maxsize=config.max_staleness + 2)(ray.put)

    def wait(self) -> None:
        """Until all are built."""
        _results({remote.built: remote for remote in self.remotes}, _still_starting)

    def engine(self, task: Task, number: int, version: int) -> RemoteEngine:
        settings = self.config.engine
        environment = machine.engine_environment(settings.threads or self.share, settings.kv_cache_gib, self.cuda)
        reserved = settings.cpus, settings.gpus * settings.tensor_parallel_size * self.cuda, environment
        made_of = self.config, self.base, task.chat.stop_token_ids, task.stop, number, version
        made = RemoteEngine(self.put, f"engine {number}", *reserved, ENGINE, *made_of)
        self.remotes.append(made)
        return made

    def another_engine(self, task: Task, version: int, number: int) -> Engine:
        """One that is ready, in place of one that died. Raises RloraError where it is not in time."""
        if self.over:
            raise RloraError("engine: the run is over")
        made, deadline = self.engine(task, number, version), time.monotonic() + _START

        def late(remotes: list[Remote]) -> None:
            _still_starting(remotes)
            if time.monotonic() > deadline:
                raise RloraError(f"engine {number}: it was not ready after {_START:.0f} s")

        try:
            _results({made.built: made}, late)
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
            made.append(Remote(role, *reserved, "rlora.core.learner:Learner", self.config, self.base, self.run))
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
    with _crew(config, task.base, run) as crew:
        learners = crew.learners() if learn else []
        engines = [crew.engine(task, number, version) for number in range(config.engine.replicas)]
        pools = crew.pools(task)
        crew.wait()
        room, engine = 2 * config.engine.max_num_seqs, partial(crew.another_engine, task, version)
        fleet = Fleet(engine, cast(list[Engine], engines), room, config.engine.patience, config.restarts)
        loop = AgentLoop(task, fleet, Scoring(config, pools, len(task.prompts)))
        try:
            yield cast(Learner, _Ranks(crew.learners, learners, config.restarts)), fleet, loop
        finally:
            fleet.stop()
            loop.close()


@contextmanager
def learning(config: Config, base: str, run: str) -> Iterator[Learner]:
    """The learner of `run` alone, in the environment that it has beside engines."""
    with _crew(config, base, run) as crew:
        learners = crew.learners()
        crew.wait()
        yield cast(Learner, _Ranks(crew.learners, learners, config.restarts))


@contextmanager
def _crew(config: Config, base: str, run: str) -> Iterator[_Crew]:
    """A crew on a Ray cluster; on leaving all of it ends."""
    join_ray()
    machine.on_signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # `ray job stop` sends it; Ray's own handler cleans nothing up
    crew = _Crew(config, base, run)
    try:
        yield crew
    finally:
        with machine.undisturbed():
            crew.end()
            ray.shutdown()
