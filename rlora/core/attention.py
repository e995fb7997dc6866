"""Attention over a packed row: each completion attends to its prompt and itself, never to its siblings."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlora.core.flash import Lengths, Segments
from rlora.device import send, wide
from rlora.records import RloraError

NAME = "rlora_tree"  # key of this attention function in transformers' registry

_SCORES = 2**20  # attention scores held at a time in the backward pass


class Layout(Protocol):
    """Layout of a row for attention: a token of a completion sees its prompt, and the completion up to itself."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its completion, or an upper bound; no attention window may be shorter."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Compute softmax(q k^T * scale) v, where each token attends to the tokens that it sees. q (N, H, D); k, v
        (N, K, D) with H a multiple of K -> (N, H, D)"""


def layout_of(lengths: Lengths, dtype: torch.dtype, device: torch.device) -> Layout:
    """Return the layout of a row: `Segments` (varlen kernels) on a GPU in 16 bits, otherwise `Tree` (dense masks)."""
    if device.type == "cuda" and dtype != torch.float32:
        return Segments.from_lengths(lengths, device)
    return Tree.from_lengths(lengths, dtype, device)


@dataclass(frozen=True)
class Tree:
    """A row of N tokens padded to P prompts of L tokens, each with G completions of T tokens, under dense masks.

    The padded layout has M = P L + P G T slots: all prompts' slots, then all completions'. Slots past the end of a
    prompt or completion hold the row's first token; their outputs are dropped.
    """

    shape: tuple[int, int, int, int]  # P, L, G, T
    pad_index: Tensor  # (M,) int64, the token in each slot
    unpad_index: Tensor  # (N,) int64, the slot of each token
    padding: Tensor  # int64, the slots past an end
    # Additive masks in the base's dtype: 0 where a token may attend, -inf elsewhere.
    causal: Tensor  # (1, 1, L, L), for a prompt's tokens
    bias: Tensor  # (P G, 1, T, L + T), for a completion's tokens; (1, 1, T, L + T) if all prompts have equal length

    @classmethod
    def from_lengths(cls, lengths: Lengths, dtype: torch.dtype, device: torch.device) -> "Tree":
        """Build the layout of a row with prompts and completions of these lengths, with masks in `dtype`."""
        P, L = len(lengths), max(prompt for prompt, _ in lengths)
        G = max(len(completions) for _, completions in lengths)
        T = max(length for _, completions in lengths for length in completions)
        slots = torch.arange(P * (L + G * T))
        prompt_slots, completion_slots = slots[: P * L].view(P, L), slots[P * L :].view(P, G, T)
        unpad_index = torch.cat(
            [
                part
                for p, (prompt, completions) in enumerate(lengths)
                for part in (
                    prompt_slots[p, :prompt],
                    *(completion_slots[p, g, :length] for g, length in enumerate(completions)),
                )
            ]
        )
        in_prompt = torch.arange(L) < torch.tensor([[prompt] for prompt, _ in lengths])  # (P, L)
        in_prompt = in_prompt[:1] if in_prompt.all() else in_prompt.repeat_interleave(G, 0)
        visible = torch.cat(
            [in_prompt[:, None].expand(-1, T, L), torch.ones(T, T).tril().bool().expand(len(in_prompt), T, T)], dim=-1
        )
        bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -math.inf)[:, None]
        causal = torch.full((1, 1, L, L), -math.inf, dtype=dtype).triu(1)
        pad_index = torch.zeros_like(slots).index_put_((unpad_index,), torch.arange(len(unpad_index)))
        padding = torch.ones_like(slots, dtype=torch.bool).index_fill_(0, unpad_index, value=False).nonzero()[:, 0]
        return cls((P, L, G, T), *(send(x, device) for x in (pad_index, unpad_index, padding, causal, bias)))

    @property
    def longest(self) -> int:
        return self.shape[1] + self.shape[3]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Copy the keys and values of a prompt to each of its completions, so tokens of siblings never meet."""
        (P, L, G, T), (_, H, D), K = self.shape, q.shape, k.shape[1]
        q, k, v = (_gather(x, self.pad_index, self.unpad_index) for x in (q, k, v))
        (q_p, q_c), (k_p, k_c), (v_p, v_c) = (
            (
                prompts.view(P, L, x.shape[1], D).transpose(1, 2),
                completions.view(P * G, T, x.shape[1], D).transpose(1, 2),
            )
            for x in (q, k, v)
            for prompts, completions in [x.split([P * L, P * G * T])]
        )  # (P, heads, L, D) and (P G, heads, T, D)
        out_p = _attention(q_p, k_p, v_p, self.causal, scale)
        k_c, v_c = (
            torch.cat([prompt[:, None].expand(P, G, K, L, D).flatten(0, 1), completion], dim=2)
            for prompt, completion in ((k_p, k_c), (v_p, v_c))
        )  # (P G, K, L + T, D)
        out_c = _attention(q_c, k_c, v_c, self.bias, scale)
        out = torch.cat([out_p.transpose(1, 2).reshape(-1, H, D), out_c.transpose(1, 2).reshape(-1, H, D)])
        return _gather(out, self.unpad_index, self.pad_index, self.padding)


