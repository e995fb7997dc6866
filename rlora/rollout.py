"""Prompts in, scored groups out: what is in flight, what is late, and what is too stale to learn from."""

import math
import random
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlora.config import Config
from rlora.delivery import Fleet, Request, wait_for
from rlora.records import Episode, Group, Prompt, RewardError, Sampling
from rlora.task import Task


@dataclass(frozen=True)
class Collection:
    """The scored groups of one step."""

    groups: tuple[Group, ...]  # to learn from
    sampled: tuple[Group, ...]  # all of them
    reward_seconds: float
    late: int  # prompts that were not waited for; their groups may still come in time for a later step
    stale: int  # prompts whose groups came too late to learn from, and that are sampled again


@dataclass(eq=False)
class _Flight:
    """A prompt on its way to a scored group."""

    place: int  # of the prompt in the order of all
    request: Request
    scored: Future[Group] = field(default_factory=Future)
    reward_seconds: float = 0.0


class Rollouts:
    """Keeps `max_staleness` + 1 steps' prompts in flight, and gives each step its groups.

    Groups are scored as they come, on a thread of their own. A step takes the groups of its prompts in the order in
    which those were sent, whatever the length of their completions.
    """

    def __init__(self, config: Config, task: Task, fleet: Fleet, step: int) -> None:
        self.config, self.task, self.fleet = config, task, fleet
        self.sampling = Sampling(config.sampling.max_tokens, config.sampling.temperature, config.group_size)
        self._next = step * config.prompts_per_step  # place
        self._again: deque[int] = deque()  # places of prompts to sample again, before any other
        self._flights: list[_Flight] = []  # in the order they were sent
        self._scoring = ThreadPoolExecutor(1)

    def take(self, version: int) -> Collection:
        """The groups of `prompts_per_step` prompts, for the step that learns from `version` on.

        Fewer where some are late: once half are there, the rest get `engine.straggler_seconds`. Groups whose rewards
        agree are made up for `algorithm.refills` times (DAPO's dynamic sampling, arXiv:2503.14476, section 3.2), though
        not in a step that has late ones; half of what makes up gets as long as the first took, the rest those seconds.
        Raises RewardError, which keeps what was sampled, where the reward function fails.
        """
        count, refills = self.config.prompts_per_step, self.config.algorithm.refills
        stale = self._drop_stale(version - self.config.max_staleness)
        began = time.monotonic()
        flights, late = self._next_flights(version, count)
        took = time.monotonic() - began
        sampled = self._groups(flights)
        for _ in range(refills):
            missing = count - sum(group.informative for group in sampled)
            if late or not missing:  # what is late is waited for once, not again
                break
            others, late = self._next_flights(version, missing, took)
            flights += others
            sampled = self._groups(flights)
        groups = tuple(group for group in sampled if group.informative) if refills else sampled
        return Collection(groups, sampled, sum(flight.reward_seconds for flight in flights), late, stale)

    def _next_flights(self, version: int, count: int, took: float = math.inf) -> tuple[list[_Flight], int]:
        """Of the next `count` that were sent those that are there in time, and how many are not; others follow them."""
        steps_ahead = min(self.config.max_staleness, self.config.steps - version - 1)
        while len(self._flights) < count + steps_ahead * self.config.prompts_per_step:
            self._send(self._again.popleft() if self._again else self._new_place())
        step = self._flights[:count]
        self._await(step, math.ceil(count / 2), took)
        self._await(step, count, self.config.engine.straggler_seconds)
        there = [flight for flight in step if flight.scored.done()]
        self._flights = [flight for flight in self._flights if flight not in there]
        return there, len(step) - len(there)

    def close(self) -> None:
        """Score nothing any more; what is being scored is not waited for."""
        self._scoring.shutdown(wait=False, cancel_futures=True)

    def _new_place(self) -> int:
        self._next += 1
        return self._next - 1

    def _send(self, place: int) -> None:
        prompt = prompt_at(self.task.prompts, place, self.config.seed)
        flight = _Flight(place, self.fleet.generate(prompt, self.sampling))
        self._flights.append(flight)
        flight.request.group.add_done_callback(lambda sampled: self._later(flight, sampled))

    def _later(self, flight: _Flight, sampled: Future[Group]) -> None:
        with suppress(RuntimeError):  # closed
            self._scoring.submit(self._score, flight, sampled)

    def _score(self, flight: _Flight, sampled: Future[Group]) -> None:
        start = time.perf_counter()
        try:
            group = score(sampled.result(), self.task)
        except BaseException as error:  # a user's function may raise anything, and the step waits for it
            flight.scored.set_exception(error)
            return
        flight.reward_seconds = time.perf_counter() - start
        flight.scored.set_result(group)

    def _drop_stale(self, oldest: int) -> int:
        """Give up what was sampled before version `oldest`; those prompts come first again."""
        versions = [(flight, flight.request.version) for flight in self._flights]  # None while no engine had room
        stale = [flight for flight, version in versions if version is not None and version < oldest]
        self._flights = [flight for flight in self._flights if flight not in stale]
        for flight in stale:
            flight.request.cancelled = True
        self._again.extend(flight.place for flight in stale)
        return len(stale)

    def _await(self, flights: Sequence[_Flight], count: int, seconds: float) -> None:
        scored = [flight.scored for flight in flights]
        wait_for(scored, count, seconds, self.config.engine.patience, self.fleet.check)

    def _groups(self, flights: Sequence[_Flight]) -> tuple[Group, ...]:
        try:
            return tuple(flight.scored.result() for flight in flights)
        except RewardError as error:
            sampled = [flight.request.group for flight in (*flights, *self._flights)]
            done, _ = wait(sampled, self.config.engine.straggler_seconds)
            there = [each.result() for each in sampled if each in done and not each.exception()]
            groups = [with_text(group, self.task.tokenizer) for group in there]
            raise RewardError(str(error), groups) from error


def prompt_at(prompts: Sequence[Prompt], place: int, seed: int) -> Prompt:
    """The prompt at a place: each epoch goes once through all prompts, in an order of its own."""
    epoch, index = divmod(place, len(prompts))
    return prompts[_order(len(prompts), seed, epoch)[index]]


@lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(length), length)


def score(sampled: Group, task: Task) -> Group:
    """The group with texts and rewards.

    Raises RewardError where the reward function fails or returns anything but finite numbers.
    """
    group = with_text(sampled, task.tokenizer)
    completions = [episode.text for episode in group.episodes]
    try:
        rewards = task.reward(completions, [group.prompt.answer] * len(completions))
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


def with_text(group: Group, tokenizer: PreTrainedTokenizerBase) -> Group:
    """The group whose episodes have their texts, without special tokens."""

    def text(episode: Episode) -> str:
        return str(tokenizer.decode(list(episode.completion_ids), skip_special_tokens=True))

    return replace(group, episodes=tuple(replace(episode, text=text(episode)) for episode in group.episodes))


def _is_finite_number(value: Any) -> bool:
    """Whether a user's value is a real number that a float can hold: numpy's and torch's scalars are, text is not."""
    try:
        return not isinstance(value, str) and math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # complex, None, a list, 10**400, a tensor of many
        return False
