"""Ray's home: the learner and the engines as actors, and nothing left behind when they end."""

import asyncio
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayActorError, RayError, RayTaskError

from rlora import machine
from rlora.core.learner import Learner
from rlora.engine.scratch import remove_leftovers
from rlora.plugin import load
from rlora.records import Adapter, Case, Engine, EngineLostError, Group, Proof, RloraError
from rlora.rollout.fleet import Fleet
from rlora.rollout.player import AgentLoop
from rlora.rollout.task import Task, setup_of
from rlora.scoring.scoring import Scoring
from rlora.scoring.worker import Turn
from rlora.settings import Config

ENGINE = "rlora.engine.vllm_engine:Engine"
POOL = "rlora.scoring.pool:Pool"
_PATIENCE = 30.0  # seconds until we say that Ray has found no place for an actor
_START = 1800.0  # seconds in which an engine that replaces another has to be ready
_ANSWER = 10.0  # seconds in which the head of a cluster has to take a connection
_ADDRESS = "give HOST:PORT of the head node, as `ray start --head` prints it, or local for a cluster of this run's own"
_GONE = "if that cluster has ended, `ray stop` forgets it; RAY_ADDRESS=local starts one for this run"


class _Actor:
    """Runs in a Ray actor's process and holds one plain object. Built by a call, so that its errors come back whole."""

    def build(self, spec: str, *arguments: Any) -> None:
        remove_leftovers()  # on each node where anything of a run is built
        self.object = load("actor", spec)(*arguments)

    def place(self) -> tuple[str, int]:
        """The node and the process this is."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def address(self) -> str:
        """A free port of this node, as host:port."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.object, method)(*arguments)


class _EngineActor(_Actor):
    """Its calls return at once, in their order, and settle when the object's futures do."""

    async def call(self, method: str, *arguments: Any) -> Any:
        return await asyncio.wrap_future(super().call(method, *arguments))


class _PoolActor(_EngineActor):
    """Where its process dies Ray builds it anew, and gives it again what it was at."""

    def __init__(self, *made_of: Any) -> None:
        self.build(POOL, *made_of)


class _LostError(RloraError):
    """The process of an actor died."""


class _Remote:
    """An actor that holds a plain object."""

    kind: type[_Actor] = _Actor
    lost: type[RloraError] = _LostError

    def __init__(self, role: str, cpus: float, gpus: float, environment: dict[str, str], spec: str, *arguments: Any):
        options = {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}
        self.role: str = role
        self.actor = cast(Any, ray.remote(self.kind).options(**options).remote())
        self.placed = self.actor.place.remote()
        self.built = self.actor.build.remote(spec, *arguments)

    def wait(self, reference: Any) -> Any:
        """What a call on it gives; raises the object's own error."""
        try:
            return ray.get(reference)
        except RayError as error:
            raise self.own(error) from error  # which shows where, in the actor

    def own(self, error: RayError) -> Exception:
        """The object's error behind one of Ray's; `lost` where its process died."""
        if isinstance(error, RayTaskError):
            return cast(Exception, error.cause)
        return self.lost(f"the process of the {self.role} died: {error}")

    def future(self, reference: Any) -> Future[Any]:
        """Of what a call on it gives; it raises the object's own error."""
        called: Future[Any] = Future()

        def settle(done: Future[Any]) -> None:
            if error := done.exception():
                called.set_exception(self.own(error) if isinstance(error, RayError) else error)
            else:
                called.set_result(done.result())

        reference.future().add_done_callback(settle)
        return called


class _RemotePool(_Remote):
    """Processes that score, in an actor."""

    def __init__(self, cpus: float, *made_of: Any) -> None:
        options = {"num_cpus": cpus, "scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": -1}
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        self.role = "reward functions"
        self.actor = cast(Any, ray.remote(_PoolActor).options(**options, runtime_env=environment).remote(*made_of))
        self.built = self.placed = self.actor.place.remote()

    def do(self, of: Case | Turn) -> Future[Any]:
        """`Pool.do`."""
        return self.future(self.actor.call.remote("do", of))


