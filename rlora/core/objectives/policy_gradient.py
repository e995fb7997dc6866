"""What the ready policy gradients have in common: from rewards to advantages, weights, and the terms of the loss."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlora.core.advantage import SMALL, centred, generalised, leave_one_out, standardised
from rlora.core.batch import Microbatch, Sample
from rlora.core.loss import importance, kl
from rlora.core.objectives.objective import Figures, Need
from rlora.core.policy import Outputs
from rlora.records import Episode, Group
from rlora.settings import AlgorithmConfig

_OF_A_GROUP = {"centred": centred, "standardised": standardised, "leave-one-out": leave_one_out}


class PolicyGradient:
    """sum of weight x (correction x surrogate + kl coefficient x KL - entropy coefficient x entropy) over all tokens.

    The surrogate is a subclass's; everything else is chosen by the fields of `[algorithm]`.
    """

    whole_groups = False

    def __init__(self, algorithm: AlgorithmConfig, max_tokens: int) -> None:
        self.algorithm, self.max_tokens = algorithm, max_tokens
        in_reward, critic = algorithm.kl_of("reward"), algorithm.advantage == "gae"
        of_start = algorithm.epochs * algorithm.minibatches > 1 or in_reward
        wanted = {Need.START: of_start, Need.REFERENCE: algorithm.kl > 0, Need.VALUES: critic}
        self.needs = frozenset(need for need, is_so in wanted.items() if is_so)
        first = {Need.START: in_reward, Need.REFERENCE: in_reward, Need.VALUES: critic}
        self.needs_first = frozenset(need for need, is_so in first.items() if is_so)
        self.entropies = algorithm.entropy > 0
        self.whitens = not algorithm.of_group
        self.skips_zeros = algorithm.of_group and not algorithm.kl_of("loss") and not algorithm.entropy

    def surrogate(self, log_ratio: Tensor, logprobs: Tensor, batch: Microbatch) -> tuple[Tensor, Figures]:
        """The loss of each token, and figures: log_ratio (C,) is that of now and start, whose value is 0 until the
        second minibatch, logprobs (C,) are those of now."""
        raise NotImplementedError

    def learns_from(self, episode: Episode) -> bool:
        """Not if it is empty, or was cut off and those are dropped."""
        return episode.sampled_tokens > 0 and not (self.algorithm.drop_truncated and episode.finish_reason != "stop")

    def advantages(self, group: Group, samples: Sequence[Sample]) -> list[Tensor]:
        """Of a group: relative to the returns of all its episodes. Else a sum over what follows each token, in float64
        where rewards are large."""
        returns = {id(episode): self.return_of(episode) for episode in group.episodes}
        if self.algorithm.of_group:
            return self._of_group(returns, samples)
        return [self._of_tokens(returns[id(sample.episode)], sample) for sample in samples]

    def return_of(self, episode: Episode) -> float:
        """Its reward, less what it is too long by: DAPO's soft punishment (arXiv:2503.14476, eq. 13)."""
        assert episode.reward is not None
        tokens, penalty = self.algorithm.overlong_tokens, self.algorithm.overlong_penalty
        over = len(episode.completion_ids) - (self.max_tokens - tokens)
        return episode.reward - penalty * min(1.0, max(0, over) / max(1, tokens))

    def weights(self, groups: Sequence[Group]) -> Callable[[Episode], float]:
        """By tokens (DAPO, arXiv:2503.14476, eq. 8): 1 over all that are learned from. By episodes (GRPO,
        arXiv:2402.03300, eq. 3): 1 over the episode's, then over the episodes. By a constant (Dr.GRPO,
        arXiv:2503.20783): 1 over episodes x `max_tokens`. Episodes without signal count."""
        episodes = [episode for group in groups for episode in group.episodes]
        total = sum(episode.sampled_tokens for episode in episodes if self.learns_from(episode))

        def weight(episode: Episode) -> float:
            if self.algorithm.average == "tokens":
                return 1 / total
            tokens = episode.sampled_tokens if self.algorithm.average == "episodes" else self.max_tokens
            return 1 / (len(episodes) * tokens)

        return weight

    def loss(self, now: Outputs, batch: Microbatch) -> tuple[Tensor, Figures]:
        algorithm, tokens, logprobs = self.algorithm, batch.tokens, now.logprobs
        detached = logprobs.detach()
        start = detached if tokens.start_logprobs is None else tokens.start_logprobs
        losses, figures = self.surrogate(logprobs - start, logprobs, batch)
        level, _, beyond = algorithm.correction.partition("-")
        behaviour = tokens.behaviour_logprobs
        sampled = importance(start, behaviour, batch.lengths, of_episode=level == "episode")
        over = sampled > algorithm.importance_cap
        if beyond:
            losses = losses * sampled.masked_fill(over, algorithm.importance_cap if beyond == "truncate" else 0.0)
        figures = dict(figures) | {
            "kl_behaviour": kl(behaviour, start, "k3"),  # of the policy that sampled, on its own tokens
            "ratio_truncated": over,
            "kl_update": kl(start, detached, "k3"),
            "entropy": -detached if now.entropies is None else now.entropies,  # its mean, for tokens that the policy
        }  # has sampled itself
        if tokens.reference_logprobs is not None:
            figures["kl_reference"] = kl(detached, tokens.reference_logprobs, "k3")
            if algorithm.kl_of("loss"):
                losses = losses + algorithm.kl * kl(logprobs, tokens.reference_logprobs, algorithm.kl_estimator)
        if now.entropies is not None:
            losses = losses - algorithm.entropy * now.entropies
        return (losses * tokens.weights).sum(), figures

    def _of_group(self, returns: dict[int, float], samples: Sequence[Sample]) -> list[Tensor]:
        for sample in samples:
            returns[id(sample.episode)] -= float(self._kl_in_reward(sample).sum())
        compared = torch.tensor(list(returns.values()), dtype=_precision(returns.values()))
        of_episode = dict(zip(returns, _OF_A_GROUP[self.algorithm.advantage](compared).tolist(), strict=True))
        return [torch.full_like(sample.tokens.weights, of_episode[id(sample.episode)]) for sample in samples]

    def _of_tokens(self, reward: float, sample: Sample) -> Tensor:
        algorithm, values, episode = self.algorithm, sample.tokens.values, sample.episode
        rewards = -self._kl_in_reward(sample).to(torch.float32 if abs(reward) <= SMALL else torch.float64)
        rewards[-1] += reward
        if values is None:  # REINFORCE++: no critic, so what follows is all there is (arXiv:2501.03262)
            return generalised(rewards, torch.zeros_like(rewards), 0.0, algorithm.gamma, 1.0)
        cut_off = algorithm.bootstrap_truncated and episode is not None and episode.finish_reason != "stop"
        end = float(sample.end) if cut_off and sample.end is not None else 0.0
        return generalised(rewards, values, end, algorithm.gamma, algorithm.lam)

    def _kl_in_reward(self, sample: Sample) -> Tensor:
        """What each token pays for its distance from the reference policy."""
        tokens = sample.tokens
        if not self.algorithm.kl_of("reward"):
            return torch.zeros_like(tokens.weights)
        assert tokens.start_logprobs is not None
        assert tokens.reference_logprobs is not None
        return self.algorithm.kl * kl(tokens.start_logprobs, tokens.reference_logprobs, self.algorithm.kl_estimator)


def _precision(returns: Iterable[float]) -> torch.dtype:
    """The dtype in which a group's returns are compared: float32 where it keeps each difference to 1%, else float64.

    A mean rounds differently in the two. Earlier versions had float32 only, and their runs replay bit for bit.
    """
    distinct = sorted(set(returns))
    smallest = min((high - low for low, high in pairwise(distinct)), default=math.inf)
    largest = max(map(abs, distinct), default=0.0)
    return torch.float32 if smallest > 1e-5 * largest else torch.float64