class _Gather(torch.autograd.Function):
    """Select rows of `x` by `index`. Only padding repeats a row, so the gradient is gathered by the inverse index."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, padding: Tensor | None) -> Tensor:
        ctx.inverse, ctx.padding = inverse, padding
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.index_select(0, ctx.inverse)
        if ctx.padding is not None:
            grad.index_fill_(0, ctx.padding, 0)
        return grad, None, None, None


def _gather(x: Tensor, index: Tensor, inverse: Tensor, padding: Tensor | None = None) -> Tensor:
    return _Gather.apply(x, index, inverse, padding)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    """O = P v with P = softmax(scale q k^T + bias). q (B, H, T, D), k and v (B, K, S, D), bias (B or 1, 1, T, S)
    -> (B, H, T, D)

    The backward pass recomputes P for some rows at a time (FlashAttention, arXiv:2205.14135, appendix B.2):

        dV = P^T dO        dS = P * (dO V^T - rowsum(dO * O))        dQ = scale dS K        dK = scale dS^T Q

    where * is elementwise, and rowsum(dO * O) = rowsum(P * dO V^T) is the softmax's own term.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        if q.is_meta:  # memory is being counted, and the CPU kernel holds no scores
            out = torch.empty_like(q)
        else:
            wide_q, wide_k, wide_v, mask = wide(q, k, v, bias)
            out = scaled_dot_product_attention(wide_q, wide_k, wide_v, attn_mask=mask, scale=scale, enable_gqa=True)
            out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        dtype = d_out.dtype
        q, k, v, bias, out, d_out = wide(*ctx.saved_tensors, d_out)
        (B, H, T, D), (_, K, S, _), scale = q.shape, k.shape, ctx.scale
        R = H // K  # query heads that share a key head are batched together
        q, d_out, out = (x.reshape(B * K, R, T, D) for x in (q, d_out, out))
        k, v = k.reshape(B * K, S, D), v.reshape(B * K, S, D)
        # A shift of all keys changes neither P nor dQ (rows of dS sum to 0). Centred keys keep more digits in 16 bits.
        k = k - k.mean(1, keepdim=True)
        sum_dtype = torch.promote_types(q.dtype, torch.float32)
        shift = (d_out * out).sum(-1, keepdim=True, dtype=sum_dtype).neg().to(q.dtype)  # -rowsum(dO * O)
        d_q = torch.empty_like(q)
        d_k, d_v = (torch.zeros_like(x, dtype=sum_dtype) for x in (k, v))
        sequences = torch.arange(B * K, device=q.device) // K
        rows = max(1, min(T, _SCORES // (R * S)))
        pairs = max(1, _SCORES // (R * rows * S))
        for b in _slices(B * K, pairs):
            for t in _slices(T, rows):
                q_t, d_t, shift_t = (x[b, :, t].flatten(1, 2) for x in (q, d_out, shift))  # (pairs, R rows, ...)
                bias_t = (bias[sequences[b], :, t] if len(bias) > 1 else bias[:, :, t]).expand(-1, R, -1, -1)
                weights = torch.baddbmm(bias_t.flatten(1, 2), q_t, k[b].mT, alpha=scale).softmax(-1)
                d_v[b] += weights.mT @ d_t
                d_scores = torch.baddbmm(shift_t, d_t, v[b].mT).mul_(weights)
                d_q[b, :, t] = (d_scores @ k[b]).view_as(q[b, :, t])
                d_k[b] += d_scores.mT @ q_t
        d_q, d_k, d_v = (x.to(dtype) for x in (d_q.mul_(scale), d_k.mul_(scale), d_v))
        return d_q.view(B, H, T, D), d_k.view(B, K, S, D), d_v.view(B, K, S, D), None, None


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Compute attention with a bias on the scores. On a CPU, `_Attention` replaces torch's slower backward pass."""
    if q.is_cuda:  # the fused kernels support no mask if there are fewer key heads than query heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return _Attention.apply(q, k, v, bias, scale)  # type: ignore[no-any-return, no-untyped-call]


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float,
    layout: Layout | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute the attention of a layer, as transformers calls it. Without a layout the attention is causal.

    q (1, H, N, D), k and v (1, K, N, D) -> (1, N, H, D). Raises RloraError for unsupported options of the model.
    """
    if layout is None:
        out, _ = sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling, **options)
        return out, None
    for option in ("softcap", "s_aux"):
        if options.get(option) is not None:
            raise RloraError(f"model: its attention uses {option}, which rlora does not support; use a different model")
    window = options.get("sliding_window")
    if window is not None and layout.longest > window:
        raise RloraError(
            f"sampling.max_prompt_tokens + sampling.max_tokens: the model's sliding attention window has {window} "
            f"tokens, but a prompt with its completion can have {layout.longest}; lower either setting"
        )
    return layout.attend(q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), scaling)[None], None


AttentionInterface.register(NAME, _attend)