class _RemoteEngine(_Remote):
    """An engine in an actor: a call returns a future. `share` puts an adapter into Ray's object store, once for all."""

    kind = _EngineActor
    lost = EngineLostError

    def __init__(self, share: Callable[[Adapter], Any], *made_of: Any) -> None:
        self.share = share
        self.closing: threading.Thread | None = None
        super().__init__(*made_of)

    def load(self, adapter: Adapter) -> Future[Proof]:
        return self._call("load", self.share(adapter))

    def __getattr__(self, method: str) -> Any:
        return partial(self._call, method)

    def close(self) -> None:
        self.closing = threading.Thread(target=_end, args=([self],), daemon=True)
        self.closing.start()

    def _call(self, method: str, *arguments: Any) -> Future[Any]:
        return self.future(self.actor.call.remote(method, *arguments))


class _Ranks:
    """Learners that share each update, seen as one: the first answers, and what changes them is called on all.

    Where one dies, all are made anew by `make`, go on from the last state, and do the update again; after `restarts`
    times in a row RloraError is raised.
    """

    def __init__(self, make: Callable[[], list[_Remote]], remotes: list[_Remote], restarts: int) -> None:
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
                if not (isinstance(error, _LostError) or self._one_died()):
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
        _end(self._remotes)
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


def _results(calls: Mapping[Any, _Remote], late: Callable[[list[_Remote]], None] = lambda _: None) -> dict[Any, Any]:
    """What each call gives. The first error is raised at once; `late` is told now and then whom we still wait for."""
    results: dict[Any, Any] = {}
    while waiting := [call for call in calls if call not in results]:
        ended, _ = ray.wait(waiting, timeout=_PATIENCE)
        for call in ended:
            results[call] = calls[call].wait(call)
        if not ended:
            late([calls[call] for call in waiting])
    return results


def _still_starting(remotes: list[_Remote]) -> None:
    waiting = ", ".join(remote.role for remote in remotes)
    print(f"still starting: {waiting}; Ray has {ray.available_resources()} free for them", flush=True)


