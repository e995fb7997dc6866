"""The engines of a run, seen as one that holds every version it is asked for and loses no prompt."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
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

    @property
    def version(self) -> int | None:
        return None if self.adapter is None else self.adapter.version


@dataclass(eq=False)
class _Member:
    engine: Engine
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
    busy_seconds: float  # in which those have computed, their mean
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
        self._members = [_Member(engine) for engine in engines]
        self._started = len(engines)  # ever
        self._starting = 0  # now
        self._failed = 0  # starts in a row
        self._queue: deque[Request] = deque()
        self._adapter: Adapter | None = None  # the last one swapped in
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

    def generate(self, prompt: Prompt, sampling: Sampling) -> Request:
        """Sample `sampling.group_size` episodes under the version that is swapped in when an engine has room."""
        request = Request(prompt, sampling)
        with self._changed:
            self._queue.append(request)
            self._send()
        return request

    def resize(self, engines: int) -> None:
        """Have so many engines from now on. Those that are too many get no more prompts and end after their last."""
        with self._changed:
            staying = [member for member in self._members if not member.leaving]
            for member in staying[engines:]:
                member.leaving = True
            for member in self._members:
                if member.leaving and not member.flying:
                    self._end(member)
            for _ in range(engines - len(staying) - self._starting):
                self._start()

    def check(self) -> None:
        """Find out which engines answer no more: each has to do so between two of its steps."""
        with self._changed:
            adapter = self._adapter
        if adapter:
            self.swap(adapter)

    @property
    def engines(self) -> list[Engine]:
        """Those there are now."""
        with self._changed:
            return [member.engine for member in self._members]

    def stats(self) -> FleetStats:
        with self._changed:
            asked = [member.engine.stats() for member in self._members]
            lost, replayed = self._lost, self._replayed
        done, _ = wait(asked, timeout=1)
        stats = [each.result() for each in done if not each.exception()]
        busy = sum(each.busy_seconds for each in stats) / max(1, len(stats))
        canary = max((each.canary for each in stats if each.canary is not None), default=None)
        return FleetStats(len(asked), busy, canary, lost, replayed)

    def stop(self) -> None:
        """Start no more engines, and give nothing to those there are."""
        with self._changed:
            self._given_up = self._given_up or RloraError("the engines are stopped")
            self._changed.notify_all()
        self._calls.shutdown(wait=False, cancel_futures=True)

    # --- below, the lock is held ---

    def _send(self) -> None:
        """Hand out what is queued, as far as there is room."""
        while self._queue and self._adapter:
            free = [each for each in self._members if not each.leaving and each.completions < self._room]
            if not free:
                break
            member, request = min(free, key=lambda each: each.completions), self._queue.popleft()
            request.adapter = request.adapter or self._adapter
            self._give(member, request)
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
                call(*arguments)

        if not self._given_up:
            self._calls.submit(locked)

    def _settle(self, member: _Member, request: Request, sampled: Future[Group]) -> None:
        if request not in member.flying:  # its engine was lost: it is sampled elsewhere, and counts once
            return
        error = sampled.exception()
        if isinstance(error, EngineLostError):
            self._lose(member, error)
        else:
            if isinstance(error, NotLoadedError):  # another version, on an engine that joined since
                assert request.adapter is not None
                loaded = member.engine.load(request.adapter)
                loaded.add_done_callback(lambda done: self._later(self._ask_again, member, request, done))
                return
            member.flying.remove(request)
            if error:
                request.group.set_exception(error)
            else:
                self._failed = 0
                request.group.set_result(sampled.result())
            if member.leaving and not member.flying:
                self._end(member)
        self._send()

    def _ask_again(self, member: _Member, request: Request, loaded: Future[Proof]) -> None:
        """Send a request to an engine that has its version by now."""
        if request not in member.flying:
            return
        error = loaded.exception()
        if isinstance(error, EngineLostError):
            self._lose(member, error)
        elif error:
            member.flying.remove(request)
            request.group.set_exception(error)
        else:
            member.flying.remove(request)
            self._give(member, request)

    def _lose(self, member: _Member, error: BaseException) -> None:
        """Replay what an engine had in flight, and start another in its place."""
        if member not in self._members:
            return
        self._end(member)
        self._lost += 1
        for request in reversed(member.flying):
            request.attempts += 1
            if request.attempts < _ATTEMPTS:
                self._replayed += 1
                self._queue.appendleft(request)
            else:
                request.group.set_exception(
                    RloraError(
                        f"engine: {_ATTEMPTS} engines were lost while they sampled {request.prompt.text!r}: {error}"
                    )
                )
        member.flying.clear()
        if not member.leaving:
            self._start()
        self._send()

    def _end(self, member: _Member) -> None:
        self._members.remove(member)
        member.engine.close()

    def _start(self) -> None:
        threading.Thread(target=self._join, args=(self._started,), daemon=True).start()
        self._starting += 1
        self._started += 1

    # --- on a thread of its own ---

    def _join(self, number: int) -> None:
        """Start an engine, and let it in once it has the version of now, proven."""
        engine = None
        try:
            engine = self._start_engine(number)
            adapter = None
            while True:
                with self._changed:
                    if adapter is self._adapter:
                        self._starting -= 1
                        self._members.append(_Member(engine))
                        self._changed.notify_all()
                        self._send()
                        return
                    adapter = self._adapter
                if adapter:
                    _checked(adapter, engine.load(adapter).result(self._patience))
        except Exception as error:
            with self._changed:
                self._starting -= 1
                if engine:
                    engine.close()
                self._count_failure(error)

    def _count_failure(self, error: Exception) -> None:
        self._failed += 1
        if self._given_up:
            return
        if self._failed <= self._restarts and not isinstance(error, DeliveryError):
            timer = threading.Timer(_PAUSE, lambda: self._later(self._start))
            timer.daemon = True
            timer.start()
        elif self._members or self._starting:
            print(f"engine: one less from now on, it could not be started again: {error}", flush=True)
        else:
            self._given_up = RloraError(
                f"engine: every engine is gone, and none could be started again in {self._failed} tries ({error})"
            )
            self._given_up.__cause__ = error
            self._changed.notify_all()
            self._send()


def _checked(adapter: Adapter, proof: Proof) -> Proof:
    if proof.digest != adapter.digest:
        raise DeliveryError(
            f"adapter {adapter.name}: an engine says that it serves {proof.digest[:12]}, not {adapter.digest[:12]}"
        )
    return proof
