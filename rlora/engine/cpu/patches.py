"""What stands in the place of vLLM's own parts on CPU: the low-rank product, and the drawing of tokens."""

import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import vllm
from numpy.typing import NDArray
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


def lay_out(model: Any) -> None:
    """Lay the slots of matrices that vLLM has fused side by side, so that one product serves them all.

    A's of the parts (slots, 1, r, d_in) become rows of one (slots, parts x r, d_in). B's (slots, 1, d, r) become
    columns of one (slots, r, sum of d): transposed, for the product goes along d. vLLM goes on writing to the parts,
    which are views now.
    """
    from rlora.engine.cpu import product  # not sooner: vLLM can't start where numba was imported (its dispatcher.py)

    product.use_threads(torch.get_num_threads())
    ThinProducts.add = staticmethod(product.add)
    for module in model.lora_manager.modules.values():
        one = isinstance(module.lora_a_stacked, Tensor)  # as over the output head
        parts_a = (module.lora_a_stacked,) if one else module.lora_a_stacked
        parts_b = (module.lora_b_stacked,) if one else module.lora_b_stacked
        if parts_a[0].dim() != 4:  # over the embeddings
            continue
        rank, widths = parts_a[0].shape[2], [part.shape[2] for part in parts_b]
        assert rank in product.RANKS
        ThinProducts.ranks = np.full(len(parts_a[0]), rank)
        a = parts_a[0].new_zeros(len(parts_a[0]), len(parts_a) * rank, parts_a[0].shape[3])
        b = parts_b[0].new_zeros(len(parts_b[0]), rank, sum(widths))
        rows = [part.unsqueeze(1) for part in a.split(rank, 1)]
        columns = [part.mT.unsqueeze(1) for part in b.split(widths, 2)]
        module.lora_a_stacked, module.lora_b_stacked = (rows[0], columns[0]) if one else (tuple(rows), tuple(columns))


def tell_rank(model: Any, lora_id: int, rank: int) -> None:
    """Have products read no more of a slot than the adapter in it has: vLLM pads each to the largest rank."""
    slots = model.lora_manager.lora_index_to_id
    if ThinProducts.add and lora_id in slots:  # else the proof says that it is not there
        ThinProducts.ranks[slots.index(lora_id)] = rank


class ThinProducts(PunicaWrapperCPU):
    """y += B A x for the rows of each adapter in the batch. Rows without an adapter (slot -1) stay the base's.

    vLLM's own gathers A and B for every token, and takes -1 for the last slot in a batch that mixes rows with and
    without an adapter.
    """

    head = True
    ranks: NDArray[np.int64]  # by slot
    add: Callable[..., None] | None = None  # until `lay_out`; before it there are zeros in the slots

    def update_metadata(self, *arguments: Any, **options: Any) -> None:
        """Called where the batch changes: the slot of each row."""
        super().update_metadata(*arguments, **options)
        self.slots, self.sampled_slots = self.token_lora_indices.numpy(), self.sampler_indices.numpy()
        self.none = bool((self.slots < 0).all())

    def add_lora_linear(
        self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], lora_b_stacked: tuple[Tensor, ...],
        scale: float, output_slices: tuple[int, ...], **_: Any,
    ) -> None:  # fmt: skip
        """y (tokens, d_out) in place; x (tokens, d_in); A and B as `lay_out` made them."""
        if not self.none:
            self._add(y, x, lora_a_stacked[0], lora_b_stacked[0], self.slots, output_slices, scale)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **_: Any
    ) -> None:
        """The same for the output head, whose rows are those that a token is drawn for.

        Logprobs of a prompt come here too, its rows alone, and nobody says whose they are: they are the base head's.
        """
        if self.head and len(y) == len(self.sampled_slots):
            vocabulary = lora_b_stacked.shape[2]  # y may be padded
            self._add(y[:, :vocabulary], x, lora_a_stacked, lora_b_stacked, self.sampled_slots, (vocabulary,), scale)

    def _add(
        self, y: Tensor, x: Tensor, part_of_a: Tensor, part_of_b: Tensor, slots: NDArray[np.int64],
        widths: tuple[int, ...], scale: float,
    ) -> None:  # fmt: skip
        if self.add:
            a, b = _all_of(part_of_a), _all_of(part_of_b)  # the product looks at no bounds
            assert len(x) == len(y) == len(slots)
            assert (x.shape[1], y.shape[1]) == (a.shape[2], b.shape[2])
            self.add(_numbers(y), _numbers(x), a, b, slots, self.ranks, _ends(widths), scale)


@lru_cache
def _ends(widths: tuple[int, ...]) -> NDArray[np.int64]:
    return np.cumsum(widths)


@cache
def _all_of(part: Tensor) -> NDArray[Any]:
    """What `lay_out` made the part a view of."""
    assert part._base is not None
    return _numbers(part._base)


def _numbers(tensor: Tensor) -> NDArray[Any]:
    """The tensor's own memory; numpy knows no bfloat16, so its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


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
