"""Groups -> packed tensors. Each token stands there once: a prompt however many completions it has, and no pads."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlora.core.attention import Tree
from rlora.core.loss import Tokens
from rlora.records import Episode


@dataclass(frozen=True, eq=False)
class Lesson:
    """An episode of a prompt, and what is known of its own tokens: those that the policy sampled."""

    prompt: tuple[int, ...]
    episode: Episode
    tokens: Tokens  # (own tokens,) each
    end: Tensor | None = None  # (1,), what the critic says after the last one
    adapter: int = 0  # of the bank, by which it is learned
    ends: bool = False  # its last token is in the row too, for what is said of the text as a whole

    @property
    def length(self) -> int:
        """Its tokens in a row, those of tools included."""
        return len(self.episode.completion_ids)

    def knowing(self, end: Tensor | None = None, **known: Tensor) -> "Lesson":
        """With more that is known of its tokens, and of what comes after."""
        return replace(self, tokens=replace(self.tokens, **known), end=self.end if end is None else end)


@dataclass(frozen=True)
class Microbatch:
    """Prompts and their completions in one row of N tokens; C of them, the policy's own, to learn from.

    A completion's last token predicts nothing that is learned from, so it is not in the row, unless its lesson `ends`:
    then its place is the last of the lesson's `predictors`, whose target is no token.
    """

    input_ids: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64, of each token in its own prompt + completion
    tree: Tree
    adapters: int | Tensor  # of all tokens, or of each: (N,) int64
    predictors: Tensor  # (C,) int64, the place in the row of the token before each own token
    targets: Tensor  # (C,) int64, the own tokens
    lengths: Tensor  # (E,) int64, how many of the C are of each episode
    tokens: Tokens  # (C,) each
    lessons: tuple[Lesson, ...]  # E

    def parts(self) -> "list[Microbatch]":
        """The same row for each adapter of its lessons, with those lessons alone."""
        if not isinstance(self.adapters, Tensor):
            return [self]
        adapters = [each.adapter for each in self.lessons]
        found = []
        for adapter in sorted(set(adapters)):
            chosen = torch.tensor([each == adapter for each in adapters], device=self.lengths.device)
            its = chosen.repeat_interleave(self.lengths)
            lessons = tuple(each for each in self.lessons if each.adapter == adapter)
            part = replace(
                self, adapters=adapter, predictors=self.predictors[its], targets=self.targets[its],
                lengths=self.lengths[chosen], tokens=_joined(lessons, its.device), lessons=lessons,
            )  # fmt: skip
            found.append(part)
        return found


@dataclass(frozen=True)
class _Branch:
    prompt: tuple[int, ...]
    adapter: int
    completions: list[Lesson]


def microbatches(
    groups: Sequence[Sequence[Lesson]], max_tokens: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Microbatch]:
    """The lessons of each group, which have one prompt and one adapter, `max_tokens` tokens at a time (one at least).

    Groups go by the length of their longest completion, for attention pads those of a microbatch to one length.
    `dtype` is that of the policy's activations.
    """
    groups = [group for group in groups if group]
    total = sum(_tokens(group) for group in groups)
    share = total / max(1, math.ceil(total / max_tokens))  # alike in size: a small rest would compute slowly
    branches: list[_Branch] = []
    tokens = 0
    for group in sorted(groups, key=lambda group: max(lesson.length for lesson in group)):
        prompt, opened = group[0].prompt, False
        for lesson in group:
            wanted = lesson.length + (0 if opened else len(prompt))
            if branches and (tokens >= share or tokens + wanted > max_tokens):
                yield _pack(branches, dtype, device)
                branches, tokens, opened = [], 0, False
            if not opened:
                branches.append(_Branch(prompt, lesson.adapter, []))
                tokens, opened = tokens + len(prompt), True
            branches[-1].completions.append(lesson)
            tokens += lesson.length
    if branches:
        yield _pack(branches, dtype, device)


def lesson(
    prompt: Sequence[int], episode: Episode, advantage: float = 0.0, weight: float = 1.0, adapter: int = 0
) -> Lesson:
    """The same advantage and weight for each token."""
    own = episode.own or (True,) * len(episode.completion_ids)
    behaviour = torch.tensor([x for x, sampled in zip(episode.behaviour_logprobs, own, strict=True) if sampled])
    advantages, weights = torch.full_like(behaviour, advantage), torch.full_like(behaviour, weight)
    return Lesson(tuple(prompt), episode, Tokens(behaviour, advantages, weights), adapter=adapter)


def alone(token_ids: Sequence[int], dtype: torch.dtype, device: torch.device) -> Microbatch:
    """A row of one text, whose targets are its tokens but the first: C is one less than their number."""
    episode = Episode(tuple(token_ids[1:]), (0.0,) * (len(token_ids) - 1), "stop", version=0)
    return _pack([_Branch(tuple(token_ids[:1]), 0, [lesson(token_ids[:1], episode)])], dtype, device)


def idle(dtype: torch.dtype, device: torch.device) -> Microbatch:
    """A row of one token that nothing is learned from: C = 0, so its loss has no terms and its gradients are 0."""
    row, none = alone((0, 0), dtype, device), slice(0)
    return replace(
        row,
        predictors=row.predictors[none],
        targets=row.targets[none],
        lengths=row.lengths[none],
        tokens=Tokens(*(torch.zeros(0, device=device) for _ in fields(Tokens))),
        lessons=(),
    )


def shares(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """The places of groups of such sizes dealt out to learners so that each has about as much to compute."""
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    given = [0] * ranks
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]) if ranks > 1 else range(len(sizes)):
        rank = given.index(min(given))
        dealt[rank].append(place)
        given[rank] += sizes[place]
    return dealt


def _tokens(group: Sequence[Lesson]) -> int:
    """Those of the prompt, once, and of its completions."""
    return len(group[0].prompt) + sum(lesson.length for lesson in group)


def _joined(lessons: Sequence[Lesson], device: torch.device) -> Tokens:
    """What is known of all their tokens; None where it is not known of each."""
    columns = {field.name: [getattr(lesson.tokens, field.name) for lesson in lessons] for field in fields(Tokens)}
    joined: dict[str, Any] = {
        name: None if any(of is None for of in column) else torch.cat(column).to(device)
        for name, column in columns.items()
    }
    return Tokens(**joined)


def _pack(branches: Sequence[_Branch], dtype: torch.dtype, device: torch.device) -> Microbatch:
    """One row: each prompt, followed by its completions."""
    completions = [completion for branch in branches for completion in branch.completions]
    P, L = len(branches), max(len(branch.prompt) for branch in branches)
    G, T = (
        max(len(branch.completions) for branch in branches),
        max(each.length - (not each.ends) for each in completions),
    )
    places = torch.arange(P * (L + G * T))
    place_of_prompt, place_of_completion = places[: P * L].view(P, L), places[P * L :].view(P, G, T)
    seen_PL = torch.zeros(P, L, dtype=torch.bool)
    ids: list[int] = []
    positions: list[int] = []
    adapters: list[int] = []
    place_of_token: list[Tensor] = []
    predictors: list[int] = []
    targets: list[int] = []
    for p, branch in enumerate(branches):
        start, length = len(ids), len(branch.prompt)
        seen_PL[p, :length] = True
        place_of_token.append(place_of_prompt[p, :length])
        ids += branch.prompt
        positions += range(length)
        last = len(ids) - 1
        for g, completion in enumerate(branch.completions):
            completion_ids = completion.episode.completion_ids
            inputs = completion_ids if completion.ends else completion_ids[:-1]
            own = completion.episode.own or (True,) * len(completion_ids)
            of_all = list(
                zip(
                    (last, *range(len(ids), len(ids) + len(inputs))), (*completion_ids, 0), (*own, completion.ends),
                    strict=False,
                )
            )  # fmt: skip
            predictors += [place for place, _, learned in of_all if learned]
            targets += [token for _, token, learned in of_all if learned]
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
    return Microbatch(
        input_ids=torch.tensor(ids).to(device),
        position_ids=torch.tensor(positions).to(device),
        tree=tree,
        adapters=torch.tensor(adapters).to(device) if len(set(adapters)) > 1 else adapters[0],
        predictors=torch.tensor(predictors).to(device),
        targets=torch.tensor(targets).to(device),
        lengths=torch.tensor([len(each.tokens.weights) + each.ends for each in completions]).to(device),
        tokens=_joined(completions, device),
        lessons=tuple(completions),
    )
