"""A fleet of engines that the test plays: who is given what, and what happens to it when an engine goes."""

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
    Proof,
    RloraError,
    Sampling,
)
from rlora.rollout.fleet import Fleet, Request

SAMPLING = Sampling(max_tokens=1, group_size=2)
SOON = 5.0  # seconds


def adapter(version: int) -> Adapter:
    return Adapter("run", version, b"{}", b"")


class FakeEngine:
    """Holds what it is asked until the test answers it."""

    def __init__(self) -> None:
        self.held: list[int] = []
        self.asked: list[tuple[Any, int, Future[Group]]] = []
        self.dead: EngineLostError | None = None
        self.hangs = self.lies = False

    def load(self, adapter: Adapter) -> Future[Proof]:
        loaded: Future[Proof] = Future()
        if self.dead:
            loaded.set_exception(self.dead)
        elif not self.hangs:
            self.held.append(adapter.version)
            loaded.set_result(Proof("another" if self.lies else adapter.digest, 0.0, 0.0))
        return loaded

    def generate(self, prompt: Prompt, sampling: Sampling, version: int) -> Future[Group]:
        sampled: Future[Group] = Future()
        self.asked.append((prompt.answer, version, sampled))
        if self.dead:
            sampled.set_exception(self.dead)
        elif version not in self.held:
            sampled.set_exception(NotLoadedError("it is not here"))
        return sampled

    def stats(self) -> Future[EngineStats]:
        stats: Future[EngineStats] = Future()
        stats.set_result(EngineStats(busy_seconds=2.0, canary=0.1))
        return stats

    def close(self) -> None:
        self.closed = True

    def answer(self) -> None:
        """Sample all that was asked and not answered."""
        for prompt, version, sampled in self.asked:
            if not sampled.done():
                sampled.set_result(Group(Prompt("?", prompt), (Episode((1,), (-1.0,), "stop", version),) * 2))

    def die(self) -> None:
        self.dead = EngineLostError("it died")
        for _, _, sampled in self.asked:
            if not sampled.done():
                sampled.set_exception(self.dead)


class Stage:
    """A fleet, the engines it began with, and those it starts."""

    def __init__(self, engines: int, start: Callable[[int], Any] | None = None, **settings: Any) -> None:
        self.engines = [FakeEngine() for _ in range(engines)]
        self.numbers: list[int] = []
        defaults: dict[str, Any] = {"room": 100, "patience": SOON, "restarts": 2}
        self.fleet = Fleet(start or self.start, list(self.engines), **defaults | settings)  # type: ignore[arg-type]

    def start(self, number: int) -> Any:
        self.numbers.append(number)
        self.engines.append(FakeEngine())
        return self.engines[-1]

    def ask(self, *answers: int) -> list[Request]:
        return [self.fleet.generate(Prompt("?", answer), SAMPLING) for answer in answers]


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
    assert waiting[0].version is None  # nothing was swapped in yet
    stage.fleet.swap(adapter(4))
    requests = waiting + stage.ask(1, 2, 3)
    asked = [[(answer, version) for answer, version, _ in engine.asked] for engine in stage.engines]
    assert asked == [[(0, 4), (2, 4)], [(1, 4), (3, 4)]]
    for engine in stage.engines:
        engine.answer()
    groups = [request.group.result(SOON) for request in requests]
    assert [group.prompt.answer for group in groups] == [0, 1, 2, 3]
    assert {episode.version for group in groups for episode in group.episodes} == {4}


def test_an_engine_is_given_no_more_than_it_has_room_for() -> None:
    stage = Stage(1, room=4)
    stage.fleet.swap(adapter(0))
    requests = stage.ask(0, 1, 2)
    (engine,) = stage.engines
    assert len(engine.asked) == 2
    stage.fleet.swap(adapter(1))
    engine.answer()
    until(lambda: len(engine.asked) == 3)
    engine.answer()
    assert [request.group.result(SOON).episodes[0].version for request in requests] == [0, 0, 1]  # the latest there was


def test_what_a_dead_engine_had_is_sampled_elsewhere_under_the_same_version_and_counts_once() -> None:
    stage = Stage(2)
    stage.fleet.swap(adapter(1))
    requests = stage.ask(0, 1, 2, 3)
    stage.fleet.swap(adapter(2))
    first, second = stage.engines
    lost = [sampled for _, _, sampled in first.asked]
    second.held.remove(1)  # nobody leases it there, say
    first.dead = EngineLostError("it died")
    lost[0].set_exception(first.dead)
    until(lambda: stage.numbers == [2])  # another is started
    until(lambda: len(second.asked) >= 3)
    for _ in range(2):
        for engine in stage.engines[1:]:
            engine.answer()
        lost[1].done() or lost[1].set_result(Group(Prompt("?", 99), ()))  # too late
        until(lambda: sum(request.group.done() for request in requests) >= 2)
        time.sleep(0.05)
    groups = [request.group.result(SOON) for request in requests]
    assert [group.prompt.answer for group in groups] == [0, 1, 2, 3]
    assert {episode.version for group in groups for episode in group.episodes} == {1}
    until(lambda: stage.fleet.stats().engines == 2)
    stats = stage.fleet.stats()
    assert (stats.lost, stats.replayed, stats.busy_seconds, stats.canary) == (1, 2, 2.0, 0.1)
    assert stage.engines[2].held[0] == 2  # it came in with the version of now


