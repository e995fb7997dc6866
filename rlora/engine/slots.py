"""What stands in vLLM's adapter slots, held against the adapter that should be there."""

from typing import Any

import torch
from torch import Tensor
from vllm.lora.utils import parse_fine_tuned_lora_name

from rlora.core import peft_format
from rlora.records import Adapter

_Pair = tuple[Tensor, Tensor] | tuple[None, None]  # A and B, where there are any


def differences(model: Any, lora_id: int, adapter: Adapter) -> list[str]:
    """How the slot of `lora_id` in vLLM's `model` differs from `adapter`, a line each; empty where it is exact.

    A slot should hold A and B in the slots' dtype, B times its scale, packed with those of other matrices as vLLM
    fuses them, and zeros wherever the adapter has nothing: each number is compared. Adapters over experts are left out.
    """
    manager = model.lora_manager
    if lora_id not in manager.lora_index_to_id:
        return [f"it is in no slot; those hold {manager.lora_index_to_id}"]
    slot = manager.lora_index_to_id.index(lora_id)
    wanted = _by_module(model, adapter, manager.lora_config.lora_dtype)
    found = []
    for name, module in manager.modules.items():
        pairs: list[_Pair] = [wanted.pop(member, (None, None)) for member in manager.packed_modules.get(name, [name])]
        if not hasattr(module, "lora_a_stacked"):  # experts
            continue
        stacks = _stacks(module)
        for factor, parts, wants in zip("AB", stacks, _parts(module, pairs, len(stacks[0])), strict=True):
            if not all(_holds(part[slot, 0], want) for part, want in zip(parts, wants, strict=True)):
                found.append(f"{factor} of {name} is not the adapter's")
    return found + [f"{name} is in no slot" for name in wanted if ".experts" not in name]


def _by_module(model: Any, adapter: Adapter, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """A and scale x B by vLLM's names of the matrices they are over, rounded as the learner's own forward pass does."""
    spec, tensors = peft_format.decode(adapter.config, adapter.weights)
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renames = mapper and mapper.get_rename_mapper()
    found = {}
    for name_a, a in tensors.items():
        key, factor = peft_format.parse(name_a)
        if factor == "lora_A":
            b = tensors[name_a.replace(".lora_A.", ".lora_B.")]
            place, _ = parse_fine_tuned_lora_name(name_a, renames)
            found[place] = a.to(dtype), b.to(dtype) * spec.scale(key, len(a))
    return found


def _stacks(module: Any) -> list[tuple[Tensor, ...]]:
    """The slots of a layer's A and of its B, one tensor (slots, 1, rows, columns) for each part of a fused matrix."""
    stacks = module.lora_a_stacked, module.lora_b_stacked
    return [(stack,) if isinstance(stack, Tensor) else stack for stack in stacks]


def _parts(module: Any, pairs: list[_Pair], count: int) -> tuple[list[Any], list[Any]]:
    """The A and the B of each of the `count` parts of a layer's matrix, on this rank of a tensor-parallel engine."""
    a, b = ([pair[factor] for pair in pairs] for factor in (0, 1))
    if len(a) != count:  # one matrix of the base that vLLM holds in several parts
        a, b = module.expand_packed_lora(a, b)
    if getattr(module, "tp_size", 1) == 1 or a == [None]:
        return a, b
    if count > 1:
        return module.slice_lora_a(a), module.slice_lora_b(b)
    return [module.slice_lora_a(a[0])], [module.slice_lora_b(b[0])]


def _holds(slot: Tensor, want: Tensor | None) -> bool:
    """Whether the upper left of `slot` is `want` and the rest of it zero."""
    full = torch.zeros_like(slot)
    if want is not None:
        full[: want.shape[0], : want.shape[1]] = want
    return slot.equal(full)
