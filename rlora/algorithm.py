"""From the config's algorithm to what each token learns: rewards -> returns -> advantages, and a token's loss."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlora.advantage import centred, generalised, leave_one_out, standardised
from rlora.batch import Lesson, Microbatch
from rlora.config import AlgorithmConfig
from rlora.loss import clipped, clipped_weight, correct, kl, reinforce, sequence_log_ratio
from rlora.records import Episode, Group

_OF_A_GROUP = {"centred": centred, "standardised": standardised, "leave-one-out": leave_one_out}


def episode_return(episode: Episode, algorithm: AlgorithmConfig, max_tokens: int) -> float:
    """Its reward, less what it is too long by: DAPO's soft punishment (arXiv:2503.14476, eq. 13)."""
    assert episode.reward is not None
    over = len(episode.completion_ids) - (max_tokens - algorithm.overlong_tokens)
    return episode.reward - algorithm.overlong_penalty * min(1.0, max(0, over) / max(1, algorithm.overlong_tokens))


def credit(
    group: Group, lessons: Sequence[Lesson], algorithm: AlgorithmConfig, max_tokens: int, ends: Sequence[float]
) -> list[Lesson]:
    """The group's lessons with their advantages, and returns where there is a critic; not whitened yet.

    `lessons` are those of its episodes that have tokens; `ends` what the critic says after each one's last token.
    """
    kls = [_kl_in_reward(lesson, algorithm) for lesson in lessons]
    returns = {id(episode): episode_return(episode, algorithm, max_tokens) for episode in group.episodes}
    if algorithm.advantage in _OF_A_GROUP:
        for lesson, of_tokens in zip(lessons, kls, strict=True):
            returns[id(lesson.episode)] -= float(of_tokens.sum())
        of_group = _OF_A_GROUP[algorithm.advantage](torch.tensor(list(returns.values()))).tolist()
        of_episode = dict(zip(returns, of_group, strict=True))
        return [
            lesson.knowing(advantages=torch.full_like(lesson.tokens.weights, of_episode[id(lesson.episode)]))
            for lesson in lessons
        ]
    credited = []
    for lesson, of_tokens, end in zip(lessons, kls, ends, strict=True):
        rewards = -of_tokens
        rewards[-1] += returns[id(lesson.episode)]
        values = lesson.tokens.values
        if values is None:  # REINFORCE++: no critic, so what follows is all there is (arXiv:2501.03262, eq. 8)
            advantages = generalised(rewards, torch.zeros_like(rewards), 0.0, algorithm.gamma, 1.0)
            credited.append(lesson.knowing(advantages=advantages))
        else:
            cut_off = algorithm.bootstrap_truncated and lesson.episode.finish_reason == "length"
            advantages = generalised(rewards, values, end if cut_off else 0.0, algorithm.gamma, algorithm.lam)
            credited.append(lesson.knowing(advantages=advantages, returns=advantages + values))
    return credited


def weigher(groups: Sequence[Group], algorithm: AlgorithmConfig, max_tokens: int) -> Callable[[Episode], float]:
    """The weight of the loss of each token of an episode, so that the minibatch's is their plain sum.

    By tokens (DAPO, arXiv:2503.14476, eq. 8): 1 over all that are learned from. By episodes (GRPO, arXiv:2402.03300,
    eq. 3): 1 over the episode's, then over the episodes. By a constant (Dr.GRPO, arXiv:2503.20783): 1 over episodes x
    `max_tokens`. Episodes without signal count.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    total = sum(own_tokens(episode) for episode in episodes if not _dropped(episode, algorithm))

    def weight(episode: Episode) -> float:
        if _dropped(episode, algorithm):
            return 0.0
        if algorithm.average == "tokens":
            return 1 / total
        return 1 / (len(episodes) * (own_tokens(episode) if algorithm.average == "episodes" else max_tokens))

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
    ratio, low, high = log_ratio.exp(), algorithm.clip_low, algorithm.clip_high
    if algorithm.loss == "reinforce":
        losses = reinforce(ratio, tokens.advantages)
    elif algorithm.loss == "cispo":
        losses = clipped_weight(ratio, logprobs, tokens.advantages, low, high)
    else:
        losses = clipped(ratio, tokens.advantages, low, high, algorithm.dual_clip)
    behaviour = tokens.behaviour_logprobs
    if algorithm.correction != "none":
        level = "episode" if algorithm.correction.startswith("episode") else "token"
        beyond = "mask" if algorithm.correction.endswith("mask") else "truncate"
        losses = losses * correct(start, behaviour, lengths, level, beyond, algorithm.importance_cap)  # type: ignore[arg-type]
    figures = {
        "kl_behaviour": kl(behaviour, start, "k3"),  # of the policy that sampled, on its own tokens
        "ratio_truncated": (start - behaviour).exp() > algorithm.importance_cap,
        "kl_start": kl(start, now, "k3"),
        "surprise": -now,  # whose mean is the entropy, for tokens that the policy has sampled itself
    }
    if algorithm.loss != "reinforce":
        figures["clipped"] = (ratio < 1 - low) | (ratio > 1 + high)
    if tokens.reference_logprobs is not None:
        figures["kl_reference"] = kl(now, tokens.reference_logprobs, "k3")
        if algorithm.kl_in == "loss":
            losses = losses + algorithm.kl * kl(logprobs, tokens.reference_logprobs, algorithm.kl_estimator)
    if entropies is not None:
        losses = losses - algorithm.entropy * entropies
    return losses, figures


def own_tokens(episode: Episode) -> int:
    return sum(episode.own) if episode.own else len(episode.completion_ids)


def _dropped(episode: Episode, algorithm: AlgorithmConfig) -> bool:
    """Whether it was cut off and nothing is learned from it; its return still counts for its group's mean."""
    return algorithm.drop_truncated and episode.finish_reason == "length"


def _kl_in_reward(lesson: Lesson, algorithm: AlgorithmConfig) -> Tensor:
    """What each token pays for its distance from the reference policy."""
    tokens = lesson.tokens
    if algorithm.kl_in != "reward" or tokens.reference_logprobs is None or tokens.start_logprobs is None:
        return torch.zeros_like(tokens.weights)
    return algorithm.kl * kl(tokens.start_logprobs, tokens.reference_logprobs, algorithm.kl_estimator)
