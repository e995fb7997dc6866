"""Base class of the built-in policy gradients: advantages from rewards, token weights, and the terms of the loss."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlora.core.advantage import LARGEST_IN_FLOAT32, centred, generalised, leave_one_out, standardised
from rlora.core.batch import Microbatch, Sample
from rlora.core.loss import importance, kl, sequence_log_ratio
from rlora.core.objectives.objective import Figures, Need
from rlora.core.policy import Outputs
from rlora.records import Episode, Group
from rlora.settings import AlgorithmConfig

_GROUP_ADVANTAGES = {"centred": centred, "standardised": standardised, "leave-one-out": leave_one_out}


class PolicyGradient:
    """Policy gradients with the loss
    sum over tokens of weight x (correction x surrogate + kl coefficient x KL - entropy coefficient x entropy).

    Subclasses define the surrogate; the fields of `[algorithm]` set everything else.
    """

    whole_groups = False

    def __init__(self, algorithm: AlgorithmConfig, max_tokens: int) -> None:
        self.algorithm, self.max_tokens = algorithm, max_tokens
        in_reward, critic = algorithm.kl_in_reward, algorithm.advantage == "gae"
        start = algorithm.epochs * algorithm.minibatches > 1 or in_reward
        needs = {Need.START: start, Need.REFERENCE: algorithm.kl > 0, Need.VALUES: critic}
        self.needs = frozenset(need for need, is_needed in needs.items() if is_needed)
        needs_first = {Need.START: in_reward, Need.REFERENCE: in_reward, Need.VALUES: critic}
        self.needs_first = frozenset(need for need, is_needed in needs_first.items() if is_needed)
        self.entropies = algorithm.entropy > 0
        self.whitens = not algorithm.of_group
        self.skips_zeros = algorithm.of_group and not algorithm.kl_in_loss and not algorithm.entropy

    def surrogate(self, log_ratio: Tensor, logprobs: Tensor, batch: Microbatch) -> tuple[Tensor, Figures]:
        """Return the loss of each token, (C,), and figures to log, (C,) each, by name. `logprobs` (C,) are the current
        policy's. `log_ratio` (C,) is current - start: the value is 0 until the second minibatch, but the gradient is
        that of `logprobs`."""
        raise NotImplementedError

    def learns_from(self, episode: Episode) -> bool:
        """Return False for episodes without sampled tokens and, with `algorithm.truncated = "drop"`, for episodes that
        were cut off."""
        return episode.sampled_tokens > 0 and not (
            self.algorithm.truncated == "drop" and episode.finish_reason != "stop"
        )

    def advantages(self, group: Group, samples: Sequence[Sample]) -> list[Tensor]:
        """Return the advantages (C,) of each sample: relative to the returns of the group, or from the rewards that
        follow each token, in float64 if the return of the episode exceeds 16 in size."""
        returns = {id(episode): self.return_of(episode) for episode in group.episodes}
        if self.algorithm.of_group:
            return self._group_advantages(returns, samples)
        return [self._token_advantages(returns[id(sample.episode)], sample) for sample in samples]

    def return_of(self, episode: Episode) -> float:
        """Return the episode's reward minus DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13)."""
        assert episode.reward is not None
        tokens, penalty = self.algorithm.overlong_tokens, self.algorithm.overlong_penalty
        excess = len(episode.completion_ids) - (self.max_tokens - tokens)
        return episode.reward - penalty * min(1.0, max(0, excess) / max(1, tokens))

    def weights(self, groups: Sequence[Group]) -> Callable[[Episode], float]:
        """Return a function from an episode to the weight of each token of the episode, by `algorithm.average`.

        "tokens" (DAPO, arXiv:2503.14476, eq. 8): 1 / the tokens that the minibatch learns from. "episodes" (GRPO,
        arXiv:2402.03300, eq. 3): 1 / (episodes x the episode's tokens). "constant" (Dr.GRPO, arXiv:2503.20783):
        1 / (episodes x `max_tokens`). The number of episodes includes those that the loss does not use.
        """
        episodes = [episode for group in groups for episode in group.episodes]
        total = sum(episode.sampled_tokens for episode in episodes if self.learns_from(episode))

        def weight(episode: Episode) -> float:
            if self.algorithm.average == "tokens":
                return 1 / total
            tokens = episode.sampled_tokens if self.algorithm.average == "episodes" else self.max_tokens
            return 1 / (len(episodes) * tokens)

        return weight

    def loss(self, now: Outputs, batch: Microbatch) -> tuple[Tensor, Figures]:
        """Return a microbatch's part of the loss of this class, and its figures: KLs, ratios and entropy per token."""
        algorithm, tokens, logprobs = self.algorithm, batch.tokens, now.logprobs
        detached = logprobs.detach()
        start = detached if tokens.start_logprobs is None else tokens.start_logprobs
        losses, figures = self.surrogate(logprobs - start, logprobs, batch)
        level, _, method = algorithm.correction.partition("-")
        behaviour = tokens.behaviour_logprobs
        ratio = importance(start, behaviour, batch.lengths, per_episode=level == "episode")
        outside = ~((ratio >= algorithm.importance_floor) & (ratio <= algorithm.importance_cap))  # NaN is outside
        if method == "truncate":
            losses = losses * ratio.clamp(max=algorithm.importance_cap)
        elif method == "mask":
            losses = losses * ratio.masked_fill(outside, 0.0)
        if algorithm.geometric_mask:
            mean_log_ratio = sequence_log_ratio((start - behaviour).detach(), batch.lengths)
            is_masked = ~(mean_log_ratio.abs() <= math.log1p(algorithm.geometric_mask))
            losses, outside = losses.masked_fill(is_masked, 0.0), outside | is_masked
        figures = dict(figures) | {
            "kl_behaviour": kl(behaviour, start, "k3"),
            "ratio_truncated": outside,
            "kl_update": kl(start, detached, "k3"),
            "entropy": -detached if now.entropies is None else now.entropies,  # on policy, its mean is the entropy
        }
        if tokens.reference_logprobs is not None:
            figures["kl_reference"] = kl(detached, tokens.reference_logprobs, "k3")
            if algorithm.kl_in_loss:
                losses = losses + algorithm.kl * kl(logprobs, tokens.reference_logprobs, algorithm.kl_estimator)
        if now.entropies is not None:
            losses = losses - algorithm.entropy * now.entropies
        return (losses * tokens.weights).sum(), figures

    def _group_advantages(self, returns: dict[int, float], samples: Sequence[Sample]) -> list[Tensor]:
        for sample in samples:
            returns[id(sample.episode)] -= float(self._kl_in_reward(sample).sum())
        returns_G = torch.tensor(list(returns.values()), dtype=_precision(returns.values()))
        advantages_G = _GROUP_ADVANTAGES[self.algorithm.advantage](returns_G)
        advantage_of = dict(zip(returns, advantages_G.tolist(), strict=True))
        return [torch.full_like(sample.tokens.weights, advantage_of[id(sample.episode)]) for sample in samples]

    def _token_advantages(self, reward: float, sample: Sample) -> Tensor:
        algorithm, values, episode = self.algorithm, sample.tokens.values, sample.episode
        rewards = -self._kl_in_reward(sample).to(torch.float32 if abs(reward) <= LARGEST_IN_FLOAT32 else torch.float64)
        rewards[-1] += reward
        if values is None:  # REINFORCE++ (arXiv:2501.03262): without a critic, the discounted sum of later rewards
            return generalised(rewards, torch.zeros_like(rewards), 0.0, algorithm.gamma, 1.0)
        cut_off = algorithm.truncated == "bootstrap" and episode is not None and episode.finish_reason != "stop"
        end = float(sample.end) if cut_off and sample.end is not None else 0.0
        return generalised(rewards, values, end, algorithm.gamma, algorithm.lam)

    def _kl_in_reward(self, sample: Sample) -> Tensor:
        """Return each token's penalty for its KL to the reference policy, (C,); 0 unless the KL is in the reward."""
        tokens = sample.tokens
        if not self.algorithm.kl_in_reward:
            return torch.zeros_like(tokens.weights)
        assert tokens.start_logprobs is not None
        assert tokens.reference_logprobs is not None
        return self.algorithm.kl * kl(tokens.start_logprobs, tokens.reference_logprobs, self.algorithm.kl_estimator)


def _precision(returns: Iterable[float]) -> torch.dtype:
    """Return the dtype of a group's returns: float32 if this resolves all differences to 1%, otherwise float64.

    Means round differently in the two dtypes. Runs of releases that used only float32 must replay bit for bit.
    """
    distinct = sorted(set(returns))
    smallest = min((high - low for low, high in pairwise(distinct)), default=math.inf)
    largest = max(map(abs, distinct), default=0.0)
    return torch.float32 if smallest > 1e-5 * largest else torch.float64
