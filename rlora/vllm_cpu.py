"""What stands in the place of vLLM's own parts on CPU: the low-rank product, and the drawing of tokens."""

import warnings
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

_CHECKED = {"0.32.0"}  # versions of vLLM whose own parts these were compared with
_draw_otherwise = TopKTopPSampler.forward_cpu


def install(head: bool) -> bool:
    """Let engines that are built in this process use these, where vLLM's version was checked with them.

    `head` says whether adapters are over the output head too.
    """
    if vllm.__version__.partition("+")[0] not in _CHECKED:
        warnings.warn(f"vLLM {vllm.__version__} applies adapters its own way: {_CHECKED} were checked", stacklevel=2)
        return False
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: f"{__name__}.ThinProducts")  # type: ignore[assignment]
    ThinProducts.head = head
    TopKTopPSampler.forward_cpu = draw  # type: ignore[method-assign]
    return True


def fuse(model: Any) -> None:
    """Lay the slots of matrices that vLLM has fused side by side, so that one thin product serves them all.

    A's of the parts (slots, 1, r, d_in) become rows of one (slots, 1, parts x r, d_in), and B's (slots, 1, d, r) blocks
    of one (slots, 1, sum of d, parts x r) that is 0 elsewhere. vLLM goes on writing to the parts, which are views.
    """
    for module in model.lora_manager.modules.values():
        parts_a, parts_b = module.lora_a_stacked, module.lora_b_stacked
        if isinstance(parts_a, tuple) and len(parts_a) > 1:
            rank, widths = parts_a[0].shape[2], [part.shape[2] for part in parts_b]
            a = parts_a[0].new_zeros(len(parts_a[0]), 1, rank * len(parts_a), parts_a[0].shape[3])
            b = parts_b[0].new_zeros(len(parts_b[0]), 1, sum(widths), rank * len(parts_b))
            rows = a.split(rank, 2)
            blocks = [part.split(rank, 3)[i] for i, part in enumerate(b.split(widths, 2))]
            module.lora_a_stacked, module.lora_b_stacked = tuple(rows), tuple(blocks)


class ThinProducts(PunicaWrapperCPU):
    """y += B A x for the rows of each adapter in the batch. Rows without an adapter (slot -1) stay the base's.

    vLLM's own gathers A and B for every token, and takes -1 for the last slot in a batch that mixes rows with and
    without an adapter.
    """

    head = True

    def update_metadata(self, *arguments: Any, **options: Any) -> None:
        """Called where the batch changes: which adapters are in it, and the mask (rows, 1) of each one's rows."""
        super().update_metadata(*arguments, **options)
        self.rows, self.sampled_rows = _rows(self.token_lora_indices), _rows(self.sampler_indices)

    def add_lora_linear(
        self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], lora_b_stacked: tuple[Tensor, ...],
        scale: float, output_slices: tuple[int, ...], **_: Any,
    ) -> None:  # fmt: skip
        """y (tokens, d_out) in place; x (tokens, d_in); A and B those of one matrix, or all parts of one by `fuse`."""
        _add(y, x, _whole(lora_a_stacked), _whole(lora_b_stacked), scale, self.rows)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **_: Any
    ) -> None:
        """The same for the output head, whose rows are those that a token is drawn for.

        Logprobs of a prompt come here too, its rows alone, and nobody says whose they are: they are the base head's.
        """
        if self.head and len(y) == len(self.sampler_indices):
            padless = y[:, : lora_b_stacked.shape[2]]
            _add(padless, x, lora_a_stacked, lora_b_stacked, scale, self.sampled_rows)


def _whole(parts: tuple[Tensor, ...]) -> Tensor:
    """What `fuse` made the parts views of; the only part where there is one."""
    return parts[0] if parts[0]._base is None else parts[0]._base


def _rows(slots: Tensor) -> dict[int, Tensor | None]:
    """The mask (rows, 1) of each adapter's rows; None where all rows are one adapter's."""
    present = slots.unique().tolist()
    return {slot: (slots == slot)[:, None] if len(present) > 1 else None for slot in present if slot >= 0}


def _add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, rows: dict[int, Tensor | None]) -> None:
    for slot, mask in rows.items():
        h = x @ a[slot, 0].mT  # (rows, R)
        if mask is not None:
            h *= mask
        y.addmm_(h, b[slot, 0].mT, alpha=scale)


def draw(
    self: TopKTopPSampler, logits: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A token of each row of `logits` (rows, V) by inversion: one random number a row, in place of V.

    The token is the first at which the sum of probabilities reaches u, uniform on (0, 1]; sums are fp32 (their error is
    below 1e-7), so a token of a smaller probability may be drawn more or less often by as much.
    """
    if generators or k is not None or p is not None or self.logprobs_mode != "processed_logprobs":
        return _draw_otherwise(self, logits, generators, k, p)
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    total = logprobs.exp().cumsum_(-1)
    u = (1 - torch.rand(len(total), 1)) * total[:, -1:]
    tokens = torch.searchsorted(total, u)[:, 0].clamp_(max=logits.shape[1] - 1)  # past the end where a row is NaN
    return tokens, logprobs
