"""From the config's algorithm to what each token learns: rewards -> returns -> advantages, and a token's loss."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rlora.core.advantage import centred, generalised, leave_one_out, standardised, whitened
from rlora.core.batch import Lesson, Microbatch
from rlora.core.loss import clipped, clipped_weight, importance, kl, ratio_of, reinforce, sequence_log_ratio
from rlora.records import Episode, Group
from rlora.settings import AlgorithmConfig

_SMALL = 16.0  # up to here float32 keeps 1e-6 of a reward, far below the addend of `whitened`
_OF_A_GROUP = {"centred": centred, "standardised": standardised, "leave-one-out": leave_one_out}


def episode_return(episode: Episode, algorithm: AlgorithmConfig, max_tokens: int) -> float:
    """Its reward, less what it is too long by: DAPO's soft punishment (arXiv:2503.14476, eq. 13)."""
    assert episode.reward is not None
    over = len(episode.completion_ids) - (max_tokens - algorithm.overlong_tokens)
    return episode.reward - algorithm.overlong_penalty * min(1.0, max(0, over) / max(1, algorithm.overlong_tokens))


def credit(group: Group, lessons: Sequence[Lesson], algorithm: AlgorithmConfig, max_tokens: int) -> list[Lesson]:
    """The group's lessons with their advantages, and returns where there is a critic; not whitened yet, and until then
    in float64 where they come of large rewards.

    `lessons` are those of its episodes that are learned from; the returns of all count for the group's mean.
    """
    kls = [_kl_in_reward(lesson, algorithm) for lesson in lessons]
    returns = {id(episode): episode_return(episode, algorithm, max_tokens) for episode in group.episodes}
    if algorithm.of_group:
        for lesson, of_tokens in zip(lessons, kls, strict=True):
            returns[id(lesson.episode)] -= float(of_tokens.sum())
        dtype = _precision(returns.values())
        of_group = _OF_A_GROUP[algorithm.advantage](torch.tensor(list(returns.values()), dtype=dtype)).tolist()
        of_episode = dict(zip(returns, of_group, strict=True))
        return [
            lesson.knowing(advantages=torch.full_like(lesson.tokens.weights, of_episode[id(lesson.episode)]))
            for lesson in lessons
        ]
    credited = []
    for lesson, of_tokens in zip(lessons, kls, strict=True):
        reward = returns[id(lesson.episode)]
        rewards = -of_tokens.to(torch.float32 if abs(reward) <= _SMALL else torch.float64)
        rewards[-1] += reward
        values = lesson.tokens.values
        if values is None:  # REINFORCE++: no critic, so what follows is all there is (arXiv:2501.03262)
            advantages = generalised(rewards, torch.zeros_like(rewards), 0.0, algorithm.gamma, 1.0)
            credited.append(lesson.knowing(advantages=advantages))
        else:
            cut_off = algorithm.bootstrap_truncated and lesson.episode.finish_reason != "stop"
            end = float(lesson.end) if cut_off and lesson.end is not None else 0.0
            advantages = generalised(rewards, values, end, algorithm.gamma, algorithm.lam)
            credited.append(lesson.knowing(advantages=advantages, returns=(advantages + values).float()))
    return credited


def _precision(returns: Iterable[float]) -> torch.dtype:
    """The dtype in which a group's returns are compared: float32 where it keeps each difference to 1%, else float64.

    A mean rounds differently in the two. Earlier versions had float32 only, and their runs replay bit for bit.
    """
    distinct = sorted(set(returns))
    smallest = min((high - low for low, high in pairwise(distinct)), default=math.inf)
    largest = max(map(abs, distinct), default=0.0)
    return torch.float32 if smallest > 1e-5 * largest else torch.float64


def whiten(
    lessons: Sequence[Sequence[Lesson]], over_ranks: Callable[[Tensor], Tensor]
) -> tuple[list[list[Lesson]], float | None]:
    """With advantages of mean 0 and variance 1 over the tokens of all learners; and the explained variance.

    That is the share of the returns' variance that the critic knew: 1 - Var(R - V) / Var(R), where R - V is the
    advantage. None where all returns are the same. `over_ranks` adds a tensor up over the learners.
    """
    mean, variance = _moments(lessons, torch.zeros(2, dtype=torch.float64), over_ranks)
    far = (mean.abs() > _SMALL) & (variance <= (1e-5 * mean).square())  # a difference of two large numbers
    if far.any():
        off, closer = _moments(lessons, mean, over_ranks)
        mean, variance = torch.where(far, mean + off, mean), torch.where(far, closer, variance)
    dtype = torch.float64 if far[0] else torch.float32

    def normal(each: Lesson) -> Lesson:
        advantages = whitened(each.tokens.advantages.to(dtype), mean[0].to(dtype), variance[0].to(dtype))
        return each.knowing(advantages=advantages.float())

    whitened_lessons = [[normal(each) for each in of] for of in lessons]
    return whitened_lessons, float(1 - variance[0] / variance[1]) if variance[1] else None


