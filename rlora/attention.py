"""Attention over a packed row: each completion sees its prompt and itself, its siblings never."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlora.records import RloraError

NAME = "rlora_tree"  # of this attention among those of transformers


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
    causal: Tensor  # (L, L), of a prompt's tokens
    bias: Tensor  # (P, 1, 1, 1, T, L + T), of a completion's


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


def tree_attention(q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float) -> Tensor:
    """softmax(q k^T * scale) v along the tree. q (N, H, D); k, v (N, K, D) with H a multiple of K -> (N, H, D)

    A prompt's keys and values are read where they are, for all its completions in one product: nothing is copied G
    times, and no two siblings' tokens meet.
    """
    (P, L, G, T), (_, H, D), K = tree.shape, q.shape, k.shape[1]
    R = H // K
    q, k, v = (_lay(x, tree.token_of_place, tree.place_of_token) for x in (q, k, v))
    q_p, q_c = q.split([P * L, P * G * T])
    (k_p, k_c), (v_p, v_c) = (
        (x[: P * L].view(P, L, K, D).transpose(1, 2), x[P * L :].view(P, G, T, K, D).permute(0, 3, 1, 2, 4))
        for x in (k, v)
    )  # (P, K, L, D) and (P, K, G, T, D)
    # the prompts, causal
    q_p = q_p.view(P, L, K, R, D).permute(0, 2, 3, 1, 4).reshape(P, K, R * L, D)
    weights = ((q_p @ k_p.mT).view(P, K, R, L, L) * scale + tree.causal).softmax(-1)
    out_p = (weights.view(P, K, R * L, L) @ v_p).view(P, K, R, L, D).permute(0, 3, 1, 2, 4)
    # the completions: scores against the prompt beside those against the completion itself, one softmax over both
    q_c = q_c.view(P, G, T, K, R, D).permute(0, 3, 1, 4, 2, 5).reshape(P, K, G * R * T, D)
    own = (P, K, G, R * T, D)
    scores = torch.cat([(q_c @ k_p.mT).view(P, K, G, R * T, L), q_c.view(own) @ k_c.mT], dim=-1)
    weights = (scores.view(P, K, G, R, T, L + T) * scale + tree.bias).softmax(-1).view(P, K, G, R * T, L + T)
    out_c = (weights[..., :L].reshape(P, K, G * R * T, L) @ v_p).view(own) + weights[..., L:] @ v_c
    out_c = out_c.view(P, K, G, R, T, D).permute(0, 2, 4, 1, 3, 5)
    out = torch.cat([out_p.reshape(-1, H, D), out_c.reshape(-1, H, D)])
    return _lay(out, tree.place_of_token, tree.token_of_place, tree.empty_places)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float,
    tree: Tree | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers calls: q (1, H, N, D), k and v (1, K, N, D) -> (1, N, H, D). Without a tree: causal."""
    if tree is None:
        out, _ = sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling, **options)
        return out, None
    for option in ("softcap", "s_aux"):
        if options.get(option) is not None:
            raise RloraError(f"model: its attention uses {option}, which can't be trained here yet; use another model")
    window, longest = options.get("sliding_window"), tree.shape[1] + tree.shape[3]
    if window is not None and longest > window:
        raise RloraError(
            f"sampling.max_prompt_tokens + sampling.max_tokens: the model's attention sees {window} tokens, and a "
            f"prompt and completion have {longest}; lower one of them"
        )
    return tree_attention(q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), tree, scaling)[None], None


AttentionInterface.register(NAME, _attend)
