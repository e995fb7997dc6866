"""Groups -> padded tensors. The completions of a microbatch share one prompt, so the prompt is computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlora.advantage import group_centred
from rlora.records import Group


@dataclass(frozen=True)
class Microbatch:
    """B completions of one prompt, padded on the right to T tokens."""

    prompt_ids: Tensor  # (P,) int64
    completion_ids: Tensor  # (B, T) int64, 0 where padded
    behaviour_logprobs: Tensor  # (B, T) float32
    advantages: Tensor  # (B, T) float32, the episode's advantage at each of its tokens
    mask: Tensor  # (B, T) bool, by position: a pad token inside a completion counts


def microbatches(groups: Sequence[Group], max_tokens: int, device: torch.device) -> Iterator[Microbatch]:
    """The episodes that carry a gradient, at most `max_tokens` padded completion tokens at a time (one row at least).

    Groups whose rewards all agree have zero advantages, and the advantage is the only gradient here: they are left
    out. Completions are sorted by length, so that rows of a microbatch pad little.
    """
    for group in groups:
        if not group.informative:
            continue
        advantages = group_centred(torch.tensor(group.rewards))
        rows = [i for i, episode in enumerate(group.episodes) if episode.completion_ids]
        rows.sort(key=lambda i: len(group.episodes[i].completion_ids), reverse=True)
        while rows:
            widest = len(group.episodes[rows[0]].completion_ids)
            count = max(1, max_tokens // widest)
            yield _pad(group, rows[:count], advantages, device)
            rows = rows[count:]


def _pad(group: Group, rows: list[int], advantages: Tensor, device: torch.device) -> Microbatch:
    episodes = [group.episodes[i] for i in rows]
    shape = len(rows), max(len(episode.completion_ids) for episode in episodes)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    behaviour_logprobs = torch.zeros(shape)
    for row, episode in enumerate(episodes):
        length = len(episode.completion_ids)
        ids[row, :length] = torch.tensor(episode.completion_ids)
        behaviour_logprobs[row, :length] = torch.tensor(episode.behaviour_logprobs)
        mask[row, :length] = True
    return Microbatch(
        prompt_ids=torch.tensor(group.prompt.token_ids).to(device),
        completion_ids=ids.to(device),
        behaviour_logprobs=behaviour_logprobs.to(device),
        advantages=(advantages[rows, None] * mask).to(device),
        mask=mask.to(device),
    )
