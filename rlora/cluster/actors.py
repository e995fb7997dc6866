"""Plain objects in Ray actors, and how they are called and ended."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from rlora import cards
from rlora.cluster.joining import first_sentence
from rlora.engine.scratch import remove_leftovers
from rlora.plugin import load
from rlora.records import Adapter, EngineLostError, Receipt, RewardInput, RloraError
from rlora.scoring.worker import EnvTurn

POOL = "rlora.scoring.pool:Pool"


class _Actor:
    """Runs in a Ray actor's process and holds one plain object. Built by a call, so that its errors come back whole."""

    def build(self, spec: str, *arguments: Any) -> None:
        remove_leftovers()  # on each node where anything of a run is built
        if ray.get_runtime_context().get_accelerator_ids().get("GPU"):
            cards.check_usable()  # before anything goes to the CPU in its place
        with _told_out_of_memory():
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
        with _told_out_of_memory():
            return getattr(self.object, method)(*arguments)


@contextmanager
def _told_out_of_memory() -> Iterator[None]:
    """Name the settings that help where a card's memory is not enough."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RloraError(f"GPU: out of memory ({first_sentence(error)}). {cards.LESS}") from error


class _EngineActor(_Actor):
    """Its calls return at once, in their order, and settle when the object's futures do."""

    async def call(self, method: str, *arguments: Any) -> Any:
        return await asyncio.wrap_future(super().call(method, *arguments))


class _PoolActor(_EngineActor):
    """Where its process dies Ray builds it anew, and gives it again what it was at."""

    def __init__(self, *made_of: Any) -> None:
        self.build(POOL, *made_of)


class LostError(RloraError):
    """The process of an actor died."""


class Remote:
    """An actor that holds a plain object."""

    kind: type[_Actor] = _Actor
    lost: type[RloraError] = LostError

    def __init__(self, role: str, options: Mapping[str, Any], spec: str, *arguments: Any):
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


class RemotePool(Remote):
    """Processes that score, in an actor."""

    def __init__(self, cpus: float, *made_of: Any) -> None:
        options = {"num_cpus": cpus, "scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": -1}
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        self.role = "reward functions"
        self.actor = cast(Any, ray.remote(_PoolActor).options(**options, runtime_env=environment).remote(*made_of))
        self.built = self.placed = self.actor.place.remote()

    def do(self, of: RewardInput | EnvTurn) -> Future[Any]:
        """`Pool.do`."""
        return self.future(self.actor.call.remote("do", of))


class RemoteEngine(Remote):
    """An engine in an actor: a call returns a future. `share` puts an adapter into Ray's object store, once for all."""

    kind = _EngineActor
    lost = EngineLostError

    def __init__(self, share: Callable[[Adapter], Any], *made_of: Any) -> None:
        self.share = share
        self.closing: threading.Thread | None = None
        super().__init__(*made_of)

    def load(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> Future[Receipt]:
        return self._call("load", self.share(adapter), oldest, kept)

    def __getattr__(self, method: str) -> Any:
        return partial(self._call, method)

    def close(self) -> None:
        self.closing = threading.Thread(target=end_actors, args=([self],), daemon=True)
        self.closing.start()

    def _call(self, method: str, *arguments: Any) -> Future[Any]:
        return self.future(self.actor.call.remote(method, *arguments))


def end_actors(remotes: Sequence[Remote]) -> None:
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
