"""Attention over a packed row: each completion sees its prompt and itself, its siblings never."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlora.core.flash import Lengths, Segments
from rlora.machine import send
from rlora.records import RloraError

NAME = "rlora_tree"  # of this attention among those of transformers

_SCORES = 2**20  # held at a time in the backward pass


class Layout(Protocol):
    """Which tokens of a row see which: a token of a completion sees its prompt and what stands before it in its own."""

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its completion, of which no attention window may be shorter."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """softmax(q k^T * scale) v, each token over what it sees. q (N, H, D); k, v (N, K, D) with H a multiple of K
        -> (N, H, D)"""


def layout_of(lengths: Lengths, dtype: torch.dtype, device: torch.device) -> Layout:
    """For a row of prompts, each followed by its completions: on a GPU in 16 bits for kernels without masks."""
    if device.type == "cuda" and dtype != torch.float32:
        return Segments.of(lengths, device)
    return Tree.of(lengths, dtype, device)


@dataclass(frozen=True)
class Tree:
    """A row of N tokens laid out as P prompts of up to L tokens, each with up to G completions of up to T tokens.

    The M = P L + P G T places are those of the prompts, then those of the completions. Places past an end hold the
    row's first token; what they yield is dropped.
    """

    shape: tuple[int, int, int, int]  # P, L, G, T
    token_of_place: Tensor  # (M,) int64
    place_of_token: Tensor  # (N,) int64
    empty_places: Tensor  # int64, those past an end
    # 0 where a token may look, -inf elsewhere; in the base's dtype
    causal: Tensor  # (1, 1, L, L), of a prompt's tokens
    bias: Tensor  # (P G, 1, T, L + T), of a completion's; the same for all where no prompt is shorter: (1, 1, T, L + T)

    @classmethod
    def of(cls, lengths: Lengths, dtype: torch.dtype, device: torch.device) -> "Tree":
        """For prompts of such lengths, each with completions of such lengths; `dtype` is that of the masks."""
        P, L = len(lengths), max(prompt for prompt, _ in lengths)
        G = max(len(completions) for _, completions in lengths)
        T = max(length for _, completions in lengths for length in completions)
        places = torch.arange(P * (L + G * T))
        place_of_prompt, place_of_completion = places[: P * L].view(P, L), places[P * L :].view(P, G, T)
        place = torch.cat(
            [
                part
                for p, (prompt, completions) in enumerate(lengths)
                for part in (
                    place_of_prompt[p, :prompt],
                    *(place_of_completion[p, g, :length] for g, length in enumerate(completions)),
                )
            ]
        )
        seen_PL = torch.arange(L) < torch.tensor([[prompt] for prompt, _ in lengths])
        seen_PL = seen_PL[:1] if seen_PL.all() else seen_PL.repeat_interleave(G, 0)
        may_look = torch.cat(
            [seen_PL[:, None].expand(-1, T, L), torch.ones(T, T).tril().bool().expand(len(seen_PL), T, T)], dim=-1
        )
        bias = torch.zeros(may_look.shape, dtype=dtype).masked_fill_(~may_look, -math.inf)[:, None]
        causal = torch.full((1, 1, L, L), -math.inf, dtype=dtype).triu(1)
        token_of_place = torch.zeros_like(places).index_put_((place,), torch.arange(len(place)))
        empty = torch.ones_like(places, dtype=torch.bool).index_fill_(0, place, value=False).nonzero()[:, 0]
        return cls((P, L, G, T), *(send(tensor, device) for tensor in (token_of_place, place, empty, causal, bias)))

    @property
    def longest(self) -> int:
        return self.shape[1] + self.shape[3]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """A completion's keys are its prompt's, which are computed once and copied to each, and its own: no two
        siblings' tokens meet."""
        (P, L, G, T), (_, H, D), K = self.shape, q.shape, k.shape[1]
        q, k, v = (_lay(x, self.token_of_place, self.place_of_token) for x in (q, k, v))
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
            torch.cat([prompt[:, None].expand(P, G, K, L, D).flatten(0, 1), own], dim=2)
            for prompt, own in ((k_p, k_c), (v_p, v_c))
        )  # (P G, K, L + T, D)
        out_c = _attention(q_c, k_c, v_c, self.bias, scale)
        out = torch.cat([out_p.transpose(1, 2).reshape(-1, H, D), out_c.transpose(1, 2).reshape(-1, H, D)])
        return _lay(out, self.place_of_token, self.token_of_place, self.empty_places)


