"""Ray actors that hold a plain object: calls to the object, and termination of the actors."""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from rlora import machine
from rlora.cards import MEMORY_ADVICE
from rlora.cluster.joining import first_sentence
from rlora.engine.scratch import remove_leftovers
from rlora.plugin import load
from rlora.records import Adapter, EngineLostError, Receipt, RewardInput, RloraError
from rlora.rollout.requests import running_future
from rlora.scoring.worker import EnvTurn

_log = logging.getLogger(__name__)

_PATIENCE = 30.0  # seconds without a result after which `wait_for_results` reports
POOL = "rlora.scoring.pool:Pool"


class _Actor:
    """Holds one plain object in a Ray actor's process. `build` is a call, not __init__, so that errors keep their type.

    A call blocks the actor until the object's method returns.
    """

    def prepare(self, spec: str) -> None:
        """Import the object's module. Errors are ignored here, because `build` raises them again."""
        with suppress(Exception), machine.importing():
            load("actor", spec)

    def build(self, role: str, spec: str, *arguments: Any) -> None:
        logging.basicConfig(format=f"{role}: %(message)s", level=logging.INFO)  # into Ray's log of this process
        remove_leftovers()  # of killed processes on this node
        if ray.get_runtime_context().get_accelerator_ids().get("GPU"):
            from rlora.device import check_usable  # imports torch, which a pool of reward workers does not need

            check_usable()  # else torch would silently use the CPU
        with _memory_advice():
            self.object = load("actor", spec)(*arguments)

    def process(self) -> tuple[str, int]:
        """Return the id of this node and the pid of this process."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def address(self) -> str:
        """Return this node's address with a free TCP port, as host:port."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def call(self, method: str, *arguments: Any) -> Any:
        with _memory_advice():
            return getattr(self.object, method)(*arguments)


@contextmanager
def _memory_advice() -> Iterator[None]:
    """Replace torch's out-of-memory error by a RloraError that names the settings to change."""
    try:
        yield
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # not imported in a pool of reward workers
        if torch and isinstance(error, torch.OutOfMemoryError):
            raise RloraError(f"GPU: out of memory ({first_sentence(error)}). {MEMORY_ADVICE}") from error
        raise


class _EngineActor(_Actor):
    """An actor whose object returns futures. Calls start in order and do not block each other."""

    async def call(self, method: str, *arguments: Any) -> Any:
        return await asyncio.wrap_future(super().call(method, *arguments))


class _PoolActor(_EngineActor):
    """A pool of reward workers. If its process dies, Ray restarts the actor and repeats the calls in flight."""

    def __init__(self, *arguments: Any) -> None:
        self.build("reward functions", POOL, *arguments)


class LostError(RloraError):
    """The process of an actor died while a call was in flight, or before the call."""


class Remote:
    """The driver's handle of a Ray actor that holds one object, such as a learner.

    `spec` names the object's class as module:name. The actor's process imports the module ahead, and `build` constructs
    the object. `role` names the actor in messages, and `options` are those of `ray.remote`.
    """

    kind: type[_Actor] = _Actor
    lost_error: type[RloraError] = LostError

    def __init__(self, role: str, options: Mapping[str, Any], spec: str) -> None:
        self.role, self.spec = role, spec
        self.built: Any = None  # a reference once `build` was called
        self.actor = cast(Any, ray.remote(self.kind).options(**options).remote())
        self.process = self.actor.process.remote()
        self.actor.prepare.remote(spec)

    def build(self, *arguments: Any) -> None:
        """Start constructing the object in the actor, without blocking. Waiting for `built` raises the errors."""
        self.built = self.actor.build.remote(self.role, self.spec, *arguments)

    def wait(self, reference: Any) -> Any:
        """Block until a call has finished, and return its result. `reference` is the Ray object reference of the call.

        Raises the exception that the remote method raised, or `lost_error` if the actor's process died.
        """
        try:
            return ray.get(reference)
        except RayError as error:
            raise self.cause(error) from error  # Ray's error has the traceback in the actor

    def cause(self, error: RayError) -> Exception:
        """Return the exception behind Ray's `error`.

        This is the exception that the remote method raised, or a `lost_error` if the actor's process died.
        """
        if isinstance(error, RayTaskError):
            return cast(Exception, error.cause)
        log = "its output is in /tmp/ray/session_latest/logs on its node"
        return self.lost_error(f"the process of the {self.role} died ({log}): {error}")

    def future(self, reference: Any) -> Future[Any]:
        """Return a future of a call's result, without blocking. The future raises the same exceptions as `wait`.

        The call goes on if a coroutine that awaits the future is cancelled, so `cancel` of the future has no effect.
        """
        future = running_future()

        def settle(call: Future[Any]) -> None:
            if error := call.exception():
                future.set_exception(self.cause(error) if isinstance(error, RayError) else error)
            else:
                future.set_result(call.result())

        reference.future().add_done_callback(settle)
        return future


