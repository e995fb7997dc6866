"""prompts x engines x reward -> groups."""

import itertools
import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlora.records import Engine, Episode, Group, Prompt, Reward, RewardError, Sampling
from rlora.task import Task


@dataclass(frozen=True)
class Collection:
    """The scored groups of one step, and what they took."""

    groups: tuple[Group, ...]
    sampling_seconds: float
    reward_seconds: float


def prompts_of_step(prompts: Sequence[Prompt], step: int, count: int, seed: int) -> list[Prompt]:
    """The `count` prompts of a step: each epoch goes once through all prompts, in an order of its own."""
    places = range(step * count, (step + 1) * count)
    return [prompts[_order(len(prompts), seed, place // len(prompts))[place % len(prompts)]] for place in places]


@lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(length), length)


def collect(
    task: Task, engines: Sequence[Engine], prompts: Sequence[Prompt], sampling: Sampling, version: int
) -> Collection:
    """Sample a group for each prompt, sharing the prompts out over the engines, and score them.

    Raises RewardError, which keeps the sampled groups, where the reward function fails.
    """
    start = time.perf_counter()
    shares = [prompts[i :: len(engines)] for i in range(len(engines))]
    with ThreadPoolExecutor(len(engines)) as pool:
        sampled = pool.map(lambda engine, share: engine.generate(share, sampling, version), engines, shares)
        dealt = itertools.zip_longest(*sampled)  # undo the sharing out: prompt i went to engine i mod n
    groups = [_with_text(group, task.tokenizer) for hand in dealt for group in hand if group is not None]
    sampled_at = time.perf_counter()
    try:
        scored = tuple(score(group, task.reward) for group in groups)
    except RewardError as error:
        raise RewardError(str(error), groups) from error
    return Collection(scored, sampled_at - start, time.perf_counter() - sampled_at)


def _with_text(group: Group, tokenizer: PreTrainedTokenizerBase) -> Group:
    def text(episode: Episode) -> str:
        return str(tokenizer.decode(list(episode.completion_ids), skip_special_tokens=True))

    return replace(group, episodes=tuple(replace(episode, text=text(episode)) for episode in group.episodes))


def score(group: Group, reward: Reward) -> Group:
    """The group with rewards. Raises RewardError where the function fails or returns anything but finite numbers."""
    completions = [episode.text for episode in group.episodes]
    try:
        rewards = reward(completions, [group.prompt.answer] * len(completions))
    except Exception as error:
        raise RewardError(
            f"reward: it raised {type(error).__name__}: {error} (answer {group.prompt.answer!r}, completions "
            f"{completions!r}); return a number for every text, an empty or senseless one too"
        ) from error
    if not isinstance(rewards, Sequence) or isinstance(rewards, str) or len(rewards) != len(completions):
        raise RewardError(
            f"reward: it returned {rewards!r} for {len(completions)} completions; return a list of as many numbers"
        )
    for completion, value in zip(completions, rewards, strict=True):
        if not _is_finite_number(value):
            raise RewardError(f"reward: it returned {value!r} for {completion!r}; return a finite number")
    return group.with_rewards([float(value) for value in rewards])


def _is_finite_number(value: Any) -> bool:
    """Whether a user's value is a real number that a float can hold: numpy's and torch's scalars are, text is not."""
    try:
        return not isinstance(value, str) and math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # complex, None, a list, 10**400, a tensor of many
        return False