class _Crew:
    """The actors of a run: makes engines and learners as the config says, and ends them all."""

    def __init__(self, config: Config, base: str, run: str) -> None:
        self.config, self.base, self.run = config, base, run
        self.remotes: list[_Remote] = []
        self.over = False
        self.cuda = ray.cluster_resources().get("GPU", 0) > 0
        at_once = config.engine.replicas + (config.max_staleness > 0)  # processes that compute at the same time
        self.share = max(1, machine.cores() // at_once)
        self.put = lru_cache(maxsize=config.max_staleness + 2)(ray.put)

    def wait(self) -> None:
        """Until all are built."""
        _results({remote.built: remote for remote in self.remotes}, _still_starting)

    def engine(self, task: Task, number: int, version: int) -> _RemoteEngine:
        settings = self.config.engine
        environment = machine.engine_environment(settings.threads or self.share, settings.kv_cache_gib, self.cuda)
        reserved = settings.cpus, settings.gpus * settings.tensor_parallel_size * self.cuda, environment
        made_of = self.config, self.base, task.chat.stop_token_ids, task.stop, number, version
        made = _RemoteEngine(self.put, f"engine {number}", *reserved, ENGINE, *made_of)
        self.remotes.append(made)
        return made

    def another_engine(self, task: Task, version: int, number: int) -> Engine:
        """One that is ready, in place of one that died. Raises RloraError where it is not in time."""
        if self.over:
            raise RloraError("engine: the run is over")
        made, deadline = self.engine(task, number, version), time.monotonic() + _START

        def late(remotes: list[_Remote]) -> None:
            _still_starting(remotes)
            if time.monotonic() > deadline:
                raise RloraError(f"engine {number}: it was not ready after {_START:.0f} s")

        try:
            _results({made.built: made}, late)
        except BaseException:
            made.close()
            raise
        return cast(Engine, made)

    def learners(self) -> list[_Remote]:
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
            made.append(_Remote(role, *reserved, "rlora.core.learner:Learner", self.config, self.base, self.run))
        self.remotes += made
        return made

    def pools(self, task: Task) -> list[_RemotePool]:
        scoring = self.config.scoring
        made_of = setup_of(self.config, task.agent), scoring.workers
        made = [_RemotePool(scoring.cpus, *made_of) for _ in range(scoring.replicas)]
        self.remotes += made
        return made

    def end(self) -> None:
        self.over = True
        engines = [remote for remote in self.remotes if isinstance(remote, _RemoteEngine)]
        closing = {remote: remote.closing for remote in engines if remote.closing}
        for thread in closing.values():
            thread.join(timeout=15)
        _end([remote for remote in self.remotes if remote not in closing])


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


def join_ray() -> None:
    """Join the Ray cluster of this job or machine, or start one. Raises RloraError, in a sentence, where it can't."""
    asked = os.environ.get("RAY_ADDRESS", "")
    address = asked or ray._private.utils.read_ray_address() or "local"  # what `ray start` has left word of
    where = f"RAY_ADDRESS = {asked!r}" if asked else f"the cluster at {address} that `ray start` began"
    if not address.startswith("ray://") and address not in ("auto", "local"):
        _check_answers(address, where)
    try:
        with _patience_of_ray(address):
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        ray.shutdown()
        if address == "local":
            raise RloraError(f"Ray: no cluster could be started: {_first_sentence(error)}") from error
        raise RloraError(f"Ray: {where}: {_reason(error)}") from error


def _check_answers(address: str, where: str) -> None:
    """Ray itself waits for minutes where nothing answers."""
    host, _, port = address.rpartition(":")
    if not host.strip() or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise RloraError(f"Ray: {where} is no address; {_ADDRESS}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except OSError as error:
        raise RloraError(f"Ray: {where}: nothing answers there ({error.strerror or error}); {_GONE}") from error


@contextmanager
def _patience_of_ray(address: str) -> Iterator[None]:
    """One attempt, of half a minute, to join a cluster: Ray makes twenty of them."""
    name = "RAY_gcs_server_port_wait_time_s"
    if address == "local" or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _reason(error: BaseException) -> str:
    """Why Ray could not be joined, and what to do, in a sentence."""
    told, cause = "", cast(BaseException | None, error)
    while cause:
        told, cause = f"{told}\n{cause}", cause.__cause__ or cause.__context__
    versions = re.findall(r"^ *(?:Ray|Python): (\S+)$", told, re.MULTILINE)
    if "Version mismatch" in told and len(versions) >= 4:
        return (
            f"it runs Ray {versions[0]} on Python {versions[1]}, and this process Ray {versions[2]} on Python "
            f"{versions[3]}; use the same versions in both, or RAY_ADDRESS=local for a cluster of this run's own"
        )
    if isinstance(error, AuthenticationError) or re.search(
        r"unauthenticated|authentication token", told, re.IGNORECASE
    ):
        return (
            "it wants a token, and this process has none or another; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to what `ray get-auth-token` prints on its head node"
        )
    if "Failed to connect" in told:
        return f"what answers there is no head node that Ray {ray.__version__} can speak with; {_GONE}"
    return f"{_first_sentence(error)}; {_GONE}"


def _first_sentence(error: BaseException) -> str:
    first = re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".")
    return first or type(error).__name__


def _end(remotes: Sequence[_Remote]) -> None:
    """End actors, those that died too, and remove what killed processes leave in this machine's RAM file system."""
    if not ray.is_initialized():  # it has ended meanwhile, and all of it
        return
    with suppress(RayError):
        here = ray.get_runtime_context().get_node_id()
        pids = []
        for remote in remotes:
            with suppress(RayError):  # it never ran
                node, pid = ray.get(remote.placed, timeout=1)
                pids += [pid] if node == here else []
        ray.wait([remote.actor.call.remote("close") for remote in remotes], num_returns=len(remotes), timeout=2)
        for remote in remotes:
            ray.kill(remote.actor)
        for pid in pids:
            deadline = time.monotonic() + 10
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        remove_leftovers()
