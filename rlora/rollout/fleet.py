"""The engines of a job, seen as one that holds every version it is asked for and loses no prompt."""

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
from rlora.rollout.requests import FleetStats, Member, Request, checked, left

_ATTEMPTS = 5  # engines that a prompt may lose before it is taken for the cause
_PAUSE = 1.0  # seconds between two tries to start an engine


class Fleet:
    """Engines that may die, join and leave while prompts are in flight.

    They serve several policies. A prompt goes to the engine with the fewest in flight, under the version of its policy
    that was swapped in last; of those that wait, one of the policy with the fewest in flight goes first. Where an
    engine dies its prompts are sampled again elsewhere, under the same version, and another engine is started in its
    place.

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
        self._members = [Member(engine, number) for number, engine in enumerate(engines)]
        self._asked = self._started = len(engines)  # for, by `resize`, and ever
        self._starting = 0  # now
        self._failed, self._last_failed = 0, -1  # starts in a row, and the number of the last one
        self._busy_seconds = 0.0
        self._queue: deque[Request] = deque()
        self._newest: dict[str, Adapter] = {}  # by policy: what every engine has or is given now
        self._left: set[str] = set()  # policies that nothing is sampled for any more
        self._adapters: dict[str, Adapter] = {}  # what its prompts are sampled under: the last one that was swapped in
        self._given_up: RloraError | None = None
        self._changed = threading.Condition()  # its lock guards all of the above
        self._calls = ThreadPoolExecutor(1)  # runs what engines' futures call back, one after the other
        self._lost = self._replayed = 0

    def swap(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> list[Receipt]:
        """Deliver `adapter` to every engine; its policy's prompts are sampled under it from now on. Returns each
        engine's proof.

        Requests in flight go on under their own versions, but for those of the policy's versions before `oldest`, other
        than `kept`, which are given up. Raises DeliveryError where an engine serves something else, and RloraError
        where no engine is left.
        """
        with self._changed:
            self._left.discard(adapter.policy)
            self._newest[adapter.policy] = adapter
            loads = [(adapter, member, member.engine.load(adapter, oldest, kept)) for member in self._members]
        try:
            proofs = self._confirmed(loads)
        except RloraError:
            with self._changed:
                self._newest.pop(adapter.policy, None)  # no engine that joins is to be given it
                if before := self._adapters.get(adapter.policy):
                    self._newest[adapter.policy] = before
            raise
        with self._changed:
            self._adapters[adapter.policy] = adapter
            self._send()
        return proofs

    def _confirmed(self, loads: Sequence[tuple[Adapter, Member, Future[Receipt]]]) -> list[Receipt]:
        """Each engine's proof; one that gives none is lost. Raises RloraError where no engine is left."""
        deadline = time.monotonic() + self._patience
        proofs = []
        for adapter, member, load in loads:
            try:
                proofs.append(checked(adapter, load.result(max(0.0, deadline - time.monotonic()))))
            except (EngineLostError, TimeoutError) as error:
                with self._changed:
                    self._lose(member, error)
        with self._changed:
            self._changed.wait_for(lambda: self._members or self._given_up)
            if self._given_up:
                raise self._given_up
        return proofs

    def generate(
        self, prompt: Prompt, sampling: Sampling, policy: str, adapter: Adapter | None = None, background: bool = False
    ) -> Request:
        """Sample `sampling.group_size` episodes under the policy's version that is swapped in when an engine has room.

        With an `adapter` the request is sampled under it, which is loaded on the engine if needed, and goes before
        those that wait: it is a later turn of an episode, or was in flight before a resume. In the `background` it goes
        after them.
        """
        request = Request(prompt, sampling, policy, adapter=adapter, background=background)
        with self._changed:
            if policy in self._left:
                request.group.set_exception(left(policy))
            elif adapter and not background:
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

    def leave(self, policy: str) -> None:
        """Give up what is asked for a policy, and serve none of its versions any more."""
        with self._changed:
            self._left.add(policy)
            self._newest.pop(policy, None)
            self._adapters.pop(policy, None)
            asked = [request for member in self._members for request in member.flying] + list(self._queue)
            for member in self._members:
                member.flying = [request for request in member.flying if request.policy != policy]
                member.engine.leave(policy)
            self._queue = deque(request for request in self._queue if request.policy != policy)
            for request in asked:
                if request.policy == policy:
                    request.group.set_exception(left(policy))
            for member in list(self._members):
                self._let_go(member)
            self._send()

    def check(self) -> None:
        """Find out which engines answer no more: each has to do so between two of its steps."""
        with self._changed:
            loads = [(each, m, m.engine.load(each)) for each in self._newest.values() for m in self._members]
        self._confirmed(loads)

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
            canaries: dict[str, float] = {}
            for policy, canary in (pair for each in stats.values() for pair in each.canaries.items()):
                canaries[policy] = max(canary, canaries.get(policy, canary))
            return FleetStats(len(asked), self._busy_seconds, canaries, self._lost, self._replayed)

    def stop(self) -> None:
        """Start no more engines, and give nothing to those there are."""
        with self._changed:
            self._given_up = self._given_up or RloraError("the engines are stopped")
            self._changed.notify_all()
        self._calls.shutdown(wait=False, cancel_futures=True)

    # --- below, the lock is held ---

    def _send(self) -> None:
        """Hand out what is queued, as far as there is room."""
        in_flight: Counter[str] = Counter()  # completions
        for request in (request for member in self._members for request in member.flying):
            in_flight[request.policy] += request.sampling.group_size
        while self._queue and not self._given_up:
            free = [each for each in self._members if not each.leaving and each.completions < self._room]
            if not free:
                break
            ready = [request for request in self._queue if request.adapter or request.policy in self._adapters]
            if not ready:
                break
            request = min(ready, key=lambda each: (each.background, each.adapter is None, in_flight[each.policy]))
            self._queue.remove(request)
            if not request.cancelled:
                request.adapter = request.adapter or self._adapters[request.policy]
                in_flight[request.policy] += request.sampling.group_size
                self._give(min(free, key=lambda each: each.completions), request)
        if self._given_up:
            for request in self._queue:
                request.group.set_exception(self._given_up)
            self._queue.clear()

    def _give(self, member: Member, request: Request) -> None:
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

    def _settle(self, member: Member, request: Request, sampled: Future[Group]) -> None:
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

    def _give_again(self, member: Member, request: Request, loaded: Future[Receipt]) -> None:
        """Send a request to an engine that has its version by now."""
        if request not in member.flying:
            return
        if error := loaded.exception():
            self._settled(member, request, error)
        else:
            member.flying.remove(request)
            self._give(member, request)

    def _settled(
        self, member: Member, request: Request, error: BaseException | None, sampled: Future[Group] | None = None
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

    def _lose(self, member: Member, error: BaseException) -> None:
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

    def _let_go(self, member: Member) -> None:
        """End an engine that is too many, once it has nothing in flight."""
        if member.leaving and not member.flying:
            self._end(member)

    def _end(self, member: Member) -> None:
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
        """Start an engine, and let it in once it has each policy's version of now, proven."""
        engine = None
        time.sleep(after)
        try:
            engine = self._start_engine(number)
            loaded: dict[str, Adapter] = {}
            while True:
                with self._changed:
                    missing = [each for policy, each in self._newest.items() if loaded.get(policy) is not each]
                    if not missing:
                        for policy in loaded.keys() - self._newest.keys():
                            engine.leave(policy)
                        self._starting -= 1
                        self._members.append(Member(engine, number))
                        self._changed.notify_all()
                        self._send()
                        return
                for adapter in missing:
                    checked(adapter, engine.load(adapter).result(self._patience))
                    loaded[adapter.policy] = adapter
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
