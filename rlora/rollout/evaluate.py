"""Evaluation of an adapter version on held-out prompts."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rlora.records import Adapter, Group, Prompt, RewardError, Sampling
from rlora.rollout.fleet import Fleet, wait_for
from rlora.rollout.player import AgentLoop, Flight
from rlora.rollout.stream import sampling_of
from rlora.settings import Config


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} (95% {self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Evaluation:
    """Metrics of the completions of one evaluation set, as `summarise` returns them."""

    accuracy: Interval  # share of completions with status "correct": pass@1, averaged over the prompts
    reward: float  # mean over the completions
    statuses: dict[str, int]  # number of completions per status


class Evaluations:
    """Samples sets of held-out prompts under one version at a time, while training continues.

    `sets` has the prompts by the set's name. Each prompt gets `evaluate.samples` completions: one is greedy, more are
    sampled at `sampling.temperature`.
    """

    def __init__(self, config: Config, sets: Mapping[str, Sequence[Prompt]], fleet: Fleet, loop: AgentLoop) -> None:
        self.config, self.sets, self.fleet, self.loop = config, sets, fleet, loop
        samples = config.evaluate.samples
        self.sampling = sampling_of(config, samples, 0.0 if samples == 1 else None)
        self.version: int | None = None  # the version under evaluation
        self._flights: dict[str, list[Flight]] = {}

    def start(self, adapter: Adapter, background: bool = True) -> None:
        """Submit all prompts for sampling under `adapter`, without blocking. `result` raises the errors of sampling.

        With `background` the prompts have the lowest priority: an engine starts one only if it has room and no other
        request waits.
        """
        self.version = adapter.number
        self._flights = {
            name: [self.loop.start(prompt, self.sampling, adapter.number, adapter, background) for prompt in prompts]
            for name, prompts in self.sets.items()
        }

    @property
    def is_ready(self) -> bool:
        """Whether `result` would not block."""
        return all(flight.scored.done() for flights in self._flights.values() for flight in flights)

    def result(self) -> "dict[str, Evaluation]":
        """Block until the version of the last `start` is evaluated, and return the evaluation of each set, by name.

        Raises RewardError, which carries the sampled groups, if the reward functions fail, and the errors of sampling.
        """
        flights, self._flights, self.version = self._flights, {}, None
        return {
            name: summarise(scored_groups(self.config, set_flights, self.fleet, self.loop))
            for name, set_flights in flights.items()
        }


def answer(config: Config, prompts: Sequence[Prompt], sampling: Sampling, fleet: Fleet, loop: AgentLoop) -> list[Group]:
    """Sample all prompts under the policy's latest delivered version, and return their scored groups, in order.

    Blocks until all groups are scored. Raises the errors of `scored_groups`.
    """
    return scored_groups(config, [loop.start(prompt, sampling) for prompt in prompts], fleet, loop)


def scored_groups(config: Config, flights: Sequence[Flight], fleet: Fleet, loop: AgentLoop) -> list[Group]:
    """Block until all `flights` are scored, and return their groups, in order.

    Raises RewardError, which carries the sampled groups, if the reward functions fail, and the errors of sampling.
    """
    scored = [flight.scored for flight in flights]
    wait_for(scored, len(scored), math.inf, config.engine.patience, fleet.check)
    try:
        groups = [future.result() for future in scored]
        loop.scoring.check_errors(groups)
    except RewardError as error:
        raise RewardError(str(error), [flight.played for flight in flights if flight.played]) from error
    return groups


def summarise(groups: Sequence[Group]) -> Evaluation:
    """Compute the metrics of all completions. A completion that no reward function scored has reward 0 here."""
    episodes = [episode for group in groups for episode in group.episodes]
    statuses = dict(Counter(episode.status or "skipped" for episode in episodes).most_common())
    reward = fmean(episode.reward or 0.0 for episode in episodes)
    return Evaluation(pass_at(1, groups), reward, statuses)


def pass_at(k: int, groups: Sequence[Group]) -> Interval:
    """Estimate pass@k: the mean over the prompts of the probability that at least one of k completions is correct.

    Uses the unbiased estimator 1 - C(n - c, k) / C(n, k), with c of n >= k samples correct (Chen et al. 2021,
    arXiv:2107.03374, eq. 1). Each group must have at least k episodes. The interval is Wilson's score interval
    over the prompts, as if each had one sample; with more samples per prompt the true interval is narrower.
    """
    estimates = []
    for group in groups:
        n, c = len(group.episodes), sum(episode.status == "correct" for episode in group.episodes)
        estimates.append(1 - math.comb(n - c, k) / math.comb(n, k))
    return wilson(fmean(estimates), len(estimates))


def wilson(share: float, count: int, z: float = 1.96) -> Interval:
    """Compute Wilson's score interval for a `share` of `count` trials (Wilson 1927); `z` = 1.96 gives 95%."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def rows(groups: Sequence[Group]) -> Iterator[dict[str, object]]:
    """Yield a JSON-serialisable row per completion, with the prompt, the completion, its status and its reward."""
    for number, group in enumerate(groups):
        for sample, episode in enumerate(group.episodes):
            yield {
                "prompt": number,
                "sample": sample,
                "text": group.prompt.text,
                "answer": group.prompt.answer,
                "completion": episode.text,
                "messages": list(episode.messages),
                "status": episode.status,
                "reward": episode.reward,
                "parts": dict(episode.parts),
                "finish_reason": episode.finish_reason,
                "tokens": episode.sampled_tokens,
                "version": episode.version.number,
            }
