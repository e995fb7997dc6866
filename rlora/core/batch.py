"""Samples -> packed rows. A row holds each prompt once, however many completions it has, and no padding."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlora.core.attention import Layout, layout_of
from rlora.core.logprobs import Support, support_of
from rlora.core.loss import Tokens
from rlora.device import send
from rlora.records import Episode, Kept


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sequence: a prompt, a completion, and C target tokens to predict.

    The predictor of a target is the index, in prompt + completion, of the last token that the policy reads before it
    predicts the target. Usually the target is the token after this index, but any index may predict any token.
    """

    prompt: tuple[int, ...]  # computed once for all samples of a group
    completion: tuple[int, ...]
    predictors: tuple[int, ...]  # C
    targets: tuple[int, ...]  # C
    tokens: Tokens  # (C,) each
    episode: Episode | None = None  # the episode that the sample was made from
    end: Tensor | None = None  # (1,), the critic's value after the last token
    kept: Kept | None = None  # of the C targets, if probabilities are over a part of the vocabulary

    @property
    def length(self) -> int:
        """Number of tokens after the prompt."""
        return len(self.completion)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Tokens after the prompt that the policy reads, which end at the last predictor."""
        return self.completion[: max(0, max(self.predictors, default=-1) + 1 - len(self.prompt))]

    def with_tokens(self, end: Tensor | None = None, **values: Tensor) -> "Sample":
        """Return a copy in which `values` replace fields of `tokens`, and `end`, unless None, replaces `Sample.end`."""
        return replace(self, tokens=replace(self.tokens, **values), end=self.end if end is None else end)

    def to_the_end(self) -> "Sample":
        """Return a copy with the last token as one more predictor and a dummy target, for a critic's value there."""
        last = len(self.prompt) + self.length - 1
        return replace(self, predictors=(*self.predictors, last), targets=(*self.targets, 0), kept=None)


@dataclass(frozen=True)
class Microbatch:
    """S samples in one row of N tokens, with C targets in total. One adapter computes the whole row.

    Tokens after a sample's last predictor are not in the row, because no loss depends on their outputs.
    """

    input_ids: Tensor  # (N,) int64
    position_ids: Tensor  # (N,) int64, of each token in its prompt + completion
    layout: Layout
    predictors: Tensor  # (C,) int64, indices in the row
    targets: Tensor  # (C,) int64
    lengths: Tensor  # (S,) int64, the number of targets of each sample
    tokens: Tokens  # (C,) each
    samples: tuple[Sample, ...]  # S
    support: Support | None = None  # of the targets; None: the whole vocabulary


@dataclass(frozen=True)
class _Branch:
    """A prompt in a row, with the samples that share it."""

    prompt: tuple[int, ...]
    samples: list[Sample]


def microbatches(
    groups: Sequence[Sequence[Sample]], max_tokens: int, dtype: torch.dtype, device: torch.device,
    whole_groups: bool = False,
) -> Iterator[Microbatch]:  # fmt: skip
    """Yield rows of up to `max_tokens` tokens, or of one larger sample. The samples of a group share one prompt.

    Groups are sorted by their longest completion, since attention under masks pads completions to equal length. With
    `whole_groups` no group is split, even if it exceeds `max_tokens`. `dtype` is the dtype of the policy's activations.
    """
    groups = [group for group in groups if group]
    total = sum(_size(group) for group in groups)
    share = total / max(1, math.ceil(total / max_tokens))  # rows of equal size: a small last row computes slowly
    branches: list[_Branch] = []
    tokens = 0
    for group in sorted(groups, key=lambda group: max(sample.length for sample in group)):
        prompt, opened = group[0].prompt, False
        for number, sample in enumerate(group):
            together = group if whole_groups else [sample]
            wanted = sum(item.length for item in together) + (0 if opened else len(prompt))
            full = tokens >= share or tokens + wanted > max_tokens
            if branches and full and not (whole_groups and number):
                yield _pack(branches, dtype, device)
                branches, tokens, opened = [], 0, False
            if not opened:
                branches.append(_Branch(prompt, []))
                tokens, opened = tokens + len(prompt), True
            branches[-1].samples.append(sample)
            tokens += sample.length
    if branches:
        yield _pack(branches, dtype, device)


def sample_of(prompt: Sequence[int], episode: Episode, advantage: float = 0.0, weight: float = 1.0) -> Sample:
    """Make a sample whose targets are the tokens that the policy sampled, all with this advantage and weight."""
    mask = episode.sampled_mask or (True,) * len(episode.completion_ids)
    behaviour = torch.tensor([x for x, sampled in zip(episode.behaviour_logprobs, mask, strict=True) if sampled])
    tokens = Tokens(behaviour, torch.full_like(behaviour, advantage), torch.full_like(behaviour, weight))
    indices = [index for index, sampled in enumerate(mask) if sampled]
    return Sample(
        tuple(prompt), episode.completion_ids, tuple(len(prompt) - 1 + index for index in indices),
        tuple(episode.completion_ids[index] for index in indices), tokens, episode, kept=episode.kept,
    )  # fmt: skip


