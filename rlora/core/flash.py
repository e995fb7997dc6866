"""Attention over a packed row by kernels for segments of any length ("varlen"): no masks, no copies of keys, no pads.

A token of a completion sees its prompt and what stands before it in its own completion. So a row is two calls: one
causal, in which each prompt and each completion sees itself, and one in which completions see their prompts. Both give
the log-sum-exp of their scores, by which the two softmaxes are merged into that of the whole (FlashAttention, Dao et
al. 2022, section 3.1). Given the merged output and log-sum-exp, the backward pass of each call gives its exact part of
the gradients: dS = P (dP - sum(dO O)), where P = exp(S - lse) is the whole softmax's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rlora.machine import send
from rlora.model.base import head_size
from rlora.records import RloraError

_LARGEST_HEAD = 256
Lengths = Sequence[tuple[int, Sequence[int]]]  # of each prompt, and of each of its completions


def check_heads(base: PreTrainedConfig) -> None:
    """Raise RloraError where no kernel takes the model's heads."""
    size = head_size(base)
    if size > _LARGEST_HEAD or size % 8:
        raise RloraError(
            f"model: its attention heads have {size} dimensions, and a GPU's kernels take multiples of 8 up to "
            f"{_LARGEST_HEAD}; use another model, or set engine.gpus and learner.gpus to 0"
        )


@dataclass(frozen=True)
class Spans:
    """Stretches of queries and the stretch of keys that each sees, S of them, as kernels take them."""

    queries: Tensor  # (S + 1,) int32, where each starts, and the end of the last
    keys: Tensor  # (S + 1,) int32
    longest: tuple[int, int]  # of queries, of keys
    is_causal: bool


@dataclass(frozen=True)
class Segments:
    """A row of N tokens: each prompt, followed by its completions."""

    itself: Spans  # over the row
    prompts: Spans | None  # over the tokens of completions, and over those of their prompts; None: all are empty
    completion_tokens: Tensor  # int64, places in the row
    prompt_tokens: Tensor  # int64, of the prompts that have completions
    longest: int  # tokens of a prompt and its completion

    @classmethod
    def of(cls, lengths: Lengths, device: torch.device) -> "Segments":
        segments, queries, keys = list[int](), list[int](), list[int]()
        completion_tokens, prompt_tokens = list[int](), list[int]()
        end = 0
        for prompt, completions in lengths:
            start, own = end, sum(completions)
            segments += [prompt, *(length for length in completions if length)]
            end = start + prompt + own
            if own:
                queries.append(own)
                keys.append(prompt)
                prompt_tokens += range(start, start + prompt)
                completion_tokens += range(start + prompt, end)

        return cls(
            _spans(segments, segments, True, device),
            _spans(queries, keys, False, device) if queries else None,
            _sent(completion_tokens, device),
            _sent(prompt_tokens, device),
            max(prompt + max(completions, default=0) for prompt, completions in lengths),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """softmax(q k^T * scale) v, each token over what it sees. q (N, H, D); k, v (N, K, D) -> (N, H, D)"""
        return _Attention.apply(q, k, v, self, scale)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse, ctx.extra = _forward(q, k, v, segments.itself, scale)
        if segments.prompts:
            own, seen = segments.completion_tokens, segments.prompt_tokens
            over_prompt, lse_prompt, ctx.extra_prompt = _forward(q[own], k[seen], v[seen], segments.prompts, scale)
            lse_own = lse[:, own]
            lse_both = torch.logaddexp(lse_own, lse_prompt)
            merged = out[own] * _weight(lse_own, lse_both) + over_prompt * _weight(lse_prompt, lse_both)
            out.index_copy_(0, own, merged.to(out.dtype))
            lse.index_copy_(1, own, lse_both)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse), segments, scale = ctx.saved_tensors, ctx.segments, ctx.scale
        d_out = d_out.contiguous()
        d_q, d_k, d_v = _backward(d_out, q, k, v, out, lse, segments.itself, scale, ctx.extra)
        if segments.prompts:
            own, seen = segments.completion_tokens, segments.prompt_tokens
            q_own, out_own, lse_own = q[own], out[own], lse[:, own].contiguous()
            of_queries, of_keys, of_values = _backward(
                d_out[own], q_own, k[seen], v[seen], out_own, lse_own, segments.prompts, scale, ctx.extra_prompt
            )
            d_q.index_add_(0, own, of_queries)
            d_k.index_add_(0, seen, of_keys)
            d_v.index_add_(0, seen, of_values)
        return d_q, d_k, d_v, None, None


def _spans(queries: Sequence[int], keys: Sequence[int], is_causal: bool, device: torch.device) -> Spans:
    """Of stretches of such lengths, one after the other."""
    starts, starts_of_keys = (_sent([0, *accumulate(each)], device, torch.int32) for each in (queries, keys))
    return Spans(starts, starts_of_keys, (max(queries), max(keys)), is_causal)


def _sent(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return send(torch.tensor(numbers, dtype=dtype), device)


def _weight(lse: Tensor, lse_both: Tensor) -> Tensor:
    """What a part's output counts in the merged one. (H, N) -> (N, H, 1)"""
    return (lse - lse_both).exp().T[..., None]


def _forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor, Any]:
    """The output (N, H, D), the log-sum-exp of each query's scores (H, N), and what the backward pass wants."""
    if q.is_meta:  # only the memory is asked for
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
    """The gradients that queries, keys and values get through these scores; `out` and `lse` are the merged ones."""
    if q.is_meta:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if not q.is_cuda:
        return _reference_backward(d_out, q, k, v, out, lse, spans, scale)
    return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
        d_out, q, k, v, out, lse, spans.queries, spans.keys, *spans.longest, 0.0, spans.is_causal, *extra, scale=scale
    )


# --- what the kernels compute, for tests on a CPU ---


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    for queries, keys in _stretches(spans):
        scores = _scores(q[queries], k[keys], spans.is_causal, scale)
        lse[:, queries] = scores.logsumexp(-1)
        out[queries] = torch.einsum("hts,shd->thd", scores.softmax(-1), _repeated(v[keys], q))
    return out, lse


def _reference_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    for queries, keys in _stretches(spans):
        weights = (_scores(q[queries], k[keys], spans.is_causal, scale) - lse[:, queries, None]).exp()
        d_weights = torch.einsum("thd,shd->hts", d_out[queries], _repeated(v[keys], q))
        d_scores = weights * (d_weights - (d_out[queries] * out[queries]).sum(-1).T[..., None]) * scale
        d_q[queries] = torch.einsum("hts,shd->thd", d_scores, _repeated(k[keys], q))
        d_k[keys] = torch.einsum("hts,thd->shd", d_scores, q[queries]).unflatten(1, (-1, repeats)).sum(2)
        d_v[keys] = torch.einsum("hts,thd->shd", weights, d_out[queries]).unflatten(1, (-1, repeats)).sum(2)
    return d_q, d_k, d_v


def _stretches(spans: Spans) -> Iterator[tuple[slice, slice]]:
    starts, starts_of_keys = spans.queries.tolist(), spans.keys.tolist()
    for place in range(len(starts) - 1):
        yield slice(*starts[place : place + 2]), slice(*starts_of_keys[place : place + 2])


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> Tensor:
    scores = torch.einsum("thd,shd->hts", q, _repeated(k, q)) * scale
    return scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf) if is_causal else scores


def _repeated(keys: Tensor, q: Tensor) -> Tensor:
    """Keys or values for each head of the queries. (S, K, D) -> (S, H, D)"""
    return keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)
