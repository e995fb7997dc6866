"""Ray's home: the learner and the engines as actors, and nothing left behind when they end."""

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from rlora import machine
from rlora.config import Config, load
from rlora.learner import Learner
from rlora.records import Engine, RloraError
from rlora.task import Task

_PATIENCE = 30.0  # seconds until we say that Ray has found no place for an actor


class _Actor:
    """Runs in a Ray actor's process and holds one plain object. Built by a call, so that its errors come back whole."""

    def build(self, spec: str, *arguments: Any) -> None:
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


class _Remote:
    """An actor seen as the plain object it holds: a call waits for its result and raises the object's own error."""

    def __init__(self, role: str, cpus: float, gpus: float, environment: dict[str, str], spec: str, *arguments: Any):
        options = {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}
        self.role: str = role
        self.actor = cast(Any, ray.remote(_Actor).options(**options).remote())
        self.placed = self.actor.place.remote()
        self.built = self.actor.build.remote(spec, *arguments)

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: self.wait(self.actor.call.remote(method, *arguments))

    def wait(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise error.cause from error  # which shows where, in the actor
        except RayError as error:
            raise RloraError(f"the process of the {self.role} died: {error}") from error


class _Ranks:
    """Learners that share each update, seen as one: the first answers, and what changes them is called on all."""

    def __init__(self, remotes: list[_Remote]) -> None:
        self.remotes = remotes
        if len(remotes) > 1:
            address = ray.get(remotes[0].actor.address.remote())
            self.on_all("join", [(address, rank, len(remotes)) for rank, _ in enumerate(remotes)])

    def __getattr__(self, method: str) -> Any:
        if method in ("update", "resume"):
            return lambda *arguments: self.on_all(method, [tuple(map(ray.put, arguments))] * len(self.remotes))
        return getattr(self.remotes[0], method)

    def on_all(self, method: str, arguments: list[tuple[Any, ...]]) -> Any:
        """The first one's result. An error of any is raised at once: the others would wait for it for ever."""
        calls = {
            remote.actor.call.remote(method, *own): remote for remote, own in zip(self.remotes, arguments, strict=True)
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


@contextmanager
def start(
    config: Config, task: Task, run: str, version: int = 0, learn: bool = True
) -> Iterator[tuple[Learner, list[Engine]]]:
    """The learner of `run` (none, unless `learn`) and `engine.replicas` engines, placed by Ray.

    `learner.replicas` learners are seen as one. `version` is the first one that will be served.

    Joins the Ray cluster of this job or machine, or starts one that ends with it. On leaving, however that comes
    about, every process is gone and so are its files in RAM.
    """
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise RloraError(
            f"Ray: {error} If that cluster has ended, `ray stop` forgets it; RAY_ADDRESS=local starts one for this run"
        ) from error
    _on_signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `ray job stop` sends it; Ray's own handler cleans nothing up
    remotes: list[_Remote] = []
    try:
        cuda = ray.cluster_resources().get("GPU", 0) > 0
        settings = config.engine
        at_once = settings.replicas + (config.max_staleness > 0)  # processes that compute at the same time
        share = max(1, machine.cores() // at_once)
        environment = machine.engine_environment(settings.threads or share, settings.kv_cache_gib, cuda)
        for replica in range(settings.replicas):
            reserved = settings.cpus, settings.gpus * settings.tensor_parallel_size * cuda, environment
            made_of = config, task.base, task.stop_token_ids, replica, version
            remotes.append(_Remote(f"engine {replica}", *reserved, "rlora.engine:Engine", *made_of))
        if learn:
            learner = config.learner
            if cuda and learner.replicas > 1 and learner.gpus <= 0.5:
                raise RloraError(
                    f"learner.gpus = {learner.gpus}: {learner.replicas} learners might share a GPU, and NCCL needs one "
                    "for each; set learner.gpus to 1"
                )
            cores = share if config.max_staleness else machine.cores()
            environment = machine.learner_environment(learner.threads or max(1, cores // learner.replicas))
            reserved = learner.cpus, learner.gpus * cuda, environment
            for rank in range(learner.replicas):
                role = f"learner {rank}" if learner.replicas > 1 else "learner"
                remotes.append(_Remote(role, *reserved, "rlora.learner:Learner", config, task.base, run))
        _results({remote.built: remote for remote in remotes}, _still_starting)
        engines, learners = remotes[: settings.replicas], remotes[settings.replicas :]
        yield cast(Learner, _Ranks(learners)), cast(list[Engine], engines)
    finally:
        # a second Ctrl-C must not stop the clean-up half way
        before = {number: _on_signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        _stop(remotes)
        for number, handler in before.items():
            _on_signal(number, handler)


def _on_signal(number: signal.Signals, handler: Any) -> Any:
    """Set a signal's handler and return the one before; only the main thread can, elsewhere nothing changes."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(number, handler)
    return None


def _stop(remotes: list[_Remote]) -> None:
    """End the actors and Ray, and remove what killed processes leave in this machine's RAM file system."""
    here = ray.get_runtime_context().get_node_id()
    pids = []
    for remote in remotes:
        with suppress(RayError):  # it never ran, or it is dead
            node, pid = ray.get(remote.placed, timeout=1)
            pids += [pid] if node == here else []
    ray.wait([remote.actor.call.remote("close") for remote in remotes], num_returns=len(remotes), timeout=2)
    for remote in remotes:
        ray.kill(remote.actor)
    ray.shutdown()
    for pid in pids:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        shutil.rmtree(machine.adapter_directory(pid), ignore_errors=True)
        for lock in machine.ram_directory().glob(f"__KMP_REGISTERED_LIB_{pid}_*"):  # of Intel's OpenMP
            lock.unlink(missing_ok=True)
