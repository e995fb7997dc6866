"""What losses are made of: ratios, and estimators of the KL. Pure torch.

Three policies meet here. The *behaviour* policy sampled (the engine's logprobs, of some version); the *start* is the
learner's own before the update's first minibatch; *now* is the one that is being trained. Two ratios: `importance` is
start over behaviour, which undoes the difference of engine and learner and staleness, and is never differentiated;
the surrogates have now over start, which is 1 in value until the update's second minibatch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FAR = 20.0  # log ratio above which a ratio no longer grows: exp(20) is 5e8, and 32 bits end at exp(88)


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is known of C tokens before an update: (C,) float32 each, None where the algorithm does without."""

    behaviour_logprobs: Tensor
    advantages: Tensor
    weights: Tensor  # of each token's loss in that of the minibatch
    start_logprobs: Tensor | None = None  # None: the first minibatch is the only one
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None  # the critic's, before the update
    returns: Tensor | None = None  # that it should have said


# --- the ratio of now and start; the surrogates that are made of it are in `objectives/` ---


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), which stays at exp(FAR) above FAR: the value and the gradient are finite. (C,) -> (C,)"""
    return _bounded(log_ratio).exp()


def beyond(ratio: Tensor, low: float, high: float) -> Tensor:
    """Whether a ratio is outside of [1 - low, 1 + high]. (C,) -> (C,) bool"""
    return (ratio < 1 - low) | (ratio > 1 + high)


def sequence_log_ratio(log_ratio: Tensor, lengths: Tensor) -> Tensor:
    """Each token gets its episode's mean: log s_i of GSPO (arXiv:2507.18071, eq. 7). (C,), (E,) int64 -> (C,)"""
    return _to_tokens(_of_episodes(log_ratio, lengths) / lengths.clamp(min=1), lengths, len(log_ratio))


# --- what corrects for who sampled ---


def importance(start: Tensor, behaviour: Tensor, lengths: Tensor, of_episode: bool) -> Tensor:
    """p_start / p_behaviour, detached: of each token, or the product over its episode. (C,) each, lengths (E,) -> (C,)

    Cut at a cap it is truncated importance sampling (TIS, "Your Efficient RL Framework Secretly Brings You Off-Policy
    RL Training", Yao et al. 2025); 0 beyond it, masked (MIS).
    """
    log_ratio = (start - behaviour).detach()
    if of_episode:
        log_ratio = _to_tokens(_of_episodes(log_ratio, lengths), lengths, len(log_ratio))
    return log_ratio.clamp(max=FAR).exp()


# --- KL ---


def kl(logprobs: Tensor, others: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """KL(p || q) a token, from tokens of p; d = log p - log q (Schulman 2020, "Approximating KL divergence"). (C,)

    k1 = d: unbiased, of either sign. k2 = d^2 / 2: biased, its gradient is that of the KL. k3 = exp(-d) - 1 + d:
    unbiased, never negative (GRPO, arXiv:2402.03300, eq. 4); its exponential stays at exp(FAR) above FAR.
    """
    d = logprobs - others
    if estimator == "k1":
        return d
    return d.square() / 2 if estimator == "k2" else _bounded(-d).expm1() + d


def _bounded(x: Tensor) -> Tensor:
    """`x`, or FAR where it is larger, with the gradient of `x` everywhere: a far token is still pushed back. Up to FAR
    it keeps every bit."""
    return x.detach().clamp(max=FAR) + (x - x.detach())


def _of_episodes(x: Tensor, lengths: Tensor) -> Tensor:
    """The sum over each episode's tokens: (C,), (E,) int64 -> (E,)"""
    episodes = _to_tokens(torch.arange(len(lengths), device=x.device), lengths, len(x))
    return x.new_zeros(len(lengths)).index_add(0, episodes, x)


def _to_tokens(x: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """What each episode has, for each of its tokens: (E,), (E,) int64 -> (tokens,). Their number is given, for a GPU
    would be waited for to tell it."""
    return x.repeat_interleave(lengths, output_size=tokens)
