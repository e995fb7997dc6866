"""Prompts in, scored groups out: tracks prompts in flight, stragglers, and groups that are too stale to learn from."""

import math
import random
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from rlora.records import Adapter, Group, Prompt, RewardError, RloraError, Sampling
from rlora.rollout.cursor import Cursor, InFlight
from rlora.rollout.fleet import Fleet, wait_for
from rlora.rollout.player import AgentLoop, Flight
from rlora.settings import Config

_Item = TypeVar("_Item")
_LOWEST_TEMPERATURE = 0.01  # vLLM samples at this temperature in place of lower ones


@dataclass(frozen=True)
class Collection:
    """The scored groups of one step."""

    groups: tuple[Group, ...]  # to learn from
    sampled: tuple[Group, ...]  # all groups, including those without a learning signal; empty for given completions
    reward_seconds: float
    late: int  # prompts that the step did not wait for; their groups may still arrive in time for a later step
    stale: int  # prompts whose groups arrived too late to learn from and that are sampled again
    straggler_seconds: float = 0.0  # spent waiting for the last quarter of the groups


@dataclass(frozen=True, eq=False)
class _SentPrompt:
    position: int  # in the order of all prompts over all epochs
    step: int  # the step that sent it
    flight: Flight

    @property
    def adapter(self) -> Adapter | None:
        return self.flight.request.adapter

    @property
    def record(self) -> InFlight:
        scored = self.flight.scored
        done = scored.done() and not scored.exception()
        group = scored.result() if done else self.flight.played
        return InFlight(self.position, self.step, self.adapter, group, done)


class Rollouts:
    """Keeps the prompts of `max_staleness` + 1 steps in flight and gives each step its groups.

    A step takes the groups in the order in which their prompts were sent, whatever the length of the completions.
    `cursor` is the state in which an earlier process stopped: prompts that were in flight continue, and completions
    that were sampled are not sampled again. For a new run, pass `Cursor()`.
    """

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], fleet: Fleet, loop: AgentLoop, cursor: Cursor
    ) -> None:
        self.config, self.prompts, self.fleet, self.loop = config, prompts, fleet, loop
        self.sampling = sampling_of(config, config.group_size)
        self._next = cursor.next  # position of the next prompt that was never sent
        self._retries = deque(cursor.retries)  # positions to sample again, before new ones
        self._inherited = cursor.in_flight  # the earlier process's prompts, until the fleet has an adapter
        self._sent: list[_SentPrompt] = []  # in the order in which they were sent
        self._stale = 0  # prompts discarded since the last step
        self._straggler_seconds = 0.0  # of the current step, after three quarters of its groups have arrived
        self._half_since: float | None = None  # when half of the next step's groups had arrived

    @property
    def cursor(self) -> Cursor:
        """State from which another process can resume."""
        in_flight = (*(sent.record for sent in self._sent), *self._inherited)
        return Cursor(self._next, tuple(self._retries), in_flight)

    def send(self, version: int) -> None:
        """Send the prompts of the step that updates `version`, and of the `max_staleness` next steps. Does not block.

        Prompts in flight that would be too stale for this step are discarded, and sent again before any other prompt.
        """
        self._stale += self._drop_stale(version - self.config.max_staleness)
        self._resume_inherited()
        self._fill(version, self.config.prompts_per_step)

    @property
    def pending(self) -> list[Future[Group]]:
        """Futures of the groups of the next step that have not arrived yet."""
        step = self._sent[: self.config.prompts_per_step]
        return [sent.flight.scored for sent in step if not sent.flight.scored.done()]

    @property
    def due(self) -> bool:
        """Whether `take` would not block.

        True if all groups of the next step have arrived, if a group has failed, or if half of the groups have arrived
        and `config.straggler_seconds` have passed since then.
        """
        step = [sent.flight.scored for sent in self._sent[: self.config.prompts_per_step]]
        done = [scored for scored in step if scored.done()]
        if len(done) == len(step) or any(scored.exception() for scored in done):
            return True
        half = len(done) >= math.ceil(len(step) / 2)
        self._half_since = (self._half_since or time.monotonic()) if half else None
        return half and time.monotonic() - (self._half_since or 0.0) > self.config.straggler_seconds

    def take(self, version: int) -> Collection:
        """Block until the groups of `prompts_per_step` prompts have arrived, for the step that updates `version`.

        After half of the groups have arrived, the others get `config.straggler_seconds`; groups that are late then
        are missing from the result. Groups without a learning signal (equal rewards) are replaced in up to
        `algorithm.refills` rounds (DAPO's dynamic sampling, arXiv:2503.14476, section 3.2), but not if groups of the
        step are late. The first half of a refill gets as long as the first round took, the rest
        `config.straggler_seconds`. Raises RewardError, which carries the sampled groups, if the reward functions fail,
        and the errors of sampling.
        """
        count, refills = self.config.prompts_per_step, self.config.algorithm.refills
        self.send(version)
        stale, self._stale, self._half_since = self._stale, 0, None
        start, self._straggler_seconds = time.monotonic(), 0.0
        taken, late = self._take_next(version, count)
        seconds = time.monotonic() - start
        sampled = self._groups(taken)
        for _ in range(refills):
            missing = count - sum(group.informative for group in sampled)
            if late or not missing:  # wait for stragglers once only
                break
            refill, late = self._take_next(version, missing, seconds)
            taken += refill
            sampled = self._groups(taken)
        least = 2 if self.config.algorithm.of_group else 1
        groups = tuple(group.scored for group in sampled if len(group.rewards) >= least)
        if refills:
            groups = tuple(group for group in groups if group.informative)
        reward_seconds = sum(sent.flight.reward_seconds for sent in taken)
        return Collection(groups, sampled, reward_seconds, late, stale, self._straggler_seconds)

    def _take_next(self, version: int, count: int, seconds: float = math.inf) -> tuple[list[_SentPrompt], int]:
        """Wait for the next `count` prompts, and remove those that have arrived from the prompts in flight.

        Returns the removed prompts and the number of late ones. Waits up to `seconds` for the first half.
        """
        self._fill(version, count)  # a refill needs more prompts than are in flight
        step = self._sent[:count]
        self._await(step, math.ceil(count / 2), seconds)
        half_at, longest = time.monotonic(), self.config.straggler_seconds
        self._await(step, math.ceil(count * 3 / 4), longest)
        most_at = time.monotonic()
        self._await(step, count, half_at + longest - most_at)
        self._straggler_seconds += time.monotonic() - most_at
        done = [sent for sent in step if sent.flight.scored.done()]
        self._sent = [sent for sent in self._sent if sent not in done]
        return done, len(step) - len(done)

    def _fill(self, version: int, count: int) -> None:
        """Send prompts until `count` prompts, and the prompts of the steps ahead, are in flight."""
        steps_ahead = min(self.config.max_staleness, self.config.steps - version - 1)
        while len(self._sent) < count + steps_ahead * self.config.prompts_per_step:
            position = self._retries.popleft() if self._retries else self._next_position()
            flight = self.loop.start(self._prompt(position), self.sampling, version)
            self._sent.append(_SentPrompt(position, version, flight))

    def _prompt(self, position: int) -> Prompt:
        return prompt_at(self.prompts, position, self.config.seed)

    def _next_position(self) -> int:
        self._next += 1
        return self._next - 1

    def _resume_inherited(self) -> None:
        """Continue the prompts that an earlier process had in flight."""
        for previous in self._inherited:
            flight = self.loop.resume(previous, self._prompt(previous.position), self.sampling)
            self._sent.append(_SentPrompt(previous.position, previous.step, flight))
        self._inherited = ()

    def _drop_stale(self, oldest: int) -> int:
        """Discard the prompts sampled under versions below `oldest`, to send them again. Returns their number."""
        stale_inherited = [item for item in self._inherited if _is_stale(item.adapter, oldest)]
        stale_sent = [sent for sent in self._sent if _is_stale(sent.adapter, oldest)]
        self._inherited = tuple(item for item in self._inherited if item not in stale_inherited)
        self._sent = [sent for sent in self._sent if sent not in stale_sent]
        for sent in stale_sent:
            sent.flight.cancel()
        self._retries.extend(item.position for item in stale_inherited)
        self._retries.extend(sent.position for sent in stale_sent)
        return len(stale_inherited) + len(stale_sent)

    def _await(self, sent_prompts: Sequence[_SentPrompt], count: int, seconds: float) -> None:
        scored = [sent.flight.scored for sent in sent_prompts]
        wait_for(scored, count, seconds, self.config.engine.patience, self.fleet.check)

    def _groups(self, taken: Sequence[_SentPrompt]) -> tuple[Group, ...]:
        try:
            groups = tuple(sent.flight.scored.result() for sent in taken)
            self.loop.scoring.check_errors(groups)
        except RewardError as error:
            flights = [sent.flight for sent in (*taken, *self._sent)]
            wait([flight.request.group for flight in flights], self.config.straggler_seconds)
            raise RewardError(str(error), [flight.played for flight in flights if flight.played]) from error
        return groups


