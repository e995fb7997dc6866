from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from rlora.config import Config, validate
from rlora.delivery import Request
from rlora.records import Adapter, Episode, Group, Prompt, Reward, RewardError, Sampling
from rlora.rollout import Rollouts, prompt_at
from rlora.task import Task

PROMPTS = [Prompt("?", answer=number, token_ids=(number,)) for number in range(5)]


class FakeFleet:
    """Completes every prompt with its own token ids, at once but for the answers in `held`."""

    def __init__(self) -> None:
        self.version = 0
        self.held: set[int] = set()
        self.requests: list[Request] = []

    def generate(self, prompt: Prompt, sampling: Sampling) -> Request:
        request = Request(prompt, sampling, adapter=Adapter("run", self.version, b"{}", b""))
        self.requests.append(request)
        if prompt.answer not in self.held:
            answer(request)
        return request

    def check(self) -> None:
        pass


def answer(request: Request) -> None:
    assert request.version is not None
    episode = Episode(request.prompt.token_ids, (-1.0,), "stop", request.version)
    request.group.set_result(Group(request.prompt, (episode,) * request.sampling.group_size))


class FakeTokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, ids))


def equal(completions: list[str], answers: list[Any]) -> list[float]:
    return [float(int(c) == a) for c, a in zip(completions, answers, strict=True)]


@pytest.fixture
def rollouts() -> Iterator[Callable[..., Rollouts]]:
    made = []

    def make(reward: Reward = equal, **changes: Any) -> Rollouts:
        values = {"model": "-", "env": "-", "reward": "-", "prompts_per_step": 4, "group_size": 2, "steps": 10}
        engine = {"straggler_seconds": 0.2}
        config: Config = validate(values | {"engine": engine} | changes)
        task = Task("", FakeTokenizer(), (), reward, PROMPTS, [], 0)  # type: ignore[arg-type]
        made.append(Rollouts(config, task, FakeFleet(), 0))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


def fleet_of(rollouts: Rollouts) -> FakeFleet:
    return rollouts.fleet  # type: ignore[return-value]


def answers(groups: tuple[Group, ...]) -> list[int]:
    return [group.prompt.answer for group in groups]


def order(count: int) -> list[int]:
    return [prompt_at(PROMPTS, place, seed=0).answer for place in range(count)]


def test_a_step_gets_its_prompts_groups_in_their_order_with_rewards(rollouts: Callable[..., Rollouts]) -> None:
    made = rollouts()
    collection = made.take(0)
    assert answers(collection.groups) == order(4)
    assert all(group.rewards == [1.0, 1.0] for group in collection.groups)
    assert (collection.late, collection.stale) == (0, 0)
    assert len(fleet_of(made).requests) == 4  # on policy: no more than one step in flight


def test_steps_ahead_are_sampled_before_they_are_asked_for_and_no_more_than_the_run_needs(
    rollouts: Callable[..., Rollouts],
) -> None:
    made = rollouts(max_staleness=1, steps=3)
    taken = []
    for version in range(3):
        fleet_of(made).version = version
        taken.append(made.take(version).groups)
    assert [answer for groups in taken for answer in answers(groups)] == order(12)
    assert [{e.version for g in groups for e in g.episodes} for groups in taken] == [{0}, {0}, {1}]
    assert len(fleet_of(made).requests) == 12


def test_refills_do_not_wait_for_what_was_late(rollouts: Callable[..., Rollouts]) -> None:
    made = rollouts(algorithm={"refills": 2})
    slow = order(4)[2]
    fleet_of(made).held = {slow}
    collection = made.take(0)
    assert (answers(collection.sampled), collection.late) == ([a for a in order(4) if a != slow], 1)
    assert len(fleet_of(made).requests) == 4


def test_what_makes_up_for_groups_that_agree_is_waited_for_no_longer_than_a_straggler(
    rollouts: Callable[..., Rollouts],
) -> None:
    made = rollouts(algorithm={"refills": 2})
    held = order(5)[4]
    fleet_of(made).held = {held}
    collection = made.take(0)  # all rewards agree, so 4 more are asked for, once
    assert answers(collection.sampled) == [answer for answer in order(8) if answer != held]
    assert (collection.groups, collection.late) == ((), order(8).count(held))


def test_a_late_group_counts_for_a_later_step_while_it_is_fresh(rollouts: Callable[..., Rollouts]) -> None:
    made = rollouts(max_staleness=1)
    fleet = fleet_of(made)
    slow = order(4)[1]
    fleet.held = {slow}
    first = made.take(0)
    assert (answers(first.groups), first.late) == ([a for a in order(4) if a != slow], 1)
    fleet.version, fleet.held = 1, set()
    for request in fleet.requests:
        if not request.group.done():
            answer(request)
    second = made.take(1)
    assert answers(second.groups)[0] == slow
    assert (second.late, second.stale, len(second.groups)) == (0, 0, 4)


