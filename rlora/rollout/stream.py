"""Prompts in, scored groups out: what is in flight, what is late, and what is too stale to learn from."""

import math
import random
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import lru_cache

from rlora.records import Adapter, Cursor, Group, InFlight, Prompt, RewardError, Sampling
from rlora.rollout.fleet import Fleet, wait_for
from rlora.rollout.player import AgentLoop, Flight
from rlora.settings import Config


@dataclass(frozen=True)
class Collection:
    """The scored groups of one step."""

    groups: tuple[Group, ...]  # to learn from
    sampled: tuple[Group, ...]  # all of them
    reward_seconds: float
    late: int  # prompts that were not waited for; their groups may still come in time for a later step
    stale: int  # prompts whose groups came too late to learn from, and that are sampled again


@dataclass(frozen=True, eq=False)
class _Sent:
    """A prompt in flight."""

    place: int  # of the prompt in the order of all
    step: int  # that sent it
    flight: Flight

    @property
    def adapter(self) -> Adapter | None:
        return self.flight.request.adapter

    @property
    def record(self) -> InFlight:
        scored = self.flight.scored
        done = scored.done() and not scored.exception()
        group = scored.result() if done else self.flight.played
        return InFlight(self.place, self.step, self.adapter, group, done)


class Rollouts:
    """Keeps `max_staleness` + 1 steps' prompts in flight, and gives each step its groups.

    A step takes the groups of its prompts in the order in which those were sent, whatever the length of their
    completions. `cursor` is where another's ended: what it had in flight goes on, and what it had sampled counts.
    """

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], fleet: Fleet, loop: AgentLoop, cursor: Cursor
    ) -> None:
        self.config, self.prompts, self.fleet, self.loop = config, prompts, fleet, loop
        self.sampling = sampling_of(config, config.group_size)
        self._next = cursor.next
        self._again = deque(cursor.again)
        self._before = cursor.in_flight  # another's, until the fleet has an adapter
        self._sent: list[_Sent] = []  # in their order

    @property
    def cursor(self) -> Cursor:
        """Where another can go on."""
        return Cursor(self._next, tuple(self._again), (*(each.record for each in self._sent), *self._before))

    def take(self, version: int) -> Collection:
        """The groups of `prompts_per_step` prompts, for the step that learns from `version` on.

        Fewer where some are late: once half are there, the rest get `engine.straggler_seconds`. Groups whose rewards
        agree are made up for `algorithm.refills` times (DAPO's dynamic sampling, arXiv:2503.14476, section 3.2), though
        not in a step that has late ones; half of what makes up gets as long as the first took, the rest those seconds.
        Raises RewardError, which keeps what was sampled, where the reward functions fail.
        """
        count, refills = self.config.prompts_per_step, self.config.algorithm.refills
        stale = self._drop_stale(version - self.config.max_staleness)
        self._take_over()
        began = time.monotonic()
        taken, late = self._next_ones(version, count)
        took = time.monotonic() - began
        sampled = self._groups(taken)
        for _ in range(refills):
            missing = count - sum(group.informative for group in sampled)
            if late or not missing:  # what is late is waited for once, not again
                break
            others, late = self._next_ones(version, missing, took)
            taken += others
            sampled = self._groups(taken)
        least = 2 if self.config.algorithm.of_group else 1
        groups = tuple(group.scored for group in sampled if len(group.rewards) >= least)
        if refills:
            groups = tuple(group for group in groups if group.informative)
        return Collection(groups, sampled, sum(each.flight.reward_seconds for each in taken), late, stale)

    def _next_ones(self, version: int, count: int, took: float = math.inf) -> tuple[list[_Sent], int]:
        """Of the next `count` that were sent those that are there in time, and how many are not; others follow them."""
        steps_ahead = min(self.config.max_staleness, self.config.steps - version - 1)
        while len(self._sent) < count + steps_ahead * self.config.prompts_per_step:
            place = self._again.popleft() if self._again else self._new_place()
            self._sent.append(_Sent(place, version, self.loop.start(self._prompt(place), self.sampling, version)))
        step = self._sent[:count]
        self._await(step, math.ceil(count / 2), took)
        self._await(step, count, self.config.engine.straggler_seconds)
        there = [each for each in step if each.flight.scored.done()]
        self._sent = [each for each in self._sent if each not in there]
        return there, len(step) - len(there)

    def _prompt(self, place: int) -> Prompt:
        return prompt_at(self.prompts, place, self.config.seed)

    def _new_place(self) -> int:
        self._next += 1
        return self._next - 1

    def _take_over(self) -> None:
        """Go on with what another had in flight."""
        for each in self._before:
            flight = self.loop.go_on(each, self._prompt(each.place), self.sampling)
            self._sent.append(_Sent(each.place, each.step, flight))
        self._before = ()

    def _drop_stale(self, oldest: int) -> int:
        """Give up what is sampled under versions before `oldest`; those prompts come first again. Returns how many."""
        in_flight: list[InFlight | _Sent] = [*self._before, *self._sent]
        adapters = [(each, each.adapter) for each in in_flight]  # None while no engine had room
        stale = [each for each, adapter in adapters if adapter and adapter.number < oldest]
        self._before = tuple(each for each in self._before if each not in stale)
        self._sent = [each for each in self._sent if each not in stale]
        for each in stale:
            if isinstance(each, _Sent):
                each.flight.cancel()
        self._again.extend(each.place for each in stale)
        return len(stale)

    def _await(self, sent: Sequence[_Sent], count: int, seconds: float) -> None:
        scored = [each.flight.scored for each in sent]
        wait_for(scored, count, seconds, self.config.engine.patience, self.fleet.check)

    def _groups(self, sent: Sequence[_Sent]) -> tuple[Group, ...]:
        try:
            groups = tuple(each.flight.scored.result() for each in sent)
            self.loop.scoring.refuse_errors(groups)
        except RewardError as error:
            flights = [each.flight for each in (*sent, *self._sent)]
            wait([flight.request.group for flight in flights], self.config.engine.straggler_seconds)
            raise RewardError(str(error), [flight.played for flight in flights if flight.played]) from error
        return groups


def sampling_of(config: Config, group_size: int, temperature: float | None = None) -> Sampling:
    """How the config has completions sampled."""
    sampling = config.sampling
    return Sampling(sampling.max_tokens, sampling.temperature if temperature is None else temperature, group_size)


def prompt_at(prompts: Sequence[Prompt], place: int, seed: int) -> Prompt:
    """The prompt at a place: each epoch goes once through all prompts, in an order of its own."""
    epoch, index = divmod(place, len(prompts))
    return prompts[_order(len(prompts), seed, epoch)[index]]


@lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(length), length)