def sampling_of(config: Config, group_size: int, temperature: float | None = None) -> Sampling:
    """Return the sampling settings of a config for groups of `group_size`. `temperature` overrides the config's; 0 is
    greedy, without top-k, top-p and min-p. Raises RloraError for a temperature that vLLM can't sample at, and for
    several greedy completions per prompt."""
    sampling = config.sampling
    if temperature is not None and not (temperature == 0 or temperature >= _LOWEST_TEMPERATURE):
        raise RloraError(f"temperature = {temperature:g}: use 0 (greedy), or {_LOWEST_TEMPERATURE} or more")
    if temperature == 0 and group_size > 1:
        raise RloraError(
            f"temperature = 0: it is greedy, so the {group_size} completions of a prompt would be the same; sample one "
            "completion per prompt, or set a temperature above 0"
        )
    if temperature == 0:
        return Sampling(sampling.max_tokens, 0.0, group_size)
    chosen = sampling.temperature if temperature is None else temperature
    return Sampling(sampling.max_tokens, chosen, group_size, sampling.top_k, sampling.top_p, sampling.min_p)


def prompt_at(prompts: Sequence[_Item], position: int, seed: int) -> _Item:
    """Return the prompt, or example, at `position`, counted over all epochs.

    Each epoch visits all of them once, in an order that depends on `seed` and the epoch.
    """
    epoch, index = divmod(position, len(prompts))
    return prompts[_order(len(prompts), seed, epoch)[index]]


def _is_stale(adapter: Adapter | None, oldest: int) -> bool:
    return adapter is not None and adapter.number < oldest  # None: no engine had room yet


@lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(length), length)
