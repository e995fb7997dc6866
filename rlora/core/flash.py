"""Attention over a packed row by variable-length (varlen) kernels: no masks, no copied keys, no padding.

A completion's token attends to its prompt and to its own completion up to itself. A row therefore takes two kernel
calls: a causal one, in which each prompt and each completion attends to itself, and one in which completions attend to
their prompts. Each call also returns the log-sum-exp of its scores, which merges the two softmaxes into one
(FlashAttention, Dao et al. 2022, arXiv:2205.14135, section 3.1). Called with the merged output and log-sum-exp, the
backward pass of each kernel gives its exact part of the gradients: dS = P * (dP - rowsum(dO * O)) with
P = exp(S - lse), the merged softmax.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rlora.device import send
from rlora.model.base import head_size
from rlora.records import RloraError

_LARGEST_HEAD = 256
Lengths = Sequence[tuple[int, Sequence[int]]]  # tokens of each prompt, and of each of its completions


def check_heads(base: PreTrainedConfig) -> None:
    """Raise RloraError if the kernels do not support the model's head size."""
    size = head_size(base)
    if size > _LARGEST_HEAD or size % 8:
        raise RloraError(
            f"model: its attention heads have {size} dimensions, but GPU kernels support multiples of 8 up to "
            f"{_LARGEST_HEAD}; use a different model, or train on the CPU: set engine.gpus and learner.gpus to 0"
        )


@dataclass(frozen=True)
class Spans:
    """S spans of queries and the span of keys that each attends to, in the form that kernels take."""

    queries: Tensor  # (S + 1,) int32, cumulative lengths: the start of each span, and the end of the last
    keys: Tensor  # (S + 1,) int32
    longest: tuple[int, int]  # tokens of the longest span of queries, and of keys
    is_causal: bool