def test_an_engine_that_serves_something_else_is_found_out() -> None:
    stage = Stage(2)
    stage.engines[1].lies = True
    with pytest.raises(DeliveryError, match=r"adapter run-v3-\w+: an engine says that it serves another, not"):
        stage.fleet.swap(adapter(3))


def test_an_engine_that_takes_no_swap_is_replaced() -> None:
    stage = Stage(2, patience=0.1)
    stage.engines[0].hangs = True
    (proof,) = stage.fleet.swap(adapter(3))
    assert proof.digest == adapter(3).digest
    until(lambda: stage.fleet.stats().engines == 2)
    assert stage.engines[0].closed
    assert stage.engines[2].held == [3]


def test_an_engine_that_hangs_is_found_by_a_check() -> None:
    stage = Stage(2, patience=0.1)
    stage.fleet.swap(adapter(3))
    (request,) = stage.ask(0)
    stage.engines[0].hangs = True
    stage.fleet.check()
    until(lambda: stage.engines[1].asked)
    stage.engines[1].answer()
    assert request.group.result(SOON).prompt.answer == 0


def test_a_swap_waits_for_the_replacement_of_the_only_engine() -> None:
    stage = Stage(1)
    stage.engines[0].die()
    assert stage.fleet.swap(adapter(3)) == []
    assert stage.engines[1].held == [3]


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
    assert stage.engines[2].held == [2]


def test_when_no_engine_can_be_started_every_prompt_fails_with_the_reason() -> None:
    def start(number: int) -> Any:
        raise OSError("no memory")

    stage = Stage(1, start, restarts=1)
    stage.fleet.swap(adapter(0))
    requests = stage.ask(0, 1)
    stage.engines[0].die()
    for request in requests:
        with pytest.raises(RloraError, match=r"every engine is gone.*in 1 tries \(no memory\)"):
            request.group.result(SOON)
    with pytest.raises(RloraError, match="every engine is gone"):
        stage.fleet.swap(adapter(1))
    with pytest.raises(RloraError, match="every engine is gone"):
        stage.ask(2)[0].group.result(SOON)


def test_an_engine_that_can_not_be_started_is_not_tried_for_ever_beside_those_that_work() -> None:
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
    stage.fleet.resize(2)  # as it was asked before: nothing new
    stage.fleet.swap(adapter(1))
    time.sleep(0.1)
    assert tries == [2, 3]


def test_what_nobody_waits_for_is_not_sampled_again() -> None:
    stage = Stage(1)
    stage.fleet.swap(adapter(0))
    dropped, kept = stage.ask(0, 1)
    dropped.cancelled = True
    stage.engines[0].die()
    until(lambda: len(stage.engines) == 2 and stage.engines[1].asked)
    stage.engines[1].answer()
    assert kept.group.result(SOON).prompt.answer == 1
    assert [answer for answer, _, _ in stage.engines[1].asked] == [1]
    assert stage.fleet.stats().replayed == 1


def test_a_prompt_that_every_engine_dies_of_is_told() -> None:
    stage = Stage(1)
    stage.fleet.swap(adapter(0))
    (request,) = stage.ask(7)
    while not request.group.done():
        until(lambda: request.group.done() or any(engine.asked and not engine.dead for engine in stage.engines))
        for engine in stage.engines:
            if engine.asked:
                engine.die()
    with pytest.raises(RloraError, match=r"5 engines were lost while they sampled '\?'"):
        request.group.result()


def test_a_user_error_reaches_the_one_who_asked() -> None:
    stage = Stage(1)
    stage.fleet.swap(adapter(0))
    (request,) = stage.ask(0)
    stage.engines[0].asked[0][2].set_exception(ValueError("the prompt is too long"))
    with pytest.raises(ValueError, match="too long"):
        request.group.result(SOON)
    assert stage.fleet.stats().lost == 0


def test_engines_come_and_go_as_asked() -> None:
    stage = Stage(1)
    stage.fleet.swap(adapter(0))
    stage.fleet.resize(3)
    until(lambda: stage.fleet.stats().engines == 3)
    assert [engine.held for engine in stage.engines] == [[0], [0], [0]]
    requests = stage.ask(0, 1, 2)
    stage.fleet.resize(1)
    assert stage.fleet.stats().engines == 3  # they end after their last prompt
    late = stage.ask(3)
    for engine in stage.engines:
        engine.answer()
    assert all(request.group.result(SOON) for request in requests + late)
    until(lambda: stage.fleet.stats().engines == 1)
    assert [getattr(engine, "closed", False) for engine in stage.engines] == [False, True, True]
    assert stage.fleet.stats().lost == 0
    stage.fleet.resize(1)
    assert len(stage.numbers) == 2
