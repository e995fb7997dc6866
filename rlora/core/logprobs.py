"""The output head: hidden states -> logprobs of given tokens, without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from rlora.core.lora import low_rank

# Logits held at a time. On a CPU few enough that malloc reuses their memory (below 32 MiB in fp32); on a GPU so many
# that the weights of the head are read for hundreds of tokens at once, not for dozens.
LOGITS = {"cpu": 3 * 2**21, "cuda": 2**28, "meta": 2**21}


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(h W^T / t) at the target.

    A token's logprob is one number, so its gradient by h is one vector, (W[target] - p W) / t: it is computed where p
    is at hand. The backward pass only scales it; the logits are neither kept nor computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> Tensor:
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _chunks(hidden, len(weight)):
            logits = linear(hidden[part], weight, bias)
            target_id = targets[part, None]
            target, top = logits.gather(1, target_id).float(), logits.amax(1, keepdim=True)
            odds = logits.sub_(top).div_(temperature).exp_()  # in place: p of each token over that of the likeliest
            total = odds.sum(1, keepdim=True, dtype=torch.float32)
            logprobs[part] = ((target - top) / temperature - total.log())[:, 0]
            if slope is not None:
                # p - 1 of the target before the product: after it, W[target] and p W might agree to all their digits
                odds.scatter_(1, target_id, (odds.gather(1, target_id) - total).to(odds.dtype))
                torch.mm(odds, weight, out=slope[part]).div_(total * -temperature)
        ctx.slope = slope
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[:, None].to(ctx.slope.dtype) * ctx.slope, None, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """Natural logs of the targets' probabilities under softmax(hidden weight^T / temperature), in fp32.

    hidden (C, d), weight (V, d), bias (V,) or None, targets (C,) int64 -> (C,). Gradients reach `hidden` alone: the
    head is frozen. Logits are rounded to the head's dtype, as the engine does, and so is each p over the largest; sums
    over the vocabulary are fp32.
    """
    return _TokenLogprobs.apply(hidden, weight, bias, targets, temperature)  # type: ignore[no-any-return, no-untyped-call]


def logprobs_and_entropies(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None,
    targets: Tensor, temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, and the entropies -sum p log p in nats: (C,) each, with gradients to the head too where it is trained.

    It is trained itself, or an adapter over it is: A (r, d) and B (V, r). The logits of a chunk are computed again in
    the backward pass.
    """

    def of(part: slice) -> Tensor:
        head = hidden[part], weight, bias
        logits = linear(*head) if adapter is None else low_rank(*head, *adapter)
        logprobs = (logits.float() / temperature).log_softmax(1)
        return torch.stack([logprobs.gather(1, targets[part, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)])

    parts = _chunks(hidden, len(weight))
    both = torch.cat([checkpoint(of, part, use_reentrant=False) for part in parts], dim=1)
    return both[0], both[1]


def _chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    """The tokens whose logits are held at a time; one slice at least, also of no tokens."""
    chunk = max(1, LOGITS[hidden.device.type] // vocabulary)
    return [slice(start, start + chunk) for start in range(0, max(1, len(hidden)), chunk)]
