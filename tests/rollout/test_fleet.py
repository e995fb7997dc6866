"""A fleet of fake engines: which engine gets which request, and what happens when an engine dies."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from rlora.records import (
    Adapter,
    DeliveryError,
    EngineLostError,
    EngineStats,
    Episode,
    Group,
    NotLoadedError,
    Prompt,
    Receipt,
    RloraError,
    Sampling,
    StaleError,
    Version,
)
from rlora.rollout.fleet import Fleet
from rlora.rollout.requests import Request

SAMPLING = Sampling(max_tokens=1, group_size=2)
SOON = 5.0  # seconds


def adapter(number: int, policy: str = "run") -> Adapter:
    return Adapter(policy, number, b"{}", b"")


def version(number: int, policy: str = "run") -> Version:
    return adapter(number, policy).version


class FakeEngine:
    """Holds its requests until the test answers them."""

    def __init__(self) -> None:
        self.canaries = {"run": 0.1}
        self.held: list[Version] = []
        self.requests: list[tuple[Any, Version, Future[Group]]] = []
        self.oldest: list[int] = []  # argument of each load
        self.departed: list[str] = []
        self.dead: EngineLostError | None = None
        self.hangs = self.lies = False

    def load(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> Future[Receipt]:
        loaded: Future[Receipt] = Future()
        self.oldest.append(oldest)
        if self.dead:
            loaded.set_exception(self.dead)
        elif not self.hangs:
            self.held.append(adapter.version)
            loaded.set_result(Receipt("different" if self.lies else adapter.digest, 0.0, 0.0))
        return loaded

    def generate(self, prompt: Prompt, sampling: Sampling, version: Version) -> Future[Group]:
        sampled: Future[Group] = Future()
        self.requests.append((prompt.answer, version, sampled))
        if self.dead:
            sampled.set_exception(self.dead)
        elif version not in self.held:
            sampled.set_exception(NotLoadedError("not loaded"))
        return sampled

    def stats(self) -> Future[EngineStats]:
        stats: Future[EngineStats] = Future()
        stats.set_result(EngineStats(busy_seconds=2.0, canaries=self.canaries))
        return stats

    def leave(self, policy: str) -> Future[None]:
        self.departed.append(policy)
        self.held = [version for version in self.held if version.policy != policy]
        for _, version, sampled in self.requests:
            if version.policy == policy and not sampled.done():
                sampled.set_exception(StaleError("its policy has left"))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def close(self) -> None:
        self.closed = True

    def answer(self) -> None:
        """Answer all open requests."""
        for prompt, version, sampled in self.requests:
            if not sampled.done():
                sampled.set_result(Group(Prompt("?", prompt), (Episode((1,), (-1.0,), "stop", version),) * 2))

    def die(self) -> None:
        self.dead = EngineLostError("it died")
        for _, _, sampled in self.requests:
            if not sampled.done():
                sampled.set_exception(self.dead)


class Stage:
    """A fleet, its initial engines, and those that it starts."""

    def __init__(self, engines: int, start: Callable[[int], Any] | None = None, **settings: Any) -> None:
        self.engines = [FakeEngine() for _ in range(engines)]
        self.numbers: list[int] = []
        defaults: dict[str, Any] = {"room": 100, "patience": SOON, "restarts": 2}
        self.fleet = Fleet(start or self.start, list(self.engines), **defaults | settings)  # type: ignore[arg-type]

    def start(self, number: int) -> Any:
        self.numbers.append(number)
        self.engines.append(FakeEngine())
        return self.engines[-1]

    def ask(self, *answers: int, policy: str = "run") -> list[Request]:
        return [self.fleet.generate(Prompt("?", answer), SAMPLING, policy) for answer in answers]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("rlora.rollout.fleet._PAUSE", 0.01)
    yield
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()


def test_prompts_go_to_the_engine_with_the_fewest_under_the_version_that_was_swapped_in() -> None:
    stage = Stage(2)
    waiting = stage.ask(0)
    assert waiting[0].version is None  # no adapter was delivered yet
    stage.fleet.swap(adapter(4))
    requests = waiting + stage.ask(1, 2, 3)
    requests_by_engine = [[request[:2] for request in engine.requests] for engine in stage.engines]
    assert requests_by_engine == [[(0, version(4)), (2, version(4))], [(1, version(4)), (3, version(4))]]
    for engine in stage.engines:
        engine.answer()
    groups = [request.group.result(SOON) for request in requests]
    assert [group.prompt.answer for group in groups] == [0, 1, 2, 3]
    assert {episode.version for group in groups for episode in group.episodes} == {version(4)}


def test_an_engine_is_given_no_more_than_it_has_room_for() -> None:
    stage = Stage(1, room=4)
    stage.fleet.swap(adapter(0))
    requests = stage.ask(0, 1, 2)
    (engine,) = stage.engines
    assert len(engine.requests) == 2
    stage.fleet.swap(adapter(1))
    engine.answer()
    until(lambda: len(engine.requests) == 3)
    engine.answer()
    sampled = [request.group.result(SOON).episodes[0].version for request in requests]
    assert sampled == [version(0), version(0), version(1)]  # the latest delivered version


def test_requests_of_a_dead_engine_are_sampled_elsewhere_under_the_same_version_and_count_once() -> None:
    stage = Stage(2)
    stage.fleet.swap(adapter(1))
    requests = stage.ask(0, 1, 2, 3)
    stage.fleet.swap(adapter(2))
    first, second = stage.engines
    lost = [sampled for _, _, sampled in first.requests]
    second.held.remove(version(1))  # as if no request leased it there
    first.dead = EngineLostError("it died")
    lost[0].set_exception(first.dead)
    until(lambda: stage.numbers == [2])  # a replacement is started
    until(lambda: len(second.requests) >= 3)
    for _ in range(2):
        for engine in stage.engines[1:]:
            engine.answer()
        lost[1].done() or lost[1].set_result(Group(Prompt("?", 99), ()))  # too late
        until(lambda: sum(request.group.done() for request in requests) >= 2)
        time.sleep(0.05)
    groups = [request.group.result(SOON) for request in requests]
    assert [group.prompt.answer for group in groups] == [0, 1, 2, 3]
    assert {episode.version for group in groups for episode in group.episodes} == {version(1)}
    until(lambda: stage.fleet.stats().engines == 2)
    stats = stage.fleet.stats()
    assert (stats.lost, stats.replayed, stats.busy_seconds, stats.canaries) == (1, 2, 2.0, {"run": 0.1})
    assert stage.engines[2].held[0] == version(2)  # it joined with the latest version


def test_an_engine_that_serves_a_different_adapter_is_detected() -> None:
    stage = Stage(2)
    stage.engines[1].lies = True
    with pytest.raises(DeliveryError, match=r"adapter run-v3-\w+: an engine serves digest different instead of"):
        stage.fleet.swap(adapter(3))


def test_an_engine_that_takes_no_swap_is_replaced() -> None:
    stage = Stage(2, patience=0.1)
    stage.engines[0].hangs = True
    (receipt,) = stage.fleet.swap(adapter(3))
    assert receipt.digest == adapter(3).digest
    until(lambda: stage.fleet.stats().engines == 2)
    assert stage.engines[0].closed
    assert stage.engines[2].held == [version(3)]


def test_an_engine_that_hangs_is_found_by_a_check() -> None:
    stage = Stage(2, patience=0.1)
    stage.fleet.swap(adapter(3))
    (request,) = stage.ask(0)
    stage.engines[0].hangs = True
    stage.fleet.check()
    until(lambda: stage.engines[1].requests)
    stage.engines[1].answer()
    assert request.group.result(SOON).prompt.answer == 0


def test_a_swap_waits_for_the_replacement_of_the_only_engine() -> None:
    stage = Stage(1)
    stage.engines[0].die()
    assert stage.fleet.swap(adapter(3)) == []
    assert stage.engines[1].held == [version(3)]


def test_an_engine_that_joins_late_has_the_newest_version() -> None:
    ready = threading.Event()

    def start(number: int) -> Any:
        assert ready.wait(SOON)
        return stage.start(number)

    stage = Stage(2, start)
    stage.fleet.swap(adapter(0))
    stage.engines[0].die()
    stage.fleet.swap(adapter(1))
    stage.fleet.swap(adapter(2))
    ready.set()
    until(lambda: stage.fleet.stats().engines == 2)
    assert stage.engines[2].held == [version(2)]


def test_when_no_engine_can_be_started_every_prompt_fails_with_the_reason() -> None:
    def start(number: int) -> Any:
        raise OSError("no memory")

    stage = Stage(1, start, restarts=1)
    stage.fleet.swap(adapter(0))
    requests = stage.ask(0, 1)
    stage.engines[0].die()
    for request in requests:
        with pytest.raises(RloraError, match=r"no engine is left, and 1 consecutive starts failed \(no memory\)"):
            request.group.result(SOON)
    with pytest.raises(RloraError, match="no engine is left"):
        stage.fleet.swap(adapter(1))
    with pytest.raises(RloraError, match="no engine is left"):
        stage.ask(2)[0].group.result(SOON)


def test_failing_starts_are_limited_while_other_engines_work() -> None:
    tries = []

    def start(number: int) -> Any:
        tries.append(number)
        raise OSError("no memory")

    stage = Stage(2, start, restarts=2)
    stage.fleet.swap(adapter(0))
    requests = stage.ask(0, 1)
    stage.engines[0].die()
    until(lambda: len(tries) == 2)
    stage.engines[1].answer()
    assert all(request.group.result(SOON) for request in requests)
    until(lambda: stage.fleet.stats().engines == 1)
    stage.fleet.resize(2)  # the same number as before: no effect
    stage.fleet.swap(adapter(1))
    time.sleep(0.1)
    assert tries == [2, 3]


def test_a_cancelled_request_is_not_sampled_again() -> None:
    stage = Stage(1)
    stage.fleet.swap(adapter(0))
    dropped, kept = stage.ask(0, 1)
    dropped.cancelled = True
    stage.engines[0].die()
    until(lambda: len(stage.engines) == 2 and stage.engines[1].requests)
    stage.engines[1].answer()
    assert kept.group.result(SOON).prompt.answer == 1
    assert [answer for answer, _, _ in stage.engines[1].requests] == [1]
    assert stage.fleet.stats().replayed == 1


def test_a_prompt_that_kills_every_engine_is_reported() -> None:
    stage = Stage(1)
    stage.fleet.swap(adapter(0))
    (request,) = stage.ask(7)
    while not request.group.done():
        until(lambda: request.group.done() or any(engine.requests and not engine.dead for engine in stage.engines))
        for engine in stage.engines:
            if engine.requests:
                engine.die()
    with pytest.raises(RloraError, match=r"5 engines died while they sampled '\?'"):
        request.group.result()


def test_a_user_error_reaches_the_one_who_asked() -> None:
    stage = Stage(1)
    stage.fleet.swap(adapter(0))
    (request,) = stage.ask(0)
    stage.engines[0].requests[0][2].set_exception(ValueError("the prompt is too long"))
    with pytest.raises(ValueError, match="too long"):
        request.group.result(SOON)
    assert stage.fleet.stats().lost == 0


def test_engines_come_and_go_as_asked() -> None:
    stage = Stage(1)
    stage.fleet.swap(adapter(0))
    stage.fleet.resize(3)
    until(lambda: stage.fleet.stats().engines == 3)
    assert [engine.held for engine in stage.engines] == [[version(0)]] * 3
    requests = stage.ask(0, 1, 2)
    stage.fleet.resize(1)
    assert stage.fleet.stats().engines == 3  # they are closed after their last prompt
    late = stage.ask(3)
    for engine in stage.engines:
        engine.answer()
    assert all(request.group.result(SOON) for request in requests + late)
    until(lambda: stage.fleet.stats().engines == 1)
    assert [getattr(engine, "closed", False) for engine in stage.engines] == [False, True, True]
    assert stage.fleet.stats().lost == 0
    stage.fleet.resize(1)
    assert len(stage.numbers) == 2


# --- several policies ---


def test_versions_of_one_number_are_kept_apart_by_their_policies() -> None:
    stage = Stage(1)
    (engine,) = stage.engines
    stage.fleet.swap(adapter(3))
    stage.fleet.swap(adapter(3, "other"))
    assert engine.held == [version(3), version(3, "other")]
    requests = stage.ask(0) + stage.ask(1, policy="other") + stage.ask(2)
    stage.fleet.swap(adapter(4, "other"))  # no effect on the first policy
    requests += stage.ask(3) + stage.ask(4, policy="other")
    assert [request[:2] for request in engine.requests] == [
        (0, version(3)), (1, version(3, "other")), (2, version(3)), (3, version(3)), (4, version(4, "other")),
    ]  # fmt: skip
    engine.answer()
    sampled = [request.group.result(SOON).episodes[0].version for request in requests]
    assert sampled == [request.version for request in requests] == [version for _, version, _ in engine.requests]


def test_a_missing_version_is_loaded_even_if_another_policy_has_the_same_number() -> None:
    stage = Stage(1)
    (engine,) = stage.engines
    stage.fleet.swap(adapter(3))
    stage.fleet.swap(adapter(3, "other"))
    engine.held.remove(version(3, "other"))  # as if no request leased it
    (request,) = stage.ask(0, policy="other")
    until(lambda: len(engine.requests) == 2)
    assert engine.held == [version(3), version(3, "other")]
    engine.answer()
    assert request.group.result(SOON).episodes[0].version == version(3, "other")


def test_a_prompt_waits_for_its_own_policys_swap_and_holds_up_no_other() -> None:
    stage = Stage(1)
    (engine,) = stage.engines
    (waiting,) = stage.ask(0, policy="other")
    stage.fleet.swap(adapter(2))
    (goes,) = stage.ask(1)
    assert [request[:2] for request in engine.requests] == [(1, version(2))]
    engine.answer()
    assert goes.group.result(SOON).prompt.answer == 1
    assert (waiting.version, waiting.group.done(), len(engine.requests)) == (None, False, 1)
    stage.fleet.swap(adapter(7, "other"))
    assert [request[:2] for request in engine.requests[1:]] == [(0, version(7, "other"))]
    engine.answer()
    assert waiting.group.result(SOON).prompt.answer == 0


def test_the_policy_with_the_fewest_completions_in_flight_goes_first() -> None:
    stage = Stage(1, room=4)  # two prompts
    (engine,) = stage.engines
    for policy in ("run", "other"):
        stage.fleet.swap(adapter(0, policy))
    requests = stage.ask(*range(6)) + stage.ask(10, 11, policy="other")  # queued last
    assert [answer for answer, _, _ in engine.requests] == [0, 1]
    answered: list[int] = []
    while len(answered) < len(requests):  # one at a time
        answer, requested, sampled = engine.requests[len(answered)]
        sampled.set_result(Group(Prompt("?", answer), (Episode((1,), (-1.0,), "stop", requested),) * 2))
        answered.append(answer)
        until(lambda: len(engine.requests) == min(len(answered) + 2, len(requests)))
    assert answered == [0, 1, 10, 2, 11, 3, 4, 5]  # the prompts of a policy keep their order
    assert [request.group.result(SOON).prompt.answer for request in requests] == [*range(6), 10, 11]


def test_completions_are_counted_and_not_prompts() -> None:
    stage = Stage(1, room=5)
    (engine,) = stage.engines
    for policy in ("run", "other"):
        stage.fleet.swap(adapter(0, policy))

    def ask(answer: int, policy: str, completions: int) -> None:
        stage.fleet.generate(Prompt("?", answer), Sampling(1, group_size=completions), policy)

    ask(0, "run", 3)
    ask(1, "other", 1)
    ask(2, "other", 1)  # three completions of one policy, two of the other: no more room
    ask(3, "run", 1)
    ask(4, "other", 1)
    assert [answer for answer, _, _ in engine.requests] == [0, 1, 2]
    engine.requests[1][2].set_result(Group(Prompt("?", 1), ()))
    until(lambda: len(engine.requests) == 4)
    assert engine.requests[3][:2] == (4, version(0, "other"))  # of the policy with more prompts but fewer completions


def test_a_request_with_an_adapter_goes_before_all_that_wait() -> None:
    stage = Stage(1, room=4)
    (engine,) = stage.engines
    for policy in ("run", "other"):
        stage.fleet.swap(adapter(1, policy))
    stage.ask(0, 1, policy="other")
    stage.ask(2)
    turn = stage.fleet.generate(Prompt("?", 3), SAMPLING, "other", adapter(0, "other"))
    engine.held.append(version(0, "other"))
    engine.requests[0][2].set_result(Group(Prompt("?", 0), ()))
    until(lambda: len(engine.requests) == 3)
    assert engine.requests[2][:2] == (3, version(0, "other"))  # though its policy has more in flight than the other
    engine.answer()
    assert turn.group.result(SOON).prompt.answer == 3


def test_an_engine_that_joins_has_every_policys_newest() -> None:
    stage = Stage(1)
    for number, policy in [(1, "run"), (1, "other"), (2, "run"), (0, "third")]:
        stage.fleet.swap(adapter(number, policy))
    stage.fleet.leave("third")
    stage.fleet.resize(2)
    until(lambda: stage.fleet.stats().engines == 2)
    assert sorted(map(str, stage.engines[1].held)) == sorted(map(str, [version(2), version(1, "other")]))


def test_an_engine_that_joins_has_what_was_swapped_in_while_it_loaded() -> None:
    class Slow(FakeEngine):
        def load(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> Future[Receipt]:
            for newer in meanwhile[:1]:
                meanwhile.remove(newer)
                stage.fleet.swap(newer)
            return super().load(adapter, oldest)

    meanwhile = [adapter(5, "other"), adapter(6, "other")]
    joins = Slow()
    stage = Stage(1, lambda number: joins)
    stage.fleet.swap(adapter(0))
    stage.fleet.resize(2)
    until(lambda: stage.fleet.stats().engines == 2)
    assert joins.held == [version(0), version(5, "other"), version(6, "other")]


def test_a_check_loads_every_policys_newest() -> None:
    stage = Stage(1)
    (engine,) = stage.engines
    for number, policy in [(1, "run"), (4, "other"), (2, "run")]:
        stage.fleet.swap(adapter(number, policy))
    engine.held.clear()
    stage.fleet.check()
    assert sorted(map(str, engine.held)) == sorted(map(str, [version(2), version(4, "other")]))


def test_engines_learn_which_versions_are_too_old() -> None:
    stage = Stage(2)
    stage.fleet.swap(adapter(3), oldest=2)
    stage.fleet.swap(adapter(1, "other"))
    assert [engine.oldest for engine in stage.engines] == [[2, 0], [2, 0]]


def test_a_policy_leaves_and_the_others_prompts_go_on() -> None:
    stage = Stage(2, room=2)
    for policy in ("run", "other"):
        stage.fleet.swap(adapter(3, policy))
    (flies,) = stage.ask(0, policy="other")
    stays = stage.ask(1)
    waits = stage.ask(2, 3, policy="other")
    stays += stage.ask(4, 5)
    (unknown,) = stage.ask(6, policy="third")
    stage.fleet.leave("other")
    for request in (flies, *waits):
        with pytest.raises(StaleError):
            request.group.result(SOON)
    assert [engine.departed for engine in stage.engines] == [["other"], ["other"]]
    assert [engine.held for engine in stage.engines] == [[version(3)]] * 2

    def answered() -> bool:
        for engine in stage.engines:
            engine.answer()
        return all(request.group.done() for request in stays)

    until(answered)
    assert [request.group.result().prompt.answer for request in stays] == [1, 4, 5]
    assert not unknown.group.done()
    assert sorted(answer for engine in stage.engines for answer, _, _ in engine.requests) == [0, 1, 4, 5]
    (late,) = stage.ask(7, policy="other")
    pinned = stage.fleet.generate(Prompt("?", 8), SAMPLING, "other", adapter(3, "other"))  # an episode's next turn
    for request in (late, pinned):
        with pytest.raises(StaleError, match="policy other: the policy has left"):
            request.group.result(SOON)
    stage.fleet.swap(adapter(4, "other"))  # it comes back
    (again,) = stage.ask(9, policy="other")
    until(lambda: again.version == version(4, "other"))
    assert stage.fleet.stats().lost == 0


def test_requests_of_a_policy_that_left_are_not_replayed() -> None:
    stage = Stage(1)
    for policy in ("run", "other"):
        stage.fleet.swap(adapter(3, policy))
    (cancelled,), (stays,) = stage.ask(0, policy="other"), stage.ask(1)
    stage.fleet.leave("other")
    stage.engines[0].die()
    until(lambda: len(stage.engines) == 2 and stage.engines[1].requests)
    stage.engines[1].answer()
    assert stays.group.result(SOON).episodes[0].version == version(3)
    with pytest.raises(StaleError):
        cancelled.group.result(SOON)
    assert [answer for answer, _, _ in stage.engines[1].requests] == [1]
    assert stage.engines[1].held == [version(3)]
    assert stage.fleet.stats().replayed == 1


def test_canaries_are_each_policys_farthest() -> None:
    stage = Stage(2)
    first, second = stage.engines
    first.canaries, second.canaries = {"run": 0.1, "other": 0.3}, {"run": 0.2, "other": 0.2, "third": 0.0}
    assert stage.fleet.stats().canaries == {"run": 0.2, "other": 0.3, "third": 0.0}


def test_an_engine_that_is_leaving_ends_with_the_policy_that_it_last_served() -> None:
    stage = Stage(2, room=2)
    for policy in ("run", "other"):
        stage.fleet.swap(adapter(3, policy))
    stage.ask(0)
    (last,) = stage.ask(1, policy="other")
    stage.fleet.resize(1)
    (going,) = [engine for engine in stage.engines if any(answer == 1 for answer, _, _ in engine.requests)]
    assert len(stage.fleet.engines) == 2
    stage.fleet.leave("other")
    assert stage.fleet.engines == [engine for engine in stage.engines if engine is not going]
    assert last.group.done()


def test_a_version_that_was_refused_is_given_to_no_other_engine() -> None:
    stage = Stage(1)
    for policy in ("run", "other"):
        stage.fleet.swap(adapter(3, policy))
    stage.engines[0].lies = True
    with pytest.raises(DeliveryError):
        stage.fleet.swap(adapter(4, "other"))
    stage.engines[0].lies = False
    stage.fleet.check()
    stage.fleet.resize(2)
    until(lambda: len(stage.fleet.engines) == 2)
    assert sorted(map(str, stage.engines[1].held)) == sorted(map(str, (version(3), version(3, "other"))))


def test_what_is_in_flight_or_queued_at_the_end_fails() -> None:
    stage = Stage(1, room=2)
    stage.fleet.swap(adapter(3))
    in_flight, queued = stage.ask(0, 1)
    stage.fleet.stop()
    (late,) = stage.ask(2)
    for request in (in_flight, queued, late):
        with pytest.raises(RloraError, match="the job has ended"):
            request.group.result(SOON)
    stage.engines[0].answer()  # which nobody waits for


def test_a_caller_that_is_cancelled_harms_no_other() -> None:
    """As at the end of a run: the coroutines that wait for groups are cancelled, and the engines answer later."""
    stage = Stage(1, room=4)
    stage.fleet.swap(adapter(3))
    first, second = stage.ask(0, 1)

    async def wait_in_vain() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(first.group), 0.01)

    asyncio.run(wait_in_vain())
    stage.engines[0].answer()
    assert [request.group.result(SOON).prompt.answer for request in (first, second)] == [0, 1]
