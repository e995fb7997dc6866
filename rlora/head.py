"""The output head: hidden states -> logprobs of given tokens, without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

_LOGITS = 2**24  # held at a time


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
        for at in torch.arange(len(hidden), device=hidden.device).split(max(1, _LOGITS // len(weight))):
            part = slice(int(at[0]), int(at[-1]) + 1)
            logits = linear(hidden[part], weight, bias).float().div_(temperature)
            target = targets[part, None]
            chosen = logits.gather(1, target)
            normaliser = logits.logsumexp(1, keepdim=True)
            logprobs[part] = (chosen - normaliser)[:, 0]
            if slope is not None:
                d_logits = logits.sub_(normaliser).exp_().neg_()  # -p, in place
                d_logits.scatter_add_(1, target, torch.ones_like(chosen))
                slope[part] = d_logits.div_(temperature).to(weight.dtype) @ weight
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
    head is frozen. Logits are rounded to the head's dtype, as the engine does, and go on in fp32.
    """
    return _TokenLogprobs.apply(hidden, weight, bias, targets, temperature)  # type: ignore[no-any-return, no-untyped-call]
