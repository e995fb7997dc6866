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
    """Where P prompts of up to L tokens, each with up to G completions of up to T tokens, stand in a row of N tokens.

    A place past the end of its prompt or completion holds 0, as any other token would do: what it yields is dropped.
    """

    prompts: Tensor  # (P, L) int64, places in the row
    completions: Tensor  # (P, G, T) int64, places in the row
    bias: Tensor  # (P, 1, 1, 1, T, L + T) 0 where a completion's token may look, -inf elsewhere; in the base's dtype
    row: Tensor  # (N,) int64, the row's tokens among those of `prompts` and then `completions`, flattened


def tree_attention(q: Tensor, k: Tensor, v: Tensor, tree: Tree, scale: float) -> Tensor:
    """softmax(q k^T * scale) v along the tree. q (N, H, D); k, v (N, K, D) with H a multiple of K -> (N, H, D)

    A prompt's keys and values are read where they are, for all its completions in one product: nothing is copied G
    times, and no two siblings' tokens meet.
    """
    (_, H, D), K, R = q.shape, k.shape[1], q.shape[1] // k.shape[1]
    (P, L), (_, G, T) = tree.prompts.shape, tree.completions.shape
    # the prompts, causal
    at = tree.prompts.flatten()
    q_p = q[at].view(P, L, H, D).transpose(1, 2)
    k_p, v_p = (x[at].view(P, L, K, D).transpose(1, 2) for x in (k, v))
    out_p = nn.functional.scaled_dot_product_attention(q_p, k_p, v_p, is_causal=True, scale=scale, enable_gqa=R > 1)
    # the completions: scores against the prompt beside those against the completion itself, one softmax over both
    at = tree.completions.flatten()
    q_c = q[at].view(P, G, T, K, R, D).permute(0, 3, 1, 4, 2, 5).reshape(P, K, G * R * T, D)
    k_c, v_c = (x[at].view(P, G, T, K, D).permute(0, 3, 1, 2, 4).contiguous() for x in (k, v))  # (P, K, G, T, D)
    own = (P, K, G, R * T, D)
    scores = torch.cat([(q_c @ k_p.mT).view(P, K, G, R * T, L), q_c.view(own) @ k_c.mT], dim=-1)
    scores = scores.view(P, K, G, R, T, L + T) * scale + tree.bias
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype).view(P, K, G, R * T, L + T)
    from_prompt = weights[..., :L].reshape(P, K, G * R * T, L) @ v_p
    out_c = from_prompt.view(own) + weights[..., L:] @ v_c
    out_c = out_c.view(P, K, G, R, T, D).permute(0, 2, 4, 1, 3, 5).reshape(-1, H, D)
    return torch.cat([out_p.transpose(1, 2).reshape(-1, H, D), out_c])[tree.row]


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
    return tree_attention(q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), tree, scaling)[None], None


AttentionInterface.register(NAME, _attend)
