"""Groups -> packed tensors. Each token stands there once: a prompt however many completions it has, and no pads."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlora.advantage import group_centred
from rlora.attention import Tree
from rlora.records import Episode, Group


@dataclass(frozen=True)
class Microbatch:
    """Prompts and their completions in one row of N tokens; C completion tokens to learn from.

    A completion's last token predicts nothing that is learned from, so it is not in the row.
    """

    input_ids: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64, of each token in its own prompt + completion
    tree: Tree
    predictors: Tensor  # (C,) int64, the place in the row of the token before each completion token
    targets: Tensor  # (C,) int64, the completion tokens
    behaviour_logprobs: Tensor  # (C,) float32
    advantages: Tensor  # (C,) float32, each token has its episode's


@dataclass(frozen=True)
class _Completion:
    episode: Episode
    advantage: float

    @property
    def length(self) -> int:
        return len(self.episode.completion_ids)


_Branch = tuple[tuple[int, ...], list[_Completion]]  # a prompt's tokens and completions


def microbatches(
    groups: Sequence[Group], max_tokens: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Microbatch]:
    """The episodes that carry a gradient, `max_tokens` tokens at a time (one episode at least).

    Groups whose rewards all agree have zero advantages, and the advantage is the only gradient here: they are left
    out. Groups go by the length of their longest completion, for attention pads those of a microbatch to one length.
    `dtype` is that of the policy's activations.
    """
    branches: list[_Branch] = []
    tokens = 0
    for group in sorted(groups, key=lambda group: max(len(episode.completion_ids) for episode in group.episodes)):
        if not group.informative:
            continue
        prompt, opened = group.prompt.token_ids, False
        for episode, advantage in zip(group.episodes, group_centred(torch.tensor(group.rewards)).tolist(), strict=True):
            if not episode.completion_ids:
                continue  # nothing was sampled: there is no token to learn from
            if branches and tokens + len(episode.completion_ids) + (0 if opened else len(prompt)) > max_tokens:
                yield _pack(branches, dtype, device)
                branches, tokens, opened = [], 0, False
            if not opened:
                branches.append((prompt, []))
                tokens, opened = tokens + len(prompt), True
            branches[-1][1].append(_Completion(episode, advantage))
            tokens += len(episode.completion_ids)
    if branches:
        yield _pack(branches, dtype, device)


def _pack(branches: Sequence[_Branch], dtype: torch.dtype, device: torch.device) -> Microbatch:
    """One row: each prompt, followed by its completions."""
    completions = [completion for _, of_prompt in branches for completion in of_prompt]
    P, L = len(branches), max(len(prompt) for prompt, _ in branches)
    G, T = max(len(of_prompt) for _, of_prompt in branches), max(completion.length for completion in completions) - 1
    prompts_PL = torch.zeros(P, L, dtype=torch.int64)
    completions_PGT = torch.zeros(P, G, T, dtype=torch.int64)
    seen_PL = torch.zeros(P, L, dtype=torch.bool)
    ids: list[int] = []
    positions: list[int] = []
    row: list[Tensor] = []
    predictors: list[int] = []
    places = torch.arange(P * (L + G * T))
    place_of_prompt, place_of_completion = places[: P * L].view(P, L), places[P * L :].view(P, G, T)
    for p, (prompt, of_prompt) in enumerate(branches):
        length = len(prompt)
        prompts_PL[p, :length] = torch.arange(len(ids), len(ids) + length)
        seen_PL[p, :length] = True
        row.append(place_of_prompt[p, :length])
        ids += prompt
        positions += range(length)
        last = len(ids) - 1
        for g, completion in enumerate(of_prompt):
            inputs = completion.episode.completion_ids[:-1]
            standing = range(len(ids), len(ids) + len(inputs))
            completions_PGT[p, g, : len(inputs)] = torch.tensor(standing)
            row.append(place_of_completion[p, g, : len(inputs)])
            predictors += [last, *standing]
            ids += inputs
            positions += range(length, length + len(inputs))
    may_look = torch.cat([seen_PL[:, None].expand(P, T, L), torch.ones(T, T).tril().bool().expand(P, T, T)], dim=-1)
    bias = torch.zeros(P, 1, 1, 1, T, L + T, dtype=dtype)
    bias.masked_fill_(~may_look[:, None, None, None], -math.inf)
    lengths = torch.tensor([completion.length for completion in completions])
    advantages = torch.tensor([completion.advantage for completion in completions])
    return Microbatch(
        input_ids=torch.tensor(ids).to(device),
        position_ids=torch.tensor(positions).to(device),
        tree=Tree(prompts_PL.to(device), completions_PGT.to(device), bias.to(device), torch.cat(row).to(device)),
        predictors=torch.tensor(predictors).to(device),
        targets=torch.tensor([t for c in completions for t in c.episode.completion_ids]).to(device),
        behaviour_logprobs=torch.tensor([x for c in completions for x in c.episode.behaviour_logprobs]).to(device),
        advantages=advantages.repeat_interleave(lengths).to(device),
    )