def test_a_group_that_comes_too_late_is_counted_and_its_prompt_comes_first_again(
    rollouts: Callable[..., Rollouts],
) -> None:
    made = rollouts()
    fleet = fleet_of(made)
    slow = order(4)[1]
    fleet.held = {slow}
    assert made.take(0).late == 1
    answer(fleet.requests[1])  # when the step is over: it is of version 0, and too stale
    fleet.version, fleet.held = 1, set()
    second = made.take(1)
    assert (answers(second.groups)[0], second.stale) == (slow, 1)
    assert {episode.version for group in second.groups for episode in group.episodes} == {1}
    assert answers(second.groups)[1:] == order(7)[4:]  # no prompt is left out, and none comes twice


def test_half_of_a_step_is_waited_for_however_long_it_takes(rollouts: Callable[..., Rollouts]) -> None:
    made = rollouts(engine={"straggler_seconds": 0.01, "patience": 0.05})
    fleet = fleet_of(made)
    fleet.held = set(order(4)[:3])
    checked = []

    def check() -> None:
        checked.append(True)
        if len(checked) == 2:
            answer(fleet.requests[0])

    fleet.check = check  # type: ignore[method-assign]
    collection = made.take(0)
    assert (len(collection.groups), collection.late, len(checked)) == (2, 2, 2)


def raises(completions: list[str], answers: list[Any]) -> list[float]:
    raise KeyError("boom")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises, r"it raised KeyError: 'boom' \(answer \d, completions \['\d', '\d'\]\)"),
        (lambda c, a: [float("nan"), 1.0], r"it returned nan for '\d'; return a finite number"),
        (lambda c, a: [1.0, float("inf")], r"it returned inf for '\d'"),
        (lambda c, a: [1.0], r"it returned \[1\.0\] for 2 completions"),
        (lambda c, a: 1.0, r"it returned 1\.0 for 2 completions"),
        (lambda c, a: ["1", "0"], r"it returned '1' for '\d'"),
        (lambda c, a: [None, 1.0], r"it returned None for '\d'"),
        (lambda c, a: [1j, 1.0], r"it returned 1j for '\d'"),
        (lambda c, a: [10**400, 1.0], r"it returned 10+ for '\d'"),
        (lambda c, a: [torch.ones(2), 1.0], r"it returned tensor\(.*\) for '\d'"),
    ],
)
def test_a_reward_that_misbehaves_is_told_and_what_was_sampled_is_kept(
    rollouts: Callable[..., Rollouts], reward: Reward, message: str
) -> None:
    with pytest.raises(RewardError, match=message) as error:
        rollouts(reward).take(0)
    assert answers(error.value.groups) == order(4)
    assert error.value.groups[0].episodes[0].text == str(order(1)[0])


def test_a_reward_that_exits_ends_the_step(rollouts: Callable[..., Rollouts]) -> None:
    def leaves(completions: list[str], answers: list[Any]) -> list[float]:
        raise SystemExit("no more")

    with pytest.raises(SystemExit, match="no more"):
        rollouts(leaves).take(0)


def test_a_failed_fleet_ends_the_step(rollouts: Callable[..., Rollouts]) -> None:
    made = rollouts()
    fleet = fleet_of(made)
    fleet.held = set(order(4))
    gone: Future[Group] = Future()
    gone.set_exception(RuntimeError("every engine is gone"))
    fleet.generate = lambda prompt, sampling: Request(prompt, sampling, gone)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="every engine is gone"):
        made.take(0)


def test_each_epoch_goes_once_through_all_prompts_in_its_own_order() -> None:
    seen = order(10)
    first, second = seen[:5], seen[5:]
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second
    assert [prompt_at(PROMPTS, place, seed=1).answer for place in range(10)] != seen


def test_groups_that_agree_are_made_up_for_so_many_times(rollouts: Callable[..., Rollouts]) -> None:
    def sometimes(completions: list[str], answers: list[Any]) -> list[float]:
        return [0.0, float(int(completions[0]) >= 2)]  # prompts 0 and 1 teach nothing

    def informative(answer: int) -> bool:
        return answer >= 2

    for refills in (1, 3):
        made = rollouts(sometimes, algorithm={"refills": refills})
        collection = made.take(0)
        taken = answers(collection.sampled)
        assert taken == order(len(taken))
        assert answers(collection.groups) == [answer for answer in taken if informative(answer)]
        assert len(fleet_of(made).requests) == len(taken) > 4
    assert len(collection.groups) == 4
    assert len(rollouts(sometimes).take(0).groups) == 4  # without it all are learned from, and count
