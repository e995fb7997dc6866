"""The engines of a job behind one interface: routing by load, versions on demand, replay after an engine dies."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from rlora.records import (
    Adapter,
    DeliveryError,
    Engine,
    EngineLostError,
    Group,
    NotLoadedError,
    Prompt,
    Receipt,
    RloraError,
    Sampling,
)
from rlora.rollout.requests import FleetStats, Replica, Request, check_receipt, policy_left

_log = logging.getLogger(__name__)

_ATTEMPTS = 5  # engines that may die while they sample a prompt before the prompt is considered the cause
_PAUSE = 1.0  # seconds between two attempts to start an engine


class Fleet:
    """Engines that may die, join and leave while prompts are in flight.

    A fleet serves several policies. Each prompt goes to the engine with the fewest completions in flight, under the
    latest delivered version of the prompt's policy. If requests wait, the policy with the fewest completions in flight
    goes first. When an engine dies, the prompts that the engine had in flight are sampled again on other engines, under
    the same versions, and a replacement is started.

    `start(number)` must start an engine and block until the engine is ready; `engines` are running already. An engine
    receives prompts until `room` completions are in flight there; further requests wait in one queue for all engines.
    An engine that does not load a new version within `patience` seconds is considered dead. After `restarts`
    consecutive failed starts no replacement is started. When no engine remains, every prompt fails with RloraError.

    All methods are thread-safe.
    """

    def __init__(
        self, start: Callable[[int], Engine], engines: Sequence[Engine], room: int, patience: float, restarts: int
    ) -> None:
        self._start_engine = start
        self._room, self._patience, self._restarts = room, patience, restarts
        self._replicas = [Replica(engine, number) for number, engine in enumerate(engines)]
        self._target = self._next_number = len(engines)  # engines wanted; number of the next one to be started
        self._starting = 0  # engines that are starting now
        self._failed, self._last_failed = 0, -1  # consecutive failed starts, and the number of the last one
        self._busy_seconds = self._kv_seconds = self._queued_seconds = 0.0
        self._queue: deque[Request] = deque()
        self._latest: dict[str, Adapter] = {}  # by policy: the adapter that every engine has or is loading
        self._departed: set[str] = set()  # policies that left
        self._delivered: dict[str, Adapter] = {}  # by policy: the last adapter that was swapped in; samples its prompts
        self._failure: RloraError | None = None
        self._changed = threading.Condition()  # its lock guards all of the above
        self._callbacks = ThreadPoolExecutor(1)  # runs the callbacks of the engines' futures in order
        self._lost = self._replayed = 0

    def swap(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> list[Receipt]:
        """Deliver `adapter` to every engine, and sample its policy's prompts under this version from now on.

        Blocks until every engine has loaded and verified the version or is considered dead; if all are dead, until a
        replacement serves the version. Returns the receipts of the other engines. Requests in flight continue under
        their versions, except that requests for versions of the policy below `oldest`, other than `kept`, are
        cancelled. Raises DeliveryError if an engine does not serve the version, and RloraError if no engine remains.
        """
        with self._changed:
            self._departed.discard(adapter.policy)
            self._latest[adapter.policy] = adapter
            loads = [(adapter, replica, replica.engine.load(adapter, oldest, kept)) for replica in self._replicas]
        try:
            receipts = self._wait_for_receipts(loads)
        except RloraError:
            with self._changed:
                self._latest.pop(adapter.policy, None)  # engines that join must not load the refused adapter
                if previous := self._delivered.get(adapter.policy):
                    self._latest[adapter.policy] = previous
            raise
        with self._changed:
            self._delivered[adapter.policy] = adapter
            self._dispatch_queue()
        return receipts

    def _wait_for_receipts(self, loads: Sequence[tuple[Adapter, Replica, Future[Receipt]]]) -> list[Receipt]:
        """Return the receipts, and replace engines without one. Raises RloraError if no engine remains."""
        deadline = time.monotonic() + self._patience
        receipts = []
        for adapter, replica, load in loads:
            try:
                receipts.append(check_receipt(adapter, load.result(max(0.0, deadline - time.monotonic()))))
            except (EngineLostError, TimeoutError) as error:
                with self._changed:
                    self._replace(replica, error)
        with self._changed:
            self._changed.wait_for(lambda: self._replicas or self._failure or not self._target)
            if self._failure:
                raise self._failure
        return receipts

    def generate(
        self, prompt: Prompt, sampling: Sampling, policy: str, adapter: Adapter | None = None, background: bool = False
    ) -> Request:
        """Queue a request for `sampling.group_size` unscored episodes of `prompt`, and return the request immediately.

        The request's future `group` raises all errors. The version is the policy's latest at the time when an engine
        has room. If `adapter` is given, the request is sampled under that version instead, and engines load the version
        if necessary. Such a request (a later turn of an episode, or a request that was in flight before a resume) goes
        before all other waiting requests. A request in the `background` goes after all others.
        """
        request = Request(prompt, sampling, policy, adapter=adapter, background=background)
        with self._changed:
            if policy in self._departed:
                request.group.set_exception(policy_left(policy))
            elif adapter and not background:
                self._queue.appendleft(request)
            else:
                self._queue.append(request)
            self._dispatch_queue()
        return request

    def resize(self, engines: int) -> None:
        """Change the number of engines, without blocking. Surplus engines finish their prompts, and are then closed."""
        with self._changed:
            if engines == self._target:  # fewer may be running because some could not be started: do not retry here
                return
            self._target = engines
            staying = [replica for replica in self._replicas if not replica.draining]
            for replica in staying[engines:]:
                replica.draining = True
                self._close_if_drained(replica)
            for _ in range(engines - len(staying) - self._starting):
                self._start()

    def leave(self, policy: str) -> None:
        """Cancel the requests of a policy (StaleError), and unload its versions from the engines without blocking."""
        with self._changed:
            self._departed.add(policy)
            self._latest.pop(policy, None)
            self._delivered.pop(policy, None)
            requests = [request for replica in self._replicas for request in replica.in_flight] + list(self._queue)
            for replica in self._replicas:
                replica.in_flight = [request for request in replica.in_flight if request.policy != policy]
                replica.engine.leave(policy)
            self._queue = deque(request for request in self._queue if request.policy != policy)
            for request in requests:
                if request.policy == policy:
                    request.group.set_exception(policy_left(policy))
            for replica in list(self._replicas):
                self._close_if_drained(replica)
            self._dispatch_queue()

    def check(self) -> None:
        """Replace engines that no longer respond. Raises RloraError if no engine remains.

        Each engine has to confirm between two steps that it has the latest version of each policy. Blocks until all
        engines have done so, or `patience` seconds have passed.
        """
        with self._changed:
            pairs = [(adapter, replica) for adapter in self._latest.values() for replica in self._replicas]
            loads = [(adapter, replica, replica.engine.load(adapter)) for adapter, replica in pairs]
        self._wait_for_receipts(loads)

    @property
    def engines(self) -> list[Engine]:
        """The engines that are running now."""
        with self._changed:
            return [replica.engine for replica in self._replicas]

    def stats(self) -> FleetStats:
        """Return the statistics so far. Blocks for at most 1 second; engines that take longer are not updated."""
        with self._changed:
            futures = {replica: replica.engine.stats() for replica in self._replicas}
        wait(futures.values(), timeout=1)
        stats = {
            replica: future.result() for replica, future in futures.items() if future.done() and not future.exception()
        }
        with self._changed:
            for replica, figures in stats.items():
                self._busy_seconds += (figures.busy_seconds - replica.busy_seconds) / len(futures)
                self._kv_seconds += (figures.kv_seconds - replica.kv_seconds) / len(futures)
                replica.busy_seconds, replica.kv_seconds = figures.busy_seconds, figures.kv_seconds
            canaries: dict[str, float] = {}
            for policy, canary in (pair for figures in stats.values() for pair in figures.canaries.items()):
                canaries[policy] = max(canary, canaries.get(policy, canary))
            return FleetStats(
                len(futures), self._busy_seconds, canaries, self._lost, self._replayed, self._kv_seconds,
                self._queued_seconds,
            )  # fmt: skip

    def stop(self) -> None:
        """Fail all requests, and start no more engines, without closing the engines. Does not block."""
        with self._changed:
            self._fail(RloraError("engine: the job has ended, so no more prompts are sampled"))
        self._callbacks.shutdown(wait=False, cancel_futures=True)

    # --- callers of the methods below hold the lock ---

    def _dispatch_queue(self) -> None:
        """Send queued requests to engines as long as an engine has room."""
        completions: Counter[str] = Counter()  # in flight, by policy
        for request in (request for replica in self._replicas for request in replica.in_flight):
            completions[request.policy] += request.sampling.group_size
        while self._queue and not self._failure:
            free = [replica for replica in self._replicas if self._has_room(replica)]
            if not free:
                break
            ready = [request for request in self._queue if request.adapter or request.policy in self._delivered]
            if not ready:
                break
            request = min(ready, key=lambda item: (item.background, item.adapter is None, completions[item.policy]))
            self._queue.remove(request)
            if not request.cancelled:
                request.adapter = request.adapter or self._delivered[request.policy]
                self._queued_seconds += 0.0 if request.background else time.monotonic() - request.queued
                completions[request.policy] += request.sampling.group_size
                self._dispatch(min(free, key=lambda replica: replica.completions), request)
        if self._failure:
            for request in self._queue:
                request.group.set_exception(self._failure)
            self._queue.clear()

    def _has_room(self, replica: Replica) -> bool:
        return not replica.draining and replica.completions < self._room

    def _dispatch(self, replica: Replica, request: Request) -> None:
        assert request.adapter is not None
        replica.in_flight.append(request)
        sampled = replica.engine.generate(request.prompt, request.sampling, request.adapter.version)
        sampled.add_done_callback(lambda done: self._call_later(self._on_sampled, replica, request, done))

    def _call_later(self, call: Callable[..., None], *arguments: Any) -> None:
        """Make the call with the lock held, on the callback thread: the engine's thread must not wait for the lock."""

        def locked() -> None:
            with self._changed:
                try:
                    call(*arguments)
                except Exception as error:  # a bug in the fleet: without this, callers would wait for ever
                    self._fail(RloraError(f"engine: {type(error).__name__}: {error}; report this bug"), error)

        with suppress(RuntimeError):  # `stop` was called
            self._callbacks.submit(locked)

    def _on_sampled(self, replica: Replica, request: Request, sampled: Future[Group]) -> None:
        if request not in replica.in_flight:  # its engine was lost; another engine samples it, and only that counts
            return
        error = sampled.exception()
        if isinstance(error, NotLoadedError) and request.adapter and not request.cancelled:
            # the engine does not hold this version, for example because it joined later
            loaded = replica.engine.load(request.adapter)
            loaded.add_done_callback(lambda done: self._call_later(self._on_loaded, replica, request, done))
            return
        if not error and replica.number > self._last_failed:
            self._failed = 0
        self._finish(replica, request, error, sampled)

    def _on_loaded(self, replica: Replica, request: Request, loaded: Future[Receipt]) -> None:
        """Send a request again after its engine has loaded its version."""
        if request not in replica.in_flight:
            return
        if error := loaded.exception():
            self._finish(replica, request, error)
        else:
            replica.in_flight.remove(request)
            self._dispatch(replica, request)

    def _finish(
        self, replica: Replica, request: Request, error: BaseException | None, sampled: Future[Group] | None = None
    ) -> None:
        if isinstance(error, EngineLostError):
            self._replace(replica, error)
            return
        replica.in_flight.remove(request)
        if error:
            request.group.set_exception(error)
        elif sampled:
            request.group.set_result(sampled.result())
        self._close_if_drained(replica)
        self._dispatch_queue()

    def _replace(self, replica: Replica, error: BaseException) -> None:
        """Queue the requests of a lost engine again and start a replacement."""
        if replica not in self._replicas:
            return
        self._close(replica)
        self._lost += 1
        for request in reversed(replica.in_flight):
            request.attempts += 1
            if request.attempts < _ATTEMPTS:
                self._replayed += not request.cancelled
                request.queued = time.monotonic()
                self._queue.appendleft(request)
            else:
                message = f"engine: {_ATTEMPTS} engines died while they sampled {request.prompt.text!r}: {error}"
                request.group.set_exception(RloraError(f"{message}; remove this prompt from the env"))
        replica.in_flight.clear()
        if not replica.draining:
            self._restart_or_continue(error)
        self._dispatch_queue()

    def _close_if_drained(self, replica: Replica) -> None:
        if replica.draining and not replica.in_flight:
            self._close(replica)

    def _close(self, replica: Replica) -> None:
        self._replicas.remove(replica)
        replica.engine.close()

    def _start(self, pause: float = 0.0) -> None:
        threading.Thread(target=self._start_replica, args=(self._next_number, pause), daemon=True).start()
        self._starting += 1
        self._next_number += 1

    def _restart_or_continue(self, error: BaseException) -> None:
        """Start a replacement. If no more starts are allowed, continue on the remaining engines, or fail."""
        if self._failed < self._restarts and not isinstance(error, DeliveryError):
            self._start(pause=_PAUSE if self._failed else 0.0)
            return
        if any(not replica.draining for replica in self._replicas) or self._starting:
            _log.warning("engine: restart failed; training continues on the remaining engines: %s", error)
        else:
            message = f"engine: no engine is left, and {self._failed} consecutive starts failed ({error})"
            self._fail(RloraError(f"{message}; fix the cause, and continue a run with --resume"), error)

    def _fail(self, failure: RloraError, cause: BaseException | None = None) -> None:
        """Fail every request, now and from now on."""
        failure.__cause__ = cause
        self._failure = self._failure or failure
        for replica in self._replicas:
            for request in replica.in_flight:
                request.group.set_exception(self._failure)
            replica.in_flight.clear()
        self._changed.notify_all()
        self._dispatch_queue()

    # --- runs on a separate thread, without the lock ---

    def _start_replica(self, number: int, pause: float) -> None:
        """Start an engine, and add it once it serves the latest version of each policy, verified by receipts."""
        engine = None
        time.sleep(pause)
        try:
            engine = self._start_engine(number)
            loaded: dict[str, Adapter] = {}
            while True:
                with self._changed:
                    missing = [adapter for policy, adapter in self._latest.items() if loaded.get(policy) is not adapter]
                    if not missing:
                        for policy in loaded.keys() - self._latest.keys():
                            engine.leave(policy)
                        self._starting -= 1
                        self._replicas.append(Replica(engine, number))
                        self._changed.notify_all()
                        self._dispatch_queue()
                        return
                for adapter in missing:
                    check_receipt(adapter, engine.load(adapter).result(self._patience))
                    loaded[adapter.policy] = adapter
        except Exception as error:
            with self._changed:
                self._starting -= 1
                if engine:
                    engine.close()
                self._failed, self._last_failed = self._failed + 1, number
                if not self._failure:
                    self._restart_or_continue(error)


def wait_for(
    futures: Sequence[Future[Any]], count: int, seconds: float, patience: float, check: Callable[[], None]
) -> None:
    """Block until `count` of the futures are done, one of them has failed, or `seconds` have passed.

    After each `patience` seconds without a new result, calls `check`, which should look for engines that hang. Raises
    the errors of `check`, but not those of the futures.
    """
    deadline = time.monotonic() + seconds
    while len(pending := [future for future in futures if not future.done()]) > len(futures) - count:
        if any(future.done() and future.exception() for future in futures):
            return
        timeout = min(deadline - time.monotonic(), patience)
        if timeout <= 0:
            return
        done, _ = wait(pending, timeout, FIRST_COMPLETED)
        if not done and timeout == patience:
            check()