@dataclass(frozen=True)
class Segments:
    """Layout of a row of N tokens for varlen kernels. Each prompt is followed by its completions."""

    causal: Spans  # each prompt and each completion attends to itself
    prefix: Spans | None  # completions attend to their prompts; None if all completions are empty
    completion_tokens: Tensor  # int64, indices in the row
    prompt_tokens: Tensor  # int64, indices in the row, only of prompts that have completions
    longest: int  # tokens of the longest prompt with its completion

    @classmethod
    def from_lengths(cls, lengths: Lengths, device: torch.device) -> "Segments":
        """Build the layout of a row with prompts and completions of these lengths."""
        segments, queries, keys = list[int](), list[int](), list[int]()
        completion_tokens, prompt_tokens = list[int](), list[int]()
        end = 0
        for prompt, completions in lengths:
            start, completed = end, sum(completions)
            segments += [prompt, *(length for length in completions if length)]
            end = start + prompt + completed
            if completed:
                queries.append(completed)
                keys.append(prompt)
                prompt_tokens += range(start, start + prompt)
                completion_tokens += range(start + prompt, end)
        return cls(
            _spans(segments, segments, True, device),
            _spans(queries, keys, False, device) if queries else None,
            _integers(completion_tokens, device),
            _integers(prompt_tokens, device),
            max(prompt + max(completions, default=0) for prompt, completions in lengths),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Compute the attention of `Layout.attend`. q (N, H, D); k, v (N, K, D) -> (N, H, D)"""
        return _Attention.apply(q, k, v, self, scale)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse, ctx.extra = _forward(q, k, v, segments.causal, scale)
        if segments.prefix:
            c, p = segments.completion_tokens, segments.prompt_tokens
            out_p, lse_p, ctx.extra_prefix = _forward(q[c], k[p], v[p], segments.prefix, scale)
            lse_c = lse[:, c]
            lse_merged = torch.logaddexp(lse_c, lse_p)
            merged = out[c] * _weight(lse_c, lse_merged) + out_p * _weight(lse_p, lse_merged)
            out.index_copy_(0, c, merged.to(out.dtype))
            lse.index_copy_(1, c, lse_merged)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse), segments, scale = ctx.saved_tensors, ctx.segments, ctx.scale
        d_out = d_out.contiguous()
        d_q, d_k, d_v = _backward(d_out, q, k, v, out, lse, segments.causal, scale, ctx.extra)
        if segments.prefix:
            c, p = segments.completion_tokens, segments.prompt_tokens
            q_c, out_c, lse_c = q[c], out[c], lse[:, c].contiguous()
            d_q_c, d_k_p, d_v_p = _backward(
                d_out[c], q_c, k[p], v[p], out_c, lse_c, segments.prefix, scale, ctx.extra_prefix
            )
            d_q.index_add_(0, c, d_q_c)
            d_k.index_add_(0, p, d_k_p)
            d_v.index_add_(0, p, d_v_p)
        return d_q, d_k, d_v, None, None


def _spans(queries: Sequence[int], keys: Sequence[int], is_causal: bool, device: torch.device) -> Spans:
    """Make consecutive spans of these lengths."""
    query_starts, key_starts = (_integers([0, *accumulate(x)], device, torch.int32) for x in (queries, keys))
    return Spans(query_starts, key_starts, (max(queries), max(keys)), is_causal)


def _integers(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return send(torch.tensor(numbers, dtype=dtype), device)


def _weight(lse: Tensor, lse_merged: Tensor) -> Tensor:
    """Return the weight of one call's output in the merged output. (H, N) -> (N, H, 1)"""
    return (lse - lse_merged).exp().T[..., None]


def _forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor, Any]:
    """Return the output (N, H, D), the log-sum-exp of each query's scores (H, N), and the kernel's saved state."""
    if q.is_meta:  # memory is being counted
        return torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32), None
    if not q.is_cuda:
        return *_reference_forward(q, k, v, spans, scale), None
    out, lse, *extra, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, spans.queries, spans.keys, *spans.longest, 0.0, spans.is_causal, False, scale=scale
    )
    return out, lse, extra


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float, extra: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v through the scores of `spans`, given the merged `out` and `lse`."""
    if q.is_meta:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not q.is_cuda:
        return _reference_backward(d_out, q, k, v, out, lse, spans, scale)
    return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
        d_out, q, k, v, out, lse, spans.queries, spans.keys, *spans.longest, 0.0, spans.is_causal, *extra, scale=scale
    )


# --- reference implementation of the kernels, for tests on a CPU ---


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    for queries, keys in _slices(spans):
        scores = _scores(q[queries], k[keys], spans.is_causal, scale)
        lse[:, queries] = scores.logsumexp(-1)
        out[queries] = torch.einsum("hts,shd->thd", scores.softmax(-1), _repeated(v[keys], q))
    return out, lse


def _reference_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    for queries, keys in _slices(spans):
        weights = (_scores(q[queries], k[keys], spans.is_causal, scale) - lse[:, queries, None]).exp()
        d_weights = torch.einsum("thd,shd->hts", d_out[queries], _repeated(v[keys], q))
        d_scores = weights * (d_weights - (d_out[queries] * out[queries]).sum(-1).T[..., None]) * scale
        d_q[queries] = torch.einsum("hts,shd->thd", d_scores, _repeated(k[keys], q))
        d_k[keys] = torch.einsum("hts,thd->shd", d_scores, q[queries]).unflatten(1, (-1, repeats)).sum(2)
        d_v[keys] = torch.einsum("hts,thd->shd", weights, d_out[queries]).unflatten(1, (-1, repeats)).sum(2)
    return d_q, d_k, d_v


def _slices(spans: Spans) -> Iterator[tuple[slice, slice]]:
    query_starts, key_starts = spans.queries.tolist(), spans.keys.tolist()
    for i in range(len(query_starts) - 1):
        yield slice(*query_starts[i : i + 2]), slice(*key_starts[i : i + 2])


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> Tensor:
    scores = torch.einsum("thd,shd->hts", q, _repeated(k, q)) * scale
    return scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf) if is_causal else scores


def _repeated(keys: Tensor, q: Tensor) -> Tensor:
    """Repeat keys or values for each query head. (S, K, D) -> (S, H, D)"""
    return keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)
