"""Building blocks of losses: probability ratios and estimators of the KL divergence. Pure torch.

Three policies meet here. The *behaviour* policy sampled (the engine's logprobs, of some version). The *start* policy is
the learner's own before the update's first minibatch. The *current* policy is being trained. There are two ratios:
`importance` is start / behaviour, which corrects for staleness and for the difference between engine and learner, and
is never differentiated; the surrogates use current / start, whose value is 1 until the update's second minibatch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # a ratio no longer grows above exp(20) = 5e8; float32 overflows at exp(88)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Inputs of the loss for C tokens, (C,) float32 each, known before the forward pass.

    A field that the algorithm does not use is None.
    """

    behaviour_logprobs: Tensor
    advantages: Tensor
    weights: Tensor  # of each token's loss in the minibatch's loss
    start_logprobs: Tensor | None = None  # None: the first minibatch is the only one
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None  # the critic's, before the update
    returns: Tensor | None = None  # the critic's targets


# --- the ratio current / start; `objectives/` builds the surrogates from it ---


def ratio_of(log_ratio: Tensor) -> Tensor:
    """Return exp(log_ratio), capped at exp(MAX_LOG_RATIO), so that value and gradient are finite. (C,) -> (C,)"""
    return _bounded(log_ratio).exp()


def is_outside(ratio: Tensor, low: float, high: float) -> Tensor:
    """Return whether each ratio is outside of [1 - low, 1 + high]. (C,) -> (C,) bool"""
    return (ratio < 1 - low) | (ratio > 1 + high)


def sequence_log_ratio(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """Return each episode's mean for its tokens: log s_i of GSPO (arXiv:2507.18071, eq. 7). (C,), (E,) int64 -> (C,)"""
    return _to_tokens(episode_sums(log_ratio, lengths) / lengths.clamp(min=1), lengths, len(log_ratio))


# --- correction for the policy that sampled ---


def importance(start: Tensor, behaviour: Tensor, lengths: Tensor, per_episode: bool) -> Tensor:
    """Return p_start / p_behaviour, detached: per token, or the product over each episode. (C,), (C,), (E,) -> (C,)

    A loss weighted by the capped ratio is truncated importance sampling (TIS, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training", Yao et al. 2025). With a ratio of 0 above the cap it is masked (MIS).
    """
    log_ratio = (start - behaviour).detach()
    if per_episode:
        log_ratio = _to_tokens(episode_sums(log_ratio, lengths), lengths, len(log_ratio))
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


# --- KL ---


def kl(log_p: Tensor, log_q: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate KL(p || q) in nats per token, for tokens sampled from p; d = log p - log q (Schulman 2020,
    "Approximating KL divergence"). (C,), (C,) -> (C,)

    k1 = d: unbiased, of either sign. k2 = d^2 / 2: biased, but its gradient is that of the KL. k3 = exp(-d) - 1 + d:
    unbiased, never negative (GRPO, arXiv:2402.03300, eq. 4); its exponential is capped at exp(MAX_LOG_RATIO).
    """
    d = log_p - log_q
    if estimator == "k1":
        return d
    return d.square() / 2 if estimator == "k2" else _bounded(-d).expm1() + d


def _bounded(x: Tensor) -> Tensor:
    """Return min(x, MAX_LOG_RATIO) with gradient 1 everywhere, so that the loss still lowers a ratio above the cap.
    Values up to the cap keep every bit."""
    return x.detach().clamp(max=MAX_LOG_RATIO) + (x - x.detach())


def episode_sums(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the sum over each episode's tokens. (C,), (E,) int64 -> (E,)"""
    episodes = _to_tokens(torch.arange(len(lengths), device=x.device), lengths, len(x))
    return x.new_zeros(len(lengths)).index_add(0, episodes, x)


def _to_tokens(x: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """Repeat each episode's value once per token of the episode: x (E,), lengths (E,) int64 -> (tokens,). `tokens` is
    the sum of `lengths`; the caller passes it, so that the host does not wait for a GPU."""
    return x.repeat_interleave(lengths, output_size=tokens)