def _moments(
    lessons: Sequence[Sequence[Lesson]], about: Tensor, over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The means of advantages and of returns over all tokens, less `about`, and their variances: (2,) float64 each.

    Without a critic returns are taken for advantages.
    """
    tokens = [each.tokens for of in lessons for each in of]
    none = torch.zeros(0)
    advantages = torch.cat([none, *(each.advantages for each in tokens)])
    returns = torch.cat([none, *(each.advantages if each.returns is None else each.returns for each in tokens)])
    x = torch.stack([advantages, returns]).double() - about[:, None]
    sums = over_ranks(torch.cat([torch.tensor([x.shape[1]]), x.sum(1), x.square().sum(1)]))
    mean, square = sums[1:].view(2, 2) / sums[0].clamp(min=1)
    return mean, (square - mean.square()).clamp(min=0)


def weigher(groups: Sequence[Group], algorithm: AlgorithmConfig, max_tokens: int) -> Callable[[Episode], float]:
    """The weight of each token of an episode that is learned from, so that the minibatch's loss is their plain sum.

    By tokens (DAPO, arXiv:2503.14476, eq. 8): 1 over all that are learned from. By episodes (GRPO, arXiv:2402.03300,
    eq. 3): 1 over the episode's, then over the episodes. By a constant (Dr.GRPO, arXiv:2503.20783): 1 over episodes x
    `max_tokens`. Episodes without signal count.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    total = sum(episode.own_tokens for episode in episodes if learned_from(episode, algorithm))

    def weight(episode: Episode) -> float:
        if algorithm.average == "tokens":
            return 1 / total
        return 1 / (len(episodes) * (episode.own_tokens if algorithm.average == "episodes" else max_tokens))

    return weight


def token_losses(
    batch: Microbatch, logprobs: Tensor, entropies: Tensor | None, algorithm: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each of C tokens, whose sum with `batch.tokens.weights` is the minibatch's, and figures a token."""
    tokens, lengths = batch.tokens, batch.lengths
    now = logprobs.detach()
    start = now if tokens.start_logprobs is None else tokens.start_logprobs
    log_ratio = logprobs - start
    if algorithm.loss == "gspo":
        log_ratio = sequence_log_ratio(log_ratio, lengths)
    ratio, low, high = ratio_of(log_ratio), algorithm.clip_low, algorithm.clip_high
    if algorithm.loss == "reinforce":
        losses = reinforce(ratio, tokens.advantages)
    elif algorithm.loss == "cispo":
        losses = clipped_weight(ratio, logprobs, tokens.advantages, low, high)
    else:
        losses = clipped(ratio, tokens.advantages, low, high, algorithm.dual_clip)
    behaviour = tokens.behaviour_logprobs
    level, _, beyond = algorithm.correction.partition("-")
    sampled = importance(start, behaviour, lengths, of_episode=level == "episode")
    over = sampled > algorithm.importance_cap
    if beyond:
        losses = losses * sampled.masked_fill(over, algorithm.importance_cap if beyond == "truncate" else 0.0)
    figures = {
        "kl_behaviour": kl(behaviour, start, "k3"),  # of the policy that sampled, on its own tokens
        "ratio_truncated": over,
        "kl_update": kl(start, now, "k3"),
        "entropy": -now if entropies is None else entropies,  # its mean, for tokens that the policy has sampled itself
    }
    if algorithm.loss != "reinforce":
        figures["clipped"] = (ratio < 1 - low) | (ratio > 1 + high)
    if tokens.reference_logprobs is not None:
        figures["kl_reference"] = kl(now, tokens.reference_logprobs, "k3")
        if algorithm.kl_of("loss"):
            losses = losses + algorithm.kl * kl(logprobs, tokens.reference_logprobs, algorithm.kl_estimator)
    if entropies is not None:
        losses = losses - algorithm.entropy * entropies
    return losses, figures


def learned_from(episode: Episode, algorithm: AlgorithmConfig) -> bool:
    """Not if it is empty, or was cut off and those are dropped; its return counts for its group's mean all the same."""
    return episode.own_tokens > 0 and not (algorithm.drop_truncated and episode.finish_reason != "stop")


def _kl_in_reward(lesson: Lesson, algorithm: AlgorithmConfig) -> Tensor:
    """What each token pays for its distance from the reference policy."""
    tokens = lesson.tokens
    if not algorithm.kl_of("reward"):
        return torch.zeros_like(tokens.weights)
    assert tokens.start_logprobs is not None
    assert tokens.reference_logprobs is not None
    return algorithm.kl * kl(tokens.start_logprobs, tokens.reference_logprobs, algorithm.kl_estimator)
