"""The output head: hidden states -> logprobs of target tokens, without holding the logits of all tokens at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlora.core.lora import low_rank
from rlora.device import linear, send, wide
from rlora.records import Kept

# Logits held at a time. On a CPU few enough that malloc reuses their memory (below 32 MiB in fp32). On a GPU enough
# that the head's weights are read once for hundreds of tokens, not dozens.
LOGITS = {"cpu": 3 * 2**21, "cuda": 2**28, "meta": 2**24}


@dataclass(frozen=True)
class Support:
    """The part of the vocabulary over which the probabilities of C targets sum to 1, from `Kept`."""

    ids: Tensor  # (K,) int64, the kept tokens of all targets, one after the other
    rows: Tensor  # (K,) int64, the target of each
    is_open: Tensor  # (C, 1) bool, whether the target has the whole vocabulary
    starts: tuple[int, ...]  # C + 1, index of each target's first kept token

    def dropped(self, logits: Tensor, chunk: slice) -> Tensor:
        """Return which of the logits (n, V) of a chunk of targets are outside of the support: (n, V) bool."""
        outside = (~self.is_open[chunk]).expand_as(logits).clone()
        part = slice(self.starts[chunk.start], self.starts[chunk.start + len(logits)])
        outside[self.rows[part] - chunk.start, self.ids[part]] = False
        return outside


def support_of(kept: Sequence[Kept], device: torch.device) -> Support:
    """Return the support of targets whose kept tokens are `kept`, in order."""
    counts = torch.tensor([count for part in kept for count in part.counts])
    ids = torch.frombuffer(bytearray(b"".join(part.ids for part in kept)) or bytearray(4), dtype=torch.int32)
    rows = torch.arange(len(counts)).repeat_interleave(counts)
    starts = (0, *counts.cumsum(0).tolist())
    return Support(
        send(ids[: len(rows)].long(), device), send(rows, device), send((counts == 0)[:, None], device), starts
    )


class _TokenLogprobs(torch.autograd.Function):
    """Computes log softmax(h W^T / t) at the target.

    A logprob is one number, so its gradient with respect to h is one vector per token, (W[target] - p W) / t. The
    forward pass computes it while it has p; the backward pass only scales it. Logits are neither kept nor recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        support: Support | None,
    ) -> Tensor:  # fmt: skip
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        wide_weight, wide_bias = wide(weight, bias)
        gradient = torch.empty_like(hidden, dtype=wide_weight.dtype) if ctx.needs_input_grad[0] else None
        for chunk in _chunks(hidden, len(weight)):
            logits = linear(hidden[chunk], wide_weight, wide_bias)
            if support:
                logits.masked_fill_(support.dropped(logits, chunk), -torch.inf)
            target_id = targets[chunk, None]
            target, top = logits.gather(1, target_id).float(), logits.amax(1, keepdim=True)
            exps = logits.sub_(top).div_(temperature).exp_()  # in place: each token's p over the largest p
            total = exps.sum(1, keepdim=True, dtype=torch.float32)
            logprobs[chunk] = ((target - top) / temperature - total.log())[:, 0]
            if gradient is not None:
                # Take 1 from the target's p before the product: W[target] and p W may agree in nearly all digits.
                exps.scatter_(1, target_id, (exps.gather(1, target_id) - total).to(exps.dtype))
                torch.mm(wide(exps)[0], wide_weight, out=gradient[chunk]).div_(total * -temperature)
        ctx.gradient = gradient
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[:, None].to(ctx.gradient.dtype) * ctx.gradient, None, None, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float = 1.0,
    support: Support | None = None,
) -> Tensor:  # fmt: skip
    """Return the natural logs of the targets' probabilities under softmax(hidden weight^T / temperature), in fp32, over
    the tokens of `support`, by default the whole vocabulary.

    hidden (C, d), weight (V, d), bias (V,) or None, targets (C,) int64 -> (C,). Gradients reach only `hidden`: the head
    is frozen. Logits are rounded to the head's dtype, as in the engine, and so is each probability relative to the
    largest one; sums over the vocabulary are fp32.
    """
    return _TokenLogprobs.apply(hidden, weight, bias, targets, temperature, support)  # type: ignore[no-any-return, no-untyped-call]


def logprobs_and_entropies(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None,
    targets: Tensor, temperature: float = 1.0, support: Support | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return logprobs of the targets and entropies -sum p log p in nats, (C,) each; shapes as in `token_logprobs`.

    Gradients also reach a trained head, or an adapter over the head: A (r, d) and B (V, r). The backward pass
    recomputes the logits, one chunk at a time.
    """

    def outputs(chunk: slice) -> Tensor:
        head = hidden[chunk], weight, bias
        logits = linear(*head) if adapter is None else low_rank(*head, *adapter)
        scaled = logits.float() / temperature
        if support is None:
            logprobs = scaled.log_softmax(1)
            return torch.stack([logprobs.gather(1, targets[chunk, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)])
        dropped = support.dropped(logits, chunk)
        logprobs = scaled.masked_fill(dropped, -torch.inf).log_softmax(1)
        terms = logprobs.exp() * logprobs.masked_fill(dropped, 0.0)  # p log p is 0 where p is 0
        return torch.stack([logprobs.gather(1, targets[chunk, None])[:, 0], -terms.sum(1)])

    chunks = _chunks(hidden, len(weight))
    stacked = torch.cat([checkpoint(outputs, chunk, use_reentrant=False) for chunk in chunks], dim=1)
    return stacked[0], stacked[1]


def _chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    """Return slices of tokens whose logits are held at the same time; one empty slice if there are no tokens."""
    chunk = max(1, LOGITS[hidden.device.type] // vocabulary)
    return [slice(start, start + chunk) for start in range(0, max(1, len(hidden)), chunk)]
