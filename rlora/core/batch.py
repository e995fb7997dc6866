"""Groups -> packed tensors. Each token stands there once: a prompt however many completions it has, and no pads."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlora.core.attention import Layout, layout_of
from rlora.core.loss import Tokens
from rlora.machine import send
from rlora.records import Episode


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sequence: a prompt, what follows it, and C targets to be predicted in it.

    A predictor is the place, in prompt + completion, of the last token that is read before its target. Usually that is
    the token before a token that the policy sampled, but targets are free.
    """

    prompt: tuple[int, ...]  # computed once for samples of a group
    completion: tuple[int, ...]
    predictors: tuple[int, ...]  # C
    targets: tuple[int, ...]  # C
    tokens: Tokens  # (C,) each
    episode: Episode | None = None  # that it is made of
    end: Tensor | None = None  # (1,), a critic's value after the last token

    @property
    def length(self) -> int:
        """Tokens after the prompt."""
        return len(self.completion)

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens after the prompt that are read: up to the last predictor."""
        return self.completion[: max(0, max(self.predictors, default=-1) + 1 - len(self.prompt))]

    def with_tokens(self, end: Tensor | None = None, **known: Tensor) -> "Sample":
        """With more that is known of its tokens, and of what comes after."""
        return replace(self, tokens=replace(self.tokens, **known), end=self.end if end is None else end)

    def to_the_end(self) -> "Sample":
        """With one more predictor, its last token, whose target is no token: for values."""
        last = len(self.prompt) + self.length - 1
        return replace(self, predictors=(*self.predictors, last), targets=(*self.targets, 0))


@dataclass(frozen=True)
class Microbatch:
    """Samples in one row of N tokens, with C targets in all. All of them are computed under one adapter.

    Tokens after a sample's last predictor are not in the row: nothing is learned from what they say.
    """

    input_ids: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64, of each token in its own prompt + completion
    layout: Layout
    predictors: Tensor  # (C,) int64, places in the row
    targets: Tensor  # (C,) int64
    lengths: Tensor  # (S,) int64, how many of the C are of each sample
    tokens: Tokens  # (C,) each
    samples: tuple[Sample, ...]  # S


@dataclass(frozen=True)
class _Branch:
    prompt: tuple[int, ...]
    completions: list[Sample]


def microbatches(
    groups: Sequence[Sequence[Sample]], max_tokens: int, dtype: torch.dtype, device: torch.device, whole: bool = False
) -> Iterator[Microbatch]:
    """The samples of each group, which have one prompt, `max_tokens` tokens at a time (one sample at least).

    Groups go by the length of their longest completion, for attention pads those of a microbatch to one length. With
    `whole` no group is split. `dtype` is that of the policy's activations.
    """
    groups = [group for group in groups if group]
    total = sum(_tokens(group) for group in groups)
    share = total / max(1, math.ceil(total / max_tokens))  # alike in size: a small rest would compute slowly
    branches: list[_Branch] = []
    tokens = 0
    for group in sorted(groups, key=lambda group: max(sample.length for sample in group)):
        prompt, opened = group[0].prompt, False
        for number, sample in enumerate(group):
            together = group if whole else [sample]
            wanted = sum(each.length for each in together) + (0 if opened else len(prompt))
            full = tokens >= share or tokens + wanted > max_tokens
            if branches and full and not (whole and number):
                yield _pack(branches, dtype, device)
                branches, tokens, opened = [], 0, False
            if not opened:
                branches.append(_Branch(prompt, []))
                tokens, opened = tokens + len(prompt), True
            branches[-1].completions.append(sample)
            tokens += sample.length
    if branches:
        yield _pack(branches, dtype, device)


def sample_of(prompt: Sequence[int], episode: Episode, advantage: float = 0.0, weight: float = 1.0) -> Sample:
    """An episode's tokens that the policy sampled as targets, with the same advantage and weight for each."""
    own = episode.sampled_mask or (True,) * len(episode.completion_ids)
    behaviour = torch.tensor([x for x, sampled in zip(episode.behaviour_logprobs, own, strict=True) if sampled])
    tokens = Tokens(behaviour, torch.full_like(behaviour, advantage), torch.full_like(behaviour, weight))
    places = [place for place, sampled in enumerate(own) if sampled]
    return Sample(
        tuple(prompt), episode.completion_ids, tuple(len(prompt) - 1 + place for place in places),
        tuple(episode.completion_ids[place] for place in places), tokens, episode,
    )  # fmt: skip


def single_text(token_ids: Sequence[int], dtype: torch.dtype, device: torch.device) -> Microbatch:
    """A row of one text, whose targets are its tokens but the first: C is one less than their number."""
    none = torch.zeros(len(token_ids) - 1)
    completion, places = tuple(token_ids[1:]), tuple(range(len(token_ids) - 1))
    sample = Sample(tuple(token_ids[:1]), completion, places, completion, Tokens(none, none, none))
    return _pack([_Branch(sample.prompt, [sample])], dtype, device)


def empty_batch(dtype: torch.dtype, device: torch.device, known: Iterable[str] = ()) -> Microbatch:
    """A row of one token that nothing is learned from: C = 0, so its loss has no terms and its gradients are 0. `known`
    are fields of `Tokens` that other rows have."""
    row, none, empty = single_text((0, 0), dtype, device), slice(0), torch.zeros(0, device=device)
    return replace(
        row,
        predictors=row.predictors[none],
        targets=row.targets[none],
        lengths=row.lengths[none],
        tokens=Tokens(empty, empty, empty, **dict.fromkeys(known, empty)),
        samples=(),
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


def _tokens(group: Sequence[Sample]) -> int:
    """Those of the prompt, once, and of its completions."""
    return len(group[0].prompt) + sum(sample.length for sample in group)


def _joined(samples: Sequence[Sample], device: torch.device) -> Tokens:
    """What is known of all their tokens; None where it is not known of each."""
    columns = {field.name: [getattr(sample.tokens, field.name) for sample in samples] for field in fields(Tokens)}
    joined: dict[str, Any] = {
        name: None if any(of is None for of in column) else send(torch.cat(column), device)
        for name, column in columns.items()
    }
    return Tokens(**joined)


def _pack(branches: Sequence[_Branch], dtype: torch.dtype, device: torch.device) -> Microbatch:
    """One row: each prompt, followed by its completions."""
    completions = [completion for branch in branches for completion in branch.completions]
    lengths = [(len(branch.prompt), [len(each.inputs) for each in branch.completions]) for branch in branches]
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    for branch in branches:
        start, length = len(ids), len(branch.prompt)
        ids += branch.prompt
        positions += range(length)
        for completion in branch.completions:
            inputs, after = completion.inputs, len(ids) - length  # what a place after the prompt is moved by
            predictors += [place + (start if place < length else after) for place in completion.predictors]
            targets += completion.targets
            ids += inputs
            positions += range(length, length + len(inputs))
    return Microbatch(
        input_ids=send(torch.tensor(ids), device),
        position_ids=send(torch.tensor(positions), device),
        layout=layout_of(lengths, dtype, device),
        predictors=send(torch.tensor(predictors, dtype=torch.int64), device),
        targets=send(torch.tensor(targets, dtype=torch.int64), device),
        lengths=send(torch.tensor([len(each.targets) for each in completions]), device),
        tokens=_joined(completions, device),
        samples=tuple(completions),
    )
