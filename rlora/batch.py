"""Groups -> packed tensors. Each prompt stands there once, however many completions it has."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlora.advantage import group_centred
from rlora.records import Episode, Group


@dataclass(frozen=True)
class Microbatch:
    """B completions of P prompts, padded on the right; N completion tokens in all, in row-major order."""

    prompt_ids: Tensor  # (P, L) int64, 0 where padded
    prompt_lengths: Tensor  # (P,) int64
    prompt_of_row: Tensor  # (B,) int64, the row's index into prompt_ids
    completion_ids: Tensor  # (B, T) int64, 0 where padded
    mask: Tensor  # (B, T) bool, N true; by position: a token that happens to be the pad token counts
    behaviour_logprobs: Tensor  # (N,) float32
    advantages: Tensor  # (N,) float32, each token has its episode's


@dataclass(frozen=True)
class _Row:
    prompt_ids: tuple[int, ...]
    episode: Episode
    advantage: float

    @property
    def length(self) -> int:
        return len(self.episode.completion_ids)


def microbatches(groups: Sequence[Group], max_tokens: int, device: torch.device) -> Iterator[Microbatch]:
    """The episodes that carry a gradient, at most `max_tokens` padded completion tokens at a time (one row at least).

    Groups whose rewards all agree have zero advantages, and the advantage is the only gradient here: they are left
    out. Groups stay together, ordered by their longest completion, so that rows beside each other pad little.
    """
    by_length = sorted(groups, key=lambda group: max(len(episode.completion_ids) for episode in group.episodes))
    rows: list[_Row] = []
    for group in by_length:
        if not group.informative:
            continue
        advantages = group_centred(torch.tensor(group.rewards)).tolist()
        for episode, advantage in zip(group.episodes, advantages, strict=True):
            row = _Row(group.prompt.token_ids, episode, advantage)
            if not row.length:
                continue  # nothing was sampled: there is no token to learn from
            if rows and max(row.length, *(other.length for other in rows)) * (len(rows) + 1) > max_tokens:
                yield _pack(rows, device)
                rows = []
            rows.append(row)
    if rows:
        yield _pack(rows, device)


def _pack(rows: Sequence[_Row], device: torch.device) -> Microbatch:
    prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
    completion_ids, mask = _pad([row.episode.completion_ids for row in rows])
    logprobs = [logprob for row in rows for logprob in row.episode.behaviour_logprobs]
    advantages = [row.advantage for row in rows for _ in range(row.length)]
    return Microbatch(
        prompt_ids=_pad(prompts)[0].to(device),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]).to(device),
        prompt_of_row=torch.tensor([prompts.index(row.prompt_ids) for row in rows]).to(device),
        completion_ids=completion_ids.to(device),
        mask=mask.to(device),
        behaviour_logprobs=torch.tensor(logprobs).to(device),
        advantages=torch.tensor(advantages).to(device),
    )


def _pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Sequences -> ids (B, T) int64 with 0 on the right, mask (B, T) bool."""
    padded = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    mask = torch.zeros(padded.shape, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = True
    return padded, mask
