"""Replacements for parts of vLLM's CPU build: the low-rank product, the sampler, and the ranks of tokens."""

import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import vllm.model_executor.layers.utils as layer_utils
import vllm.v1.sample.sampler
from numpy.typing import NDArray
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from rlora.device import linear, multiplies_in_16_bits
from rlora.engine.cpu import sampling

_dispatch = layer_utils.dispatch_cpu_unquantized_gemm
_BLOCK = 2**21  # entries of a weight that are converted at a time: 8 MiB in fp32
_TESTED = {"0.32.0"}  # versions of vLLM whose own parts these were compared with


def install(head: bool) -> bool:
    """Make engines that are built in this process use the replacements. Call this function before building an engine.

    Returns False, after a warning, if the version of vLLM was not tested: then nothing is replaced. `head` says whether
    adapters may adapt the output head.
    """
    if vllm.__version__.partition("+")[0] not in _TESTED:
        warnings.warn(
            f"vLLM {vllm.__version__}: rlora's faster CPU kernels were tested with vLLM {', '.join(sorted(_TESTED))} "
            "only, so vLLM's own kernels are used; install a tested version for a faster engine",
            stacklevel=2,
        )
        return False
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: f"{__name__}.ThinProducts")  # type: ignore[assignment]
    ThinProducts.head = head
    TopKTopPSampler.forward_cpu = sampling.draw  # type: ignore[method-assign]
    vllm.v1.sample.sampler.batched_count_greater_than = sampling.no_ranks  # type: ignore[assignment,attr-defined]
    if not multiplies_in_16_bits():
        layer_utils.dispatch_cpu_unquantized_gemm = _multiply_in_fp32
    return True


def _multiply_in_fp32(layer: Any, remove_weight: bool) -> None:
    """Let a layer with bf16 weights multiply by `linear_in_blocks`. vLLM calls this function for each layer."""
    if layer.weight.dim() != 2 or layer.weight.dtype != torch.bfloat16:
        _dispatch(layer, remove_weight)
    else:
        layer.cpu_linear = linear_in_blocks