class _Lay(torch.autograd.Function):
    """Rows of `x` by `index`. No row is wanted twice but for empty places, so the gradient comes back by `back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, empty: Tensor | None) -> Tensor:
        ctx.back, ctx.empty = back, empty
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.index_select(0, ctx.back)
        if ctx.empty is not None:
            grad.index_fill_(0, ctx.empty, 0)
        return grad, None, None, None


def _lay(x: Tensor, index: Tensor, back: Tensor, empty: Tensor | None = None) -> Tensor:
    return _Lay.apply(x, index, back, empty)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    """softmax(q k^T * scale + bias) v, whose weights are computed again in the backward pass, some rows at a time.

    q (B, H, T, D), k and v (B, K, S, D), bias (B or 1, 1, T, S) -> (B, H, T, D)
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
        if q.is_meta:  # only the memory is asked for, and the CPU's kernel holds no scores
            out = torch.empty_like(q)
        else:
            out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out = ctx.saved_tensors
        (B, H, T, D), (_, K, S, _), scale = q.shape, k.shape, ctx.scale
        R = H // K  # heads that share a key: their rows go together
        q, d_out, out = (x.reshape(B * K, R, T, D) for x in (q, d_out, out))
        k, v = k.reshape(B * K, S, D), v.reshape(B * K, S, D)
        # which shifts a query's scores alike, so no weight, and 16 bits hold more of them
        k = k - k.mean(1, keepdim=True)
        wide = torch.promote_types(q.dtype, torch.float32)  # of sums
        shift = (d_out * out).sum(-1, keepdim=True, dtype=wide).neg().to(q.dtype)  # -sum_S weights * d_weights
        d_q = torch.empty_like(q)
        d_k, d_v = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        whose = torch.arange(B * K, device=q.device) // K
        rows = max(1, min(T, _SCORES // (R * S)))
        pairs = max(1, _SCORES // (R * rows * S))
        for b in _slices(B * K, pairs):
            for t in _slices(T, rows):
                q_t, d_t, shift_t = (x[b, :, t].flatten(1, 2) for x in (q, d_out, shift))  # (pairs, R rows, ...)
                bias_t = (bias[whose[b], :, t] if len(bias) > 1 else bias[:, :, t]).expand(-1, R, -1, -1).flatten(1, 2)
                weights = torch.baddbmm(bias_t, q_t, k[b].mT, alpha=scale).softmax(-1)
                d_v[b] += weights.mT @ d_t
                d_scores = torch.baddbmm(shift_t, d_t, v[b].mT).mul_(weights)
                d_q[b, :, t] = (d_scores @ k[b]).view_as(q[b, :, t])
                d_k[b] += d_scores.mT @ q_t
        d_q, d_k, d_v = d_q.mul_(scale), d_k.mul_(scale).to(k.dtype), d_v.to(v.dtype)
        return d_q.view(B, H, T, D), d_k.view(B, K, S, D), d_v.view(B, K, S, D), None, None


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention with a bias on its scores. On CPU, torch's own backward pass takes two to four times as long."""
    if q.is_cuda:  # whose fused kernels take no mask beside fewer heads of keys than of queries
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return _Attention.apply(q, k, v, bias, scale)  # type: ignore[no-any-return, no-untyped-call]


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float,
    layout: Layout | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: q (1, H, N, D), k and v (1, K, N, D) -> (1, N, H, D). Without a layout: causal."""
    if layout is None:
        out, _ = sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling, **options)
        return out, None
    for option in ("softcap", "s_aux"):
        if options.get(option) is not None:
            raise RloraError(f"model: its attention uses {option}, which can't be trained here yet; use another model")
    window = options.get("sliding_window")
    if window is not None and layout.longest > window:
        raise RloraError(
            f"sampling.max_prompt_tokens + sampling.max_tokens: the model's attention sees {window} tokens, and a "
            f"prompt and completion have {layout.longest}; lower one of them"
        )
    return layout.attend(q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), scaling)[None], None


AttentionInterface.register(NAME, _attend)
