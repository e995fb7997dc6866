"""Groups -> packed tensors. Each token stands there once: a prompt however many completions it has, and no pads."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
    adapters: int | Tensor  # of all tokens, or of each: (N,) int64
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


@dataclass(frozen=True)
class _Branch:
    prompt: tuple[int, ...]
    adapter: int
    completions: list[_Completion]


def microbatches(
    groups: Sequence[Group], max_tokens: int, dtype: torch.dtype, device: torch.device,
    adapters: Sequence[int] | None = None,
) -> Iterator[Microbatch]:  # fmt: skip
    """The episodes that carry a gradient, `max_tokens` tokens at a time (one episode at least).

    Groups whose rewards all agree have zero advantages, and the advantage is the only gradient here: they are left
    out. Groups go by the length of their longest completion, for attention pads those of a microbatch to one length.
    `dtype` is that of the policy's activations; `adapters` those of the bank that each group is learned by, the first
    where it is not given.
    """
    of_group = zip(groups, adapters or [0] * len(groups), strict=True)
    informative = [(group, adapter) for group, adapter in of_group if group.informative]
    total = sum(_tokens(group) for group, _ in informative)
    share = total / max(1, math.ceil(total / max_tokens))  # alike in size: a small rest would compute slowly
    branches: list[_Branch] = []
    tokens = 0
    for group, adapter in sorted(informative, key=lambda each: _longest(each[0])):
        prompt, opened = group.prompt.token_ids, False
        for episode, advantage in zip(group.episodes, group_centred(torch.tensor(group.rewards)).tolist(), strict=True):
            if not episode.completion_ids:
                continue  # nothing was sampled: there is no token to learn from
            wanted = len(episode.completion_ids) + (0 if opened else len(prompt))
            if branches and (tokens >= share or tokens + wanted > max_tokens):
                yield _pack(branches, dtype, device)
                branches, tokens, opened = [], 0, False
            if not opened:
                branches.append(_Branch(prompt, adapter, []))
                tokens, opened = tokens + len(prompt), True
            branches[-1].completions.append(_Completion(episode, advantage))
            tokens += len(episode.completion_ids)
    if branches:
        yield _pack(branches, dtype, device)


def alone(token_ids: Sequence[int], dtype: torch.dtype, device: torch.device) -> Microbatch:
    """A row of one text, whose targets are its tokens but the first: C is one less than their number."""
    episode = Episode(tuple(token_ids[1:]), (0.0,) * (len(token_ids) - 1), "stop", version=0)
    return _pack([_Branch(tuple(token_ids[:1]), 0, [_Completion(episode, 0.0)])], dtype, device)


def idle(dtype: torch.dtype, device: torch.device) -> Microbatch:
    """A row of one token that nothing is learned from: C = 0, so its loss has no terms and its gradients are 0."""
    row, none = alone((0, 0), dtype, device), slice(0)
    return replace(
        row,
        predictors=row.predictors[none],
        targets=row.targets[none],
        behaviour_logprobs=row.behaviour_logprobs[none],
        advantages=row.advantages[none],
    )


def shares(groups: Sequence[Group], ranks: int) -> list[list[Group]]:
    """The groups dealt out to learners so that each has about as many tokens to compute."""
    dealt: list[list[Group]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for group in sorted(groups, key=_tokens, reverse=True) if ranks > 1 else groups:
        rank = tokens.index(min(tokens))
        dealt[rank].append(group)
        tokens[rank] += _tokens(group) if group.informative else 0
    return dealt


def _longest(group: Group) -> int:
    return max(len(episode.completion_ids) for episode in group.episodes)


def _tokens(group: Group) -> int:
    """Those of the prompt, once, and of its completions."""
    return len(group.prompt.token_ids) + sum(len(episode.completion_ids) for episode in group.episodes)


def _pack(branches: Sequence[_Branch], dtype: torch.dtype, device: torch.device) -> Microbatch:
    """One row: each prompt, followed by its completions."""
    completions = [completion for branch in branches for completion in branch.completions]
    P, L = len(branches), max(len(branch.prompt) for branch in branches)
    G, T = max(len(branch.completions) for branch in branches), max(each.length for each in completions) - 1
    places = torch.arange(P * (L + G * T))
    place_of_prompt, place_of_completion = places[: P * L].view(P, L), places[P * L :].view(P, G, T)
    seen_PL = torch.zeros(P, L, dtype=torch.bool)
    ids: list[int] = []
    positions: list[int] = []
    adapters: list[int] = []
    place_of_token: list[Tensor] = []
    predictors: list[int] = []
    for p, branch in enumerate(branches):
        start, length = len(ids), len(branch.prompt)
        seen_PL[p, :length] = True
        place_of_token.append(place_of_prompt[p, :length])
        ids += branch.prompt
        positions += range(length)
        last = len(ids) - 1
        for g, completion in enumerate(branch.completions):
            inputs = completion.episode.completion_ids[:-1]
            predictors += [last, *range(len(ids), len(ids) + len(inputs))]
            place_of_token.append(place_of_completion[p, g, : len(inputs)])
            ids += inputs
            positions += range(length, length + len(inputs))
        adapters += [branch.adapter] * (len(ids) - start)
    seen_PL = seen_PL[:1] if seen_PL.all() else seen_PL.repeat_interleave(G, 0)
    may_look = torch.cat(
        [seen_PL[:, None].expand(-1, T, L), torch.ones(T, T).tril().bool().expand(len(seen_PL), T, T)], dim=-1
    )
    bias = torch.zeros(may_look.shape, dtype=dtype).masked_fill_(~may_look, -math.inf)[:, None]
    causal = torch.full((1, 1, L, L), -math.inf, dtype=dtype).triu(1)
    place = torch.cat(place_of_token)
    token_of_place = torch.zeros_like(places).index_put_((place,), torch.arange(len(ids)))
    empty = torch.ones_like(places, dtype=torch.bool).index_fill_(0, place, value=False).nonzero()[:, 0]
    tree = Tree((P, L, G, T), *(tensor.to(device) for tensor in (token_of_place, place, empty, causal, bias)))
    lengths = torch.tensor([completion.length for completion in completions])
    advantages = torch.tensor([completion.advantage for completion in completions])
    return Microbatch(
        input_ids=torch.tensor(ids).to(device),
        position_ids=torch.tensor(positions).to(device),
        tree=tree,
        adapters=torch.tensor(adapters).to(device) if len(set(adapters)) > 1 else adapters[0],
        predictors=torch.tensor(predictors).to(device),
        targets=torch.tensor([t for c in completions for t in c.episode.completion_ids]).to(device),
        behaviour_logprobs=torch.tensor([x for c in completions for x in c.episode.behaviour_logprobs]).to(device),
        advantages=advantages.repeat_interleave(lengths).to(device),
    )
