"""Sampling on the CPU, in place of vLLM's: tokens by inversion, and a record of what top-k, top-p and min-p kept."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from vllm import LLMEngine
from vllm.v1.outputs import ModelRunnerOutput, SamplingMaskLists
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

_vllm_draw = TopKTopPSampler.forward_cpu
_BLOCK = 256  # tokens whose probabilities are summed before the cumulative sum
_NUCLEUS = (128, 2048)  # sizes up to which a nucleus is looked for before the vocabulary is sorted


def draw(
    self: TopKTopPSampler, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Sample a token for each row of `logits` (rows, V) by inversion: one random number per row instead of V.

    Returns the tokens (rows,) and the logprobs (rows, V), which are the log-softmax of the logits in fp32. For each row
    a number u is drawn uniformly from (0, 1]. The row's token is the first at which the cumulative probability is at
    least u. Both u and the cumulative probability are rounded to fp32, whose spacing just below 1 is 6e-8. Blocks of
    tokens are summed first, so that the cumulative sum, which is slow on a CPU, is over one block per row.

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
    return invert(logits.softmax(-1, dtype=torch.float32)), logprobs


def invert(probabilities: Tensor) -> Tensor:
    """Draw an index for each row of `probabilities` (n, V), with a probability of 0 or more: (n,) int64."""
    size = probabilities.shape[1]
    padded = pad(probabilities, (0, -size % _BLOCK)) if size % _BLOCK else probabilities
    blocks = padded.view(len(probabilities), -1, _BLOCK)
    ends = blocks.sum(2).cumsum_(1)  # (n, blocks)
    u = (1 - torch.rand(len(ends), 1)) * ends[:, -1:]
    block = torch.searchsorted(ends, u).clamp_(max=ends.shape[1] - 1)  # past the end if a row is NaN
    start = ends.gather(1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)
    inside = blocks.take_along_dim(block[:, :, None], 1)[:, 0].cumsum(1)  # (n, _BLOCK)
    # The block's sum is rounded differently here: without the limit an index of probability 0 could follow the last one
    index = torch.searchsorted(inside, torch.minimum(u - start, inside[:, -1:])) + block * _BLOCK
    return index[:, 0].clamp_(max=size - 1)


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
        """Record the ids of the tokens of `logits` (rows, V) that are not -inf. A row in which no token is -inf records
        0 tokens, which means the whole vocabulary."""
        truncated = (logits.amin(1) == -torch.inf).nonzero()[:, 0]
        rows, ids = (_rows_of(logits, truncated) > -torch.inf).nonzero(as_tuple=True)
        cls.ids = ids.int().numpy()
        cls.offsets = np.concatenate([[0], np.cumsum(np.bincount(truncated[rows].numpy(), minlength=len(logits)))])


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
    size = logits.shape[1]
    if k is not None and len(rows := (k < size).nonzero()[:, 0]):
        least = logits.new_full((len(logits), 1), -torch.inf)
        limits = k[rows, None].long()
        least[rows] = _rows_of(logits, rows).topk(int(limits.max()), 1).values.gather(1, limits - 1)
        logits.masked_fill_(logits < least, -torch.inf)
    if p is not None and len(rows := (p < 1).nonzero()[:, 0]):
        probabilities = logits.softmax(1)
        for limit in (*(limit for limit in _NUCLEUS if limit < size), size):
            top, ids = _rows_of(probabilities, rows).topk(limit, 1)
            reached = top.cumsum(1) - top  # probability of the more probable tokens
            done = (reached[:, -1] >= p[rows]) | (limit == size)
            ready, ids = rows[done, None], ids[done]
            kept = logits[ready, ids].masked_fill_(reached[done] >= p[ready], -torch.inf)
            logits.index_fill_(0, rows[done], -torch.inf)
            logits[ready, ids] = kept
            rows = rows[~done]
            if not len(rows):
                break


def _rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """Return the rows, without a copy if they are all rows."""
    return values if len(rows) == len(values) else values[rows]


def no_ranks(logprobs: Tensor, _: Tensor) -> Tensor:
    """Return a rank of 0 for the token of each row of `logprobs` (rows, V).

    Replaces `batched_count_greater_than`, which counts the tokens that are more probable. rlora does not read ranks,
    and vLLM compiles that function with Inductor in every process, which takes 2 s.
    """
    return logprobs.new_zeros(len(logprobs), dtype=torch.long)