class RemotePool(Remote):
    """A `scoring.pool.Pool` of reward workers in an actor that reserves `cpus` Ray CPUs.

    `arguments` are those of `Pool`. If the actor's process dies, Ray restarts it and repeats the calls in flight.
    """

    def __init__(self, cpus: float, *arguments: Any) -> None:
        options = {"num_cpus": cpus, "scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": -1}
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        self.role = "reward functions"
        self.actor = cast(Any, ray.remote(_PoolActor).options(**options, runtime_env=environment).remote(*arguments))
        self.built = self.process = self.actor.process.remote()

    def submit(self, request: RewardInput | EnvTurn) -> Future[Any]:
        """Call `Pool.submit` in the actor, without blocking, and return a future of the result."""
        return self.future(self.actor.call.remote("submit", request))


class RemoteEngine(Remote):
    """A `vllm_engine.Engine` in an actor, with the same methods, such as `generate`.

    No method waits for the engine. Each returns a `concurrent.futures.Future`, except `close`, which returns None. The
    future raises the exception of the engine's method, or EngineLostError if the actor's process died.

    `share` returns a reference to an adapter in Ray's object store. `load` passes the reference on, so that several
    engines read one copy of the adapter.
    """

    kind = _EngineActor
    lost_error = EngineLostError

    def __init__(self, share: Callable[[Adapter], Any], role: str, options: Mapping[str, Any], spec: str) -> None:
        self.share = share
        self.closing: threading.Thread | None = None
        super().__init__(role, options, spec)

    def load(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> Future[Receipt]:
        return self._call("load", self.share(adapter), oldest, kept)

    def __getattr__(self, method: str) -> Any:
        return partial(self._call, method)

    def close(self) -> None:
        """Terminate the actor in the thread `closing`, without blocking."""
        self.closing = threading.Thread(target=end_actors, args=([self],), daemon=True)
        self.closing.start()

    def _call(self, method: str, *arguments: Any) -> Future[Any]:
        return self.future(self.actor.call.remote(method, *arguments))


def end_actors(remotes: Sequence[Remote]) -> None:
    """Terminate actors, and remove the files that killed processes have left in RAM on this machine.

    Calls `close` in each actor, waits up to 2 seconds for all calls, and kills the actors. Blocks until the processes
    on this node have ended, for up to 10 seconds each. Actors that have died before are ignored.
    """
    if not ray.is_initialized():  # Ray was shut down meanwhile, with all actors
        return
    with suppress(RayError):
        this_node = ray.get_runtime_context().get_node_id()
        pids = []
        for remote in remotes:
            with suppress(RayError):  # it never ran
                node, pid = ray.get(remote.process, timeout=1)
                pids += [pid] if node == this_node else []
        ray.wait([remote.actor.call.remote("close") for remote in remotes], num_returns=len(remotes), timeout=2)
        for remote in remotes:
            ray.kill(remote.actor)
        for pid in pids:
            deadline = time.monotonic() + 10
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        remove_leftovers()


def wait_for_results(
    calls: Mapping[Any, Remote], on_wait: Callable[[list[Remote]], None] = lambda _: None
) -> dict[Any, Any]:
    """Block until all calls have finished, and return their results.

    The keys of `calls`, and of the result, are Ray object references; the values are the called remotes. If a call
    fails, the exception of `Remote.wait` is raised immediately, while the other calls continue. After every 30 seconds
    without a result `on_wait` is called with the remotes whose calls have not finished.
    """
    results: dict[Any, Any] = {}
    while waiting := [call for call in calls if call not in results]:
        ready, _ = ray.wait(waiting, timeout=_PATIENCE)
        for call in ready:
            results[call] = calls[call].wait(call)
        if not ready:
            on_wait([calls[call] for call in waiting])
    return results


def report_starting(remotes: list[Remote]) -> None:
    """Log which actors are still starting, and which resources of the Ray cluster are free."""
    roles = ", ".join(remote.role for remote in remotes)
    _log.info("still starting: %s; Ray has %s free for them", roles, ray.available_resources())
