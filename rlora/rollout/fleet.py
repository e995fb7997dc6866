"""The engines of a run, seen as one that holds every version it is asked for and loses no prompt."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rlora.records import (
    Adapter,
    DeliveryError,
    Engine,
    EngineLostError,
    Group,
    NotLoadedError,
    Prompt,
    Proof,
    RloraError,
    Sampling,
)

_ATTEMPTS = 5  # engines that a prompt may lose before it is taken for the cause
_PAUSE = 1.0  # seconds between two tries to start an engine


@dataclass(eq=False)
class Request:
    """A prompt given to a fleet."""

    prompt: Prompt
    sampling: Sampling
    group: Future[Group] = field(default_factory=Future)  # with unscored episodes
    adapter: Adapter | None = None  # it is sampled under, wherever it has to be sent again; None while it waits
    attempts: int = 0
    cancelled: bool = False  # nobody waits for it any more: it is not sent again

    @property
    def version(self) -> int | None:
        return None if self.adapter is None else self.adapter.version


@dataclass(eq=False)
class _Member:
    engine: Engine
    number: int
    busy_seconds: float = 0.0  # when it was asked last
    flying: list[Request] = field(default_factory=list)
    leaving: bool = False

    @property
    def completions(self) -> int:
        """Those in flight."""
        return sum(request.sampling.group_size for request in self.flying)


@dataclass(frozen=True)
class FleetStats:
    """Figures of a fleet since it began."""

    engines: int  # now
    busy_seconds: float  # in which engines have computed, each step's divided by the engines there were
    canary: float | None  # the farthest that one's was from the learner's, mean over its tokens, nats
    lost: int  # engines that died
    replayed: int  # prompts sampled again because of it


class Fleet:
    """Engines that may die, join and leave while prompts are in flight.

    A prompt goes to the engine with the fewest in flight, under the version that was swapped in last. Where an engine
    dies its prompts are sampled again elsewhere, under the same version, and another engine is started in its place.

    `start(number)` starts one and returns when it is ready; `engines` are those that were started already. An engine is
    given prompts until it has `room` completions in flight; the rest wait here for whichever has room first. One that
    has not taken a swap after `patience` seconds is taken for dead. After `restarts` failed starts in a row no more are
    tried, and once no engine is left every prompt fails with RloraError.
    """

    def __init__(
        self, start: Callable[[int], Engine], engines: Sequence[Engine], room: int, patience: float, restarts: int
    ) -> None:
        self._start_engine = start
        self._room, self._patience, self._restarts = room, patience, restarts
        self._members = [_Member(engine, number) for number, engine in enumerate(engines)]
        self._asked = self._started = len(engines)  # for, by `resize`, and ever
        self._starting = 0  # now
        self._failed, self._last_failed = 0, -1  # starts in a row, and the number of the last one
        self._busy_seconds = 0.0
        self._queue: deque[Request] = deque()
        self._newest: Adapter | None = None  # what every engine has or is given now
        self._adapter: Adapter | None = None  # what prompts are sampled under: the last one that was swapped in
        self._given_up: RloraError | None = None
        self._changed = threading.Condition()  # its lock guards all of the above
        self._calls = ThreadPoolExecutor(1)  # runs what engines' futures call back, one after the other
        self._lost = self._replayed = 0

    def swap(self, adapter: Adapter) -> list[Proof]:
        """Deliver `adapter` to every engine; prompts are sampled under it from now on. Returns each engine's proof.

        Requests in flight go on under their own versions. Raises DeliveryError where an engine serves something else,
        and RloraError where no engine is left.
        """
        with self._changed:
            self._newest = adapter
            loads = {member: member.engine.load(adapter) for member in self._members}
        deadline = time.monotonic() + self._patience
        proofs = []
        for member, load in loads.items():
            try:
                proofs.append(_checked(adapter, load.result(max(0.0, deadline - time.monotonic()))))
            except (EngineLostError, TimeoutError) as error:
                with self._changed:
                    self._lose(member, error)
        with self._changed:
            self._adapter = adapter
            self._send()
            self._changed.wait_for(lambda: self._members or self._given_up)
            if self._given_up:
                raise self._given_up
        return proofs

    def generate(self, prompt: Prompt, sampling: Sampling, adapter: Adapter | None = None) -> Request:
        """Sample `sampling.group_size` episodes under the version that is swapped in when an engine has room.

        With an `adapter` under that one, wherever it has to be loaded for it, and before all that waits: it is the
        next turn of an episode, or was in flight before.
        """
        request = Request(prompt, sampling, adapter=adapter)
        with self._changed:
            if adapter:
                self._queue.appendleft(request)
            else:
                self._queue.append(request)
            self._send()
        return request

    def resize(self, engines: int) -> None:
        """Have so many engines from now on. Those that are too many get no more prompts and end after their last."""
        with self._changed:
            if engines == self._asked:  # nothing new: fewer may be left because some can't be started
                return
            self._asked = engines
            staying = [member for member in self._members if not member.leaving]
            for member in staying[engines:]:
                member.leaving = True
                self._let_go(member)
            for _ in range(engines - len(staying) - self._starting):
                self._start()

    def check(self) -> None:
        """Find out which engines answer no more: each has to do so between two of its steps."""
        with self._changed:
            adapter = self._newest
        if adapter:
            self.swap(adapter)

    @property
    def engines(self) -> list[Engine]:
        """Those there are now."""
        with self._changed:
            return [member.engine for member in self._members]

    def stats(self) -> FleetStats:
        with self._changed:
            asked = {member: member.engine.stats() for member in self._members}
        wait(asked.values(), timeout=1)
        stats = {member: each.result() for member, each in asked.items() if each.done() and not each.exception()}
        with self._changed:
            for member, each in stats.items():
                self._busy_seconds += (each.busy_seconds - member.busy_seconds) / len(asked)
                member.busy_seconds = each.busy_seconds
            canary = max((each.canary for each in stats.values() if each.canary is not None), default=None)
            return FleetStats(len(asked), self._busy_seconds, canary, self._lost, self._replayed)

    def stop(self) -> None:
        """Start no more engines, and give nothing to those there are."""
        with self._changed:
            self._given_up = self._given_up or RloraError("the engines are stopped")
            self._changed.notify_all()
        self._calls.shutdown(wait=False, cancel_futures=True)

    # --- below, the lock is held ---

    def _send(self) -> None:
        """Hand out what is queued, as far as there is room."""
        while self._queue and self._adapter and not self._given_up:
            free = [each for each in self._members if not each.leaving and each.completions < self._room]
            if not free:
                break
            request = self._queue.popleft()
            if not request.cancelled:
                request.adapter = request.adapter or self._adapter
                self._give(min(free, key=lambda each: each.completions), request)
        if self._given_up:
            for request in self._queue:
                request.group.set_exception(self._given_up)
            self._queue.clear()

    def _give(self, member: _Member, request: Request) -> None:
        assert request.adapter is not None
        member.flying.append(request)
        sampled = member.engine.generate(request.prompt, request.sampling, request.adapter.version)
        sampled.add_done_callback(lambda done: self._later(self._settle, member, request, done))

    def _later(self, call: Callable[..., None], *arguments: Any) -> None:
        """Call with the lock held, on a thread of our own: not the one that settles an engine's future."""

        def locked() -> None:
            with self._changed:
                try:
                    call(*arguments)
                except Exception as error:  # a fault of ours: whoever waits is told, or would wait for ever
                    self._give_up(RloraError(f"engine: {type(error).__name__}: {error}"), error)

        with suppress(RuntimeError):  # stopped
            self._calls.submit(locked)

    def _settle(self, member: _Member, request: Request, sampled: Future[Group]) -> None:
        if request not in member.flying:  # its engine was lost: it is sampled elsewhere, and counts once
            return
        error = sampled.exception()
        if isinstance(error, NotLoadedError) and request.adapter and not request.cancelled:
            # another version, on an engine that joined since
            loaded = member.engine.load(request.adapter)
            loaded.add_done_callback(lambda done: self._later(self._give_again, member, request, done))
            return
        if not error and member.number > self._last_failed:
            self._failed = 0
        self._settled(member, request, error, sampled)

    def _give_again(self, member: _Member, request: Request, loaded: Future[Proof]) -> None:
        """Send a request to an engine that has its version by now."""
        if request not in member.flying:
            return
        if error := loaded.exception():
            self._settled(member, request, error)
        else:
            member.flying.remove(request)
            self._give(member, request)

    def _settled(
        self, member: _Member, request: Request, error: BaseException | None, sampled: Future[Group] | None = None
    ) -> None:
        if isinstance(error, EngineLostError):
            self._lose(member, error)
            return
        member.flying.remove(request)
        if error:
            request.group.set_exception(error)
        elif sampled:
            request.group.set_result(sampled.result())
        self._let_go(member)
        self._send()

    def _lose(self, member: _Member, error: BaseException) -> None:
        """Replay what an engine had in flight, and start another in its place."""
        if member not in self._members:
            return
        self._end(member)
        self._lost += 1
        for request in reversed(member.flying):
            request.attempts += 1
            if request.attempts < _ATTEMPTS:
                self._replayed += not request.cancelled
                self._queue.appendleft(request)
            else:
                what = f"engine: {_ATTEMPTS} engines were lost while they sampled {request.prompt.text!r}"
                request.group.set_exception(RloraError(f"{what}: {error}"))
        member.flying.clear()
        if not member.leaving:
            self._start_or_do_without(error)
        self._send()

    def _let_go(self, member: _Member) -> None:
        """End an engine that is too many, once it has nothing in flight."""
        if member.leaving and not member.flying:
            self._end(member)

    def _end(self, member: _Member) -> None:
        self._members.remove(member)
        member.engine.close()

    def _start(self, after: float = 0.0) -> None:
        threading.Thread(target=self._join, args=(self._started, after), daemon=True).start()
        self._starting += 1
        self._started += 1

    def _start_or_do_without(self, error: BaseException) -> None:
        if self._failed < self._restarts and not isinstance(error, DeliveryError):
            self._start(after=_PAUSE if self._failed else 0.0)
            return
        if any(not member.leaving for member in self._members) or self._starting:
            print(f"engine: one less from now on, it could not be started again: {error}", flush=True)
        else:
            what = f"engine: every engine is gone, and none could be started again in {self._failed} tries ({error})"
            self._give_up(RloraError(what), error)

    def _give_up(self, reason: RloraError, cause: BaseException) -> None:
        reason.__cause__ = cause
        self._given_up = self._given_up or reason
        for member in self._members:
            for request in member.flying:
                request.group.set_exception(self._given_up)
            member.flying.clear()
        self._changed.notify_all()
        self._send()

    # --- on a thread of its own ---

    def _join(self, number: int, after: float) -> None:
        """Start an engine, and let it in once it has the version of now, proven."""
        engine = None
        time.sleep(after)
        try:
            engine = self._start_engine(number)
            adapter = None
            while True:
                with self._changed:
                    if adapter is self._newest:
                        self._starting -= 1
                        self._members.append(_Member(engine, number))
                        self._changed.notify_all()
                        self._send()
                        return
                    adapter = self._newest
                if adapter:
                    _checked(adapter, engine.load(adapter).result(self._patience))
        except Exception as error:
            with self._changed:
                self._starting -= 1
                if engine:
                    engine.close()
                self._failed, self._last_failed = self._failed + 1, number
                if not self._given_up:
                    self._start_or_do_without(error)


def wait_for(
    futures: Sequence[Future[Any]], count: int, seconds: float, patience: float, check: Callable[[], None]
) -> None:
    """Wait until `count` of the futures are done, or one has failed, or for so many seconds.

    After each `patience` seconds in which nothing comes `check` is called, to look for engines that hang.
    """
    deadline = time.monotonic() + seconds
    while len(left := [future for future in futures if not future.done()]) > len(futures) - count:
        if any(future.done() and future.exception() for future in futures):
            return
        timeout = min(deadline - time.monotonic(), patience)
        if timeout <= 0:
            return
        done, _ = wait(left, timeout, FIRST_COMPLETED)
        if not done and timeout == patience:
            check()


def _checked(adapter: Adapter, proof: Proof) -> Proof:
    if proof.digest != adapter.digest:
        raise DeliveryError(
            f"adapter {adapter.name}: an engine says that it serves {proof.digest[:12]}, not {adapter.digest[:12]}"
        )
    return proof
