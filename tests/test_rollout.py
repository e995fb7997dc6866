from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rlora.records import Episode, Group, Prompt, Reward, RewardError, Sampling
from rlora.rollout import collect, prompts_of_step
from rlora.task import Task


class FakeEngine:
    """Completes every prompt with its own token ids, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        self.asked += [prompt.token_ids for prompt in prompts]
        episodes = [Episode(prompt.token_ids, (-1.0,), "stop", version) for prompt in prompts]
        return [Group(p, (e,) * sampling.group_size) for p, e in zip(prompts, episodes, strict=True)]


class FakeTokenizer:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, ids))


def task(reward: Reward) -> Task:
    return Task("", FakeTokenizer(), (), reward, [], [], 0)  # type: ignore[arg-type]


PROMPTS = [Prompt("?", answer=number, token_ids=(number,)) for number in range(5)]
SAMPLING = Sampling(max_tokens=1, group_size=2)


def test_groups_come_back_in_order_from_two_engines() -> None:
    engines: Any = [FakeEngine(), FakeEngine()]

    def equal(completions: list[str], answers: list[Any]) -> list[float]:
        return [float(int(c) == a) for c, a in zip(completions, answers, strict=True)]

    collection = collect(task(equal), engines, PROMPTS, SAMPLING, version=7)
    assert [group.prompt for group in collection.groups] == PROMPTS
    assert all(group.rewards == [1.0, 1.0] for group in collection.groups)
    assert {episode.version for group in collection.groups for episode in group.episodes} == {7}
    assert [engine.asked for engine in engines] == [[(0,), (2,), (4,)], [(1,), (3,)]]


def raises(completions: list[str], answers: list[Any]) -> list[float]:
    raise KeyError("boom")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises, r"it raised KeyError: 'boom' \(answer 0, completions \['0', '0'\]\)"),
        (lambda c, a: [float("nan"), 1.0], r"it returned nan for '0'; return a finite number"),
        (lambda c, a: [1.0, float("inf")], r"it returned inf for '0'"),
        (lambda c, a: [1.0], r"it returned \[1\.0\] for 2 completions"),
        (lambda c, a: 1.0, r"it returned 1\.0 for 2 completions"),
        (lambda c, a: ["1", "0"], r"it returned '1' for '0'"),
        (lambda c, a: [None, 1.0], r"it returned None for '0'"),
        (lambda c, a: [1j, 1.0], r"it returned 1j for '0'"),
        (lambda c, a: [10**400, 1.0], r"it returned 10+ for '0'"),
        (lambda c, a: [torch.ones(2), 1.0], r"it returned tensor\(.*\) for '0'"),
    ],
)
def test_a_reward_that_misbehaves_is_told_and_what_was_sampled_is_kept(reward: Reward, message: str) -> None:
    engines: Any = [FakeEngine()]
    with pytest.raises(RewardError, match=message) as error:
        collect(task(reward), engines, PROMPTS, SAMPLING, version=0)
    assert [group.prompt for group in error.value.groups] == PROMPTS


def test_each_epoch_goes_once_through_all_prompts_in_its_own_order() -> None:
    steps = [prompts_of_step(PROMPTS, step, 2, seed=0) for step in range(5)]
    seen = [prompt.answer for step in steps for prompt in step]
    first, second = seen[:5], seen[5:]
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4]
    assert first != second
    assert steps == [prompts_of_step(PROMPTS, step, 2, seed=0) for step in range(5)]  # a step's prompts are its own
    assert steps != [prompts_of_step(PROMPTS, step, 2, seed=1) for step in range(5)]