def linear_in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias as `rlora.device.linear` does, over blocks of W's rows.

    The fp32 copy of a block stays in the CPU's cache. To copy a whole output head takes longer than its product does.
    """
    rows = max(1, _BLOCK // weight.shape[1])
    biases = [None] * -(-len(weight) // rows) if bias is None else bias.split(rows)
    products = [linear(x, block, part) for block, part in zip(weight.split(rows), biases, strict=True)]
    return products[0] if len(products) == 1 else torch.cat(products, -1)


def fuse_slots(model: Any) -> None:
    """Put the slots of matrices that vLLM has fused side by side, so that one product computes all of them.

    `model` is vLLM's, and r is the rank that the slots have room for. The A of each part (slots, 1, r, d_in) becomes
    rows of one tensor (slots, parts x r, d_in). The B of each part (slots, 1, d, r) becomes columns of one tensor
    (slots, r, sum of d), transposed because the product iterates over d. Views replace vLLM's tensors of the parts, so
    that vLLM writes new adapters into the fused tensors.
    """
    from rlora.engine.cpu import product  # late: vLLM can't start after numba was imported (see its dispatcher.py)

    product.use_threads(torch.get_num_threads())
    ThinProducts.add = staticmethod(product.add)
    for module in model.lora_manager.modules.values():
        is_single = isinstance(module.lora_a_stacked, Tensor)  # as for the output head
        parts_a = (module.lora_a_stacked,) if is_single else module.lora_a_stacked
        parts_b = (module.lora_b_stacked,) if is_single else module.lora_b_stacked
        if parts_a[0].dim() != 4:  # embeddings
            continue
        rank, widths = parts_a[0].shape[2], [part.shape[2] for part in parts_b]
        assert rank in product.RANKS
        ThinProducts.ranks = np.full(len(parts_a[0]), rank)
        a = parts_a[0].new_zeros(len(parts_a[0]), len(parts_a) * rank, parts_a[0].shape[3])
        b = parts_b[0].new_zeros(len(parts_b[0]), rank, sum(widths))
        rows = [part.unsqueeze(1) for part in a.split(rank, 1)]
        columns = [part.mT.unsqueeze(1) for part in b.split(widths, 2)]
        views = (rows[0], columns[0]) if is_single else (tuple(rows), tuple(columns))
        module.lora_a_stacked, module.lora_b_stacked = views


def set_rank(model: Any, lora_id: int, rank: int) -> None:
    """Limit products to the `rank` of the adapter `lora_id`, which vLLM pads to the rank of the slots."""
    slots = model.lora_manager.lora_index_to_id
    if ThinProducts.add and lora_id in slots:  # else the check of the slot reports that it is missing
        ThinProducts.ranks[slots.index(lora_id)] = rank


class ThinProducts(PunicaWrapperCPU):
    """Replaces vLLM's low-rank products: y += scale B A x, with the adapter of each row.

    Rows without an adapter (slot -1) do not change. vLLM's own product gathers A and B for every token, and if a batch
    mixes rows with and without an adapter, this product applies the last slot's adapter to the rows without.
    """

    head = True
    ranks: NDArray[np.int64]  # by slot
    add: Callable[..., None] | None = None  # None until `fuse_slots`; the slots hold zeros until then

    def update_metadata(self, *arguments: Any, **options: Any) -> None:
        """Read the slot of each row. vLLM calls this method when the batch changes."""
        super().update_metadata(*arguments, **options)
        self.slots, self.sampled_slots = self.token_lora_indices.numpy(), self.sampler_indices.numpy()
        self.is_base_only = bool((self.slots < 0).all())

    def add_lora_linear(
        self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], lora_b_stacked: tuple[Tensor, ...],
        scale: float, output_slices: tuple[int, ...], **_: Any,
    ) -> None:  # fmt: skip
        """Add to y (tokens, d_out) in place, for the input x (tokens, d_in).

        The stacked A and B are views from `fuse_slots`. `output_slices` are the widths of the fused parts in y.
        """
        if not self.is_base_only:
            self._add(y, x, lora_a_stacked[0], lora_b_stacked[0], self.slots, output_slices, scale)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **_: Any
    ) -> None:
        """Add to the logits y of the output head in place; the rows of y and x are those that a token is sampled for.

        vLLM also calls this method for prompt logprobs, with different rows whose slots are not known. Then y does not
        change.
        """
        if self.head and len(y) == len(self.sampled_slots):
            vocabulary = lora_b_stacked.shape[2]  # y may be padded
            self._add(y[:, :vocabulary], x, lora_a_stacked, lora_b_stacked, self.sampled_slots, (vocabulary,), scale)

    def _add(
        self, y: Tensor, x: Tensor, part_of_a: Tensor, part_of_b: Tensor, slots: NDArray[np.int64],
        widths: tuple[int, ...], scale: float,
    ) -> None:  # fmt: skip
        if self.add:
            a, b = _fused(part_of_a), _fused(part_of_b)
            assert len(x) == len(y) == len(slots)  # the product checks no bounds
            assert (x.shape[1], y.shape[1]) == (a.shape[2], b.shape[2])
            self.add(_array(y), _array(x), a, b, slots, self.ranks, _ends(widths), scale)


@lru_cache
def _ends(widths: tuple[int, ...]) -> NDArray[np.int64]:
    return np.cumsum(widths)


@cache
def _fused(part: Tensor) -> NDArray[Any]:
    """Return the fused tensor of `fuse_slots` that `part` is a view of."""
    assert part._base is not None
    return _array(part._base)


def _array(tensor: Tensor) -> NDArray[Any]:
    """Return an array that shares the tensor's memory. A bfloat16 becomes the uint16 with the same bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