def single_text(token_ids: Sequence[int], dtype: torch.dtype, device: torch.device) -> Microbatch:
    """Return a row of one text whose targets are all tokens but the first: C = len(token_ids) - 1."""
    zeros = torch.zeros(len(token_ids) - 1)
    completion, predictors = tuple(token_ids[1:]), tuple(range(len(token_ids) - 1))
    sample = Sample(tuple(token_ids[:1]), completion, predictors, completion, Tokens(zeros, zeros, zeros))
    return _pack([_Branch(sample.prompt, [sample])], dtype, device)


def empty_batch(dtype: torch.dtype, device: torch.device, optional: Iterable[str] = ()) -> Microbatch:
    """Return a row of one token without targets (C = 0), whose loss has no terms and whose gradients are 0. `optional`
    names the optional fields of `Tokens` that other rows have."""
    row, empty = single_text((0, 0), dtype, device), torch.zeros(0, device=device)
    return replace(
        row,
        predictors=row.predictors[:0],
        targets=row.targets[:0],
        lengths=row.lengths[:0],
        tokens=Tokens(empty, empty, empty, **dict.fromkeys(optional, empty)),
        samples=(),
    )


def shares(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Split groups of `sizes` tokens among `ranks` learners about equally. Return the indices of each rank's groups."""
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]) if ranks > 1 else range(len(sizes)):
        rank = loads.index(min(loads))
        assigned[rank].append(index)
        loads[rank] += sizes[index]
    return assigned


def _size(group: Sequence[Sample]) -> int:
    """Count the tokens of a group: its shared prompt once, and all completions."""
    return len(group[0].prompt) + sum(sample.length for sample in group)


def _join_tokens(samples: Sequence[Sample], device: torch.device) -> Tokens:
    """Concatenate the `tokens` of all samples. A field that any sample lacks is None."""
    columns = {field.name: [getattr(sample.tokens, field.name) for sample in samples] for field in fields(Tokens)}
    joined: dict[str, Any] = {
        name: None if any(values is None for values in column) else send(torch.cat(column), device)
        for name, column in columns.items()
    }
    return Tokens(**joined)


def _pack(branches: Sequence[_Branch], dtype: torch.dtype, device: torch.device) -> Microbatch:
    """Pack one row: each prompt, followed by its completions. An example, prompts p (completions a and b) and q (c):

        index         0    1    2    3    4    5    6    7    8
        input_ids     p0   p1   p2 | a0   a1 | b0 | q0   q1 | c0    the last tokens a2, b1 and c1 are targets only
        position_ids  0    1    2    3    4    3    0    1    2     every completion continues its prompt's positions
        attends to    p    p    p    p,a  p,a  p,b  q    q    q,c   up to itself; a and b share p and never meet
        predicts                a0   a1   a2   b1        c0   c1    p2 predicts the first token of a and of b
                                b0

    Sample by sample: predictors = [2, 3, 4, 2, 5, 7, 8], targets = [a0, a1, a2, b0, b1, c0, c1], lengths = [3, 2, 2].
    """
    samples = [sample for branch in branches for sample in branch.samples]
    lengths = [(len(branch.prompt), [len(sample.inputs) for sample in branch.samples]) for branch in branches]
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    for branch in branches:
        start, length = len(ids), len(branch.prompt)
        ids += branch.prompt
        positions += range(length)
        for sample in branch.samples:
            inputs, offset = sample.inputs, len(ids) - length  # `offset` maps indices after the prompt into the row
            predictors += [index + (start if index < length else offset) for index in sample.predictors]
            targets += sample.targets
            ids += inputs
            positions += range(length, length + len(inputs))
    return Microbatch(
        input_ids=send(torch.tensor(ids), device),
        position_ids=send(torch.tensor(positions), device),
        layout=layout_of(lengths, dtype, device),
        predictors=send(torch.tensor(predictors, dtype=torch.int64), device),
        targets=send(torch.tensor(targets, dtype=torch.int64), device),
        lengths=send(torch.tensor([len(sample.targets) for sample in samples]), device),
        tokens=_join_tokens(samples, device),
        samples=tuple(samples),
        support=support_of([sample.kept or Kept(b"", (0,) * len(sample.targets)) for sample in samples], device)
        if any(sample.kept for sample in samples)
        else None,
    )
