"""Sampling on the CPU, in place of vLLM's: tokens by inversion, and a record of what top-k, top-p and min-p kept."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm import LLMEngine
from vllm.v1.outputs import ModelRunnerOutput, SamplingMaskLists
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

_vllm_draw = TopKTopPSampler.forward_cpu
_NUCLEUS = 256  # most tokens of a nucleus that is found without sorting the vocabulary


def draw(
    self: TopKTopPSampler, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Sample a token for each row of `logits` (rows, V) by inversion: one random number per row instead of V.

    Returns the tokens (rows,) and the logprobs (rows, V), which are the log-softmax of the logits in fp32. For each row
    a number u is drawn uniformly from (0, 1]. The row's token is the first at which the cumulative probability is at
    least u. Both u and the cumulative probability are rounded to fp32, whose spacing just below 1 is 6e-8.

    Replaces `TopKTopPSampler.forward_cpu`, and calls vLLM's own method if a request has a generator (a seed), or if
    `logprobs_mode` is not processed_logprobs. If a request has top-k `k`, top-p `p` or min-p (vLLM has set these logits
    to -inf before), `Masks` records which tokens were kept.
    """
    if generators or self.logprobs_mode != "processed_logprobs":
        return _vllm_draw(self, logits, generators, k, p)
    truncate(logits, k, p)
    if Masks.are_wanted:
        Masks.of(logits)
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    total = logprobs.exp().cumsum_(-1)
    u = (1 - torch.rand(len(total), 1)) * total[:, -1:]
    tokens = torch.searchsorted(total, u)[:, 0].clamp_(max=logits.shape[1] - 1)  # past the end if a row is NaN
    return tokens, logprobs


class Masks:
    """The tokens that top-k, top-p and min-p kept for the rows of the last `draw`, as vLLM's GPU sampler returns them.

    vLLM's model runner for CPUs (version 1) has no `return_sampling_mask`. `record_masks` attaches the masks to its
    outputs.
    """

    are_wanted = False
    ids: NDArray[np.int32] | None = None  # the kept tokens of all rows; None without a truncated row
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, logits: Tensor) -> None:
        """Keep the tokens of `logits` (rows, V) that are not -inf. A row that has all of them counts as 0 tokens."""
        kept = logits > -torch.inf
        counts = kept.sum(1)
        kept &= (counts < logits.shape[1])[:, None]
        rows, ids = kept.nonzero(as_tuple=True)
        cls.ids = ids.int().numpy()
        cls.offsets = np.concatenate([[0], np.cumsum(np.bincount(rows.numpy(), minlength=len(logits)))])


def record_masks(llm: LLMEngine) -> None:
    """Make an engine on the CPU return the tokens that top-k, top-p and min-p kept (`CompletionOutput.sampling_mask`),
    as vLLM's model runner for GPUs does with `return_sampling_mask`."""
    core: Any = llm.engine_core.engine_core  # type: ignore[attr-defined]
    Masks.are_wanted = core.scheduler.return_sampling_mask = True
    runner = core.model_executor.driver_worker.worker.model_runner
    sample_tokens = runner.sample_tokens

    def sample_and_record(grammar_output: Any) -> Any:
        Masks.ids = None
        output = sample_tokens(grammar_output)
        if Masks.ids is not None and isinstance(output, ModelRunnerOutput):
            output.sampling_masks = SamplingMaskLists(Masks.ids, Masks.offsets)
        return output

    runner.sample_tokens = sample_and_record


def truncate(logits: Tensor, k: Tensor | None, p: Tensor | None) -> None:
    """Set the logits (rows, V) outside of the `k` most probable tokens, and of the fewest that reach probability `p`,
    to -inf in place. `k` and `p` have one entry per row; V and 1 keep all. The most probable token always stays."""
    if k is not None and len(rows := (k < logits.shape[1]).nonzero()[:, 0]):
        chosen, limits = logits[rows], k[rows].long()
        least = chosen.topk(int(limits.max()), 1).values.gather(1, limits[:, None] - 1)
        logits[rows] = chosen.masked_fill_(chosen < least, -torch.inf)
    if p is not None and len(rows := (p < 1).nonzero()[:, 0]):
        logits[rows] = _nucleus(logits[rows], p[rows])


def _nucleus(logits: Tensor, p: Tensor) -> Tensor:
    """Return `logits` (n, V), with -inf outside of the fewest tokens that reach probability `p` (n,) together."""
    probabilities = logits.softmax(1)
    limit = min(_NUCLEUS, logits.shape[1])
    while True:
        top, ids = probabilities.topk(limit, 1)
        reached = top.cumsum(1) - top  # probability of the more probable tokens
        if limit == logits.shape[1] or bool((reached[:, -1] >= p).all()):
            break
        limit = logits.shape[1]  # a row is so flat that its nucleus is large
    kept = torch.full_like(logits, -torch.inf)
    inside = logits.gather(1, ids).masked_fill(reached >= p[:, None], -torch.inf)
    return kept.scatter_(1, ids, inside)


def no_ranks(logprobs: Tensor, _: Tensor) -> Tensor:
    """Return a rank of 0 for the token of each row of `logprobs` (rows, V).

    Replaces `batched_count_greater_than`, which counts the tokens that are more probable. rlora does not read ranks,
    and vLLM compiles that function with Inductor in every process, which takes 2 s.
    """
    return logprobs.new_zeros(len(logprobs), dtype=torch.long)
