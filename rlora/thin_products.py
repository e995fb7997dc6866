"""The low-rank product in vLLM on CPU: thin dense products in place of a copy of A and B for every token."""

import warnings
from typing import Any

import vllm
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms.cpu import CpuPlatform

_CHECKED = {"0.32.0"}  # versions of vLLM whose own product this one was compared with


def install() -> None:
    """Let engines that are built from now on use `ThinProducts`, where vLLM's version was checked with it."""
    if vllm.__version__.partition("+")[0] in _CHECKED:
        CpuPlatform.get_punica_wrapper = classmethod(lambda cls: f"{__name__}.ThinProducts")  # type: ignore[assignment]
    else:
        warnings.warn(f"vLLM {vllm.__version__} applies adapters its own way: {_CHECKED} were checked", stacklevel=2)


class ThinProducts(PunicaWrapperCPU):
    """y += B A x for the rows of each adapter in the batch. Rows without an adapter (slot -1) stay the base's.

    vLLM's own gathers A and B for every token, and takes -1 for the last slot in a batch that mixes rows with and
    without an adapter.
    """

    def update_metadata(self, *arguments: Any, **options: Any) -> None:
        """Called where the batch changes: which adapters are in it, and the mask (tokens, 1) of each one's rows."""
        super().update_metadata(*arguments, **options)
        slots = self.token_lora_indices
        present = slots.unique().tolist()
        # the mask is None where all rows are one adapter's
        self.rows = {slot: (slots == slot)[:, None] if len(present) > 1 else None for slot in present if slot >= 0}

    def add_lora_linear(
        self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], lora_b_stacked: tuple[Tensor, ...],
        scale: float, output_slices: tuple[int, ...], **_: Any,
    ) -> None:  # fmt: skip
        """y (tokens, d_out) in place; x (tokens, d_in); of each slice, A (slots, 1, r, d_in) and B (slots, 1, d, r)."""
        for slot, mask in self.rows.items():
            start = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                h = x @ a[slot, 0].mT  # (tokens, r)
                if mask is not None:
                    h *= mask
                y[:, start : start + width].addmm_(h, b[slot, 0].mT, alpha=scale)
                start += width
