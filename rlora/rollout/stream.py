"""Prompts in, scored groups out: what is in flight, what is late, and what is too stale to learn from."""

import math
import random
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
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
    straggler_seconds: float = 0.0  # of the wait for the last quarter of the groups


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
        self._stale = 0  # that were given up since the last step
        self._straggling = 0.0  # seconds of the step under way, once three quarters of its groups were there
        self._half_since: float | None = None  # when half of the next step's groups were there

    @property
    def cursor(self) -> Cursor:
        """Where another can go on."""
        return Cursor(self._next, tuple(self._again), (*(each.record for each in self._sent), *self._before))

    def send(self, version: int) -> None:
        """Have prompts sampled for the step that learns from `version` on, and for as many after it as may be stale.

        Those that are too stale by then are given up; their prompts come first again.
        """
        self._stale += self._drop_stale(version - self.config.max_staleness)
        self._take_over()
        self._fill(version, self.config.prompts_per_step)

    @property
    def coming(self) -> list[Future[Group]]:
        """The groups of the next step that are not there yet."""
        step = self._sent[: self.config.prompts_per_step]
        return [each.flight.scored for each in step if not each.flight.scored.done()]

    @property
    def due(self) -> bool:
        """Whether `take` would not wait: all groups of the next step are there, or half and the stragglers' time is
        over, or one has failed."""
        step = [each.flight.scored for each in self._sent[: self.config.prompts_per_step]]
        there = [each for each in step if each.done()]
        if len(there) == len(step) or any(each.exception() for each in there):
            return True
        half = len(there) >= math.ceil(len(step) / 2)
        self._half_since = (self._half_since or time.monotonic()) if half else None
        return half and time.monotonic() - (self._half_since or 0.0) > self.config.straggler_seconds

    def take(self, version: int) -> Collection:
        """The groups of `prompts_per_step` prompts, for the step that learns from `version` on.

        Fewer where some are late: once half are there, the rest get `engine.straggler_seconds`. Groups whose rewards
        agree are made up for `algorithm.refills` times (DAPO's dynamic sampling, arXiv:2503.14476, section 3.2), though
        not in a step that has late ones; half of what makes up gets as long as the first took, the rest those seconds.
        Raises RewardError, which keeps what was sampled, where the reward functions fail.
        """
        count, refills = self.config.prompts_per_step, self.config.algorithm.refills
        self.send(version)
        stale, self._stale, self._half_since = self._stale, 0, None
        began, self._straggling = time.monotonic(), 0.0
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
        reward_seconds = sum(each.flight.reward_seconds for each in taken)
        return Collection(groups, sampled, reward_seconds, late, stale, self._straggling)

    def _next_ones(self, version: int, count: int, took: float = math.inf) -> tuple[list[_Sent], int]:
        """Of the next `count` that were sent those that are there in time, and how many are not; others follow them."""
        self._fill(version, count)  # more, where groups are made up for
        step = self._sent[:count]
        self._await(step, math.ceil(count / 2), took)
        half_at, longest = time.monotonic(), self.config.straggler_seconds
        self._await(step, math.ceil(count * 3 / 4), longest)
        most_at = time.monotonic()
        self._await(step, count, half_at + longest - most_at)
        self._straggling += time.monotonic() - most_at
        there = [each for each in step if each.flight.scored.done()]
        self._sent = [each for each in self._sent if each not in there]
        return there, len(step) - len(there)

    def _fill(self, version: int, count: int) -> None:
        """Have `count` prompts in flight, and those of the steps ahead."""
        steps_ahead = min(self.config.max_staleness, self.config.steps - version - 1)
        while len(self._sent) < count + steps_ahead * self.config.prompts_per_step:
            place = self._again.popleft() if self._again else self._new_place()
            self._sent.append(_Sent(place, version, self.loop.start(self._prompt(place), self.sampling, version)))

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
            wait([flight.request.group for flight in flights], self.config.straggler_seconds)
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
