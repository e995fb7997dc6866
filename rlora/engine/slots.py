"""Compares the contents of vLLM's adapter slots with an adapter."""

from typing import Any

import torch
from torch import Tensor
from vllm.lora.utils import parse_fine_tuned_lora_name

from rlora.core import peft_format
from rlora.records import Adapter

_Pair = tuple[Tensor, Tensor] | tuple[None, None]  # A and B; None if the adapter does not adapt the matrix


def differences(model: Any, lora_id: int, adapter: Adapter) -> list[str]:
    """Return the differences between `adapter` and the slot of `lora_id` in vLLM's `model`, one line for each.

    The list is empty if every number in the slot is as expected: A, and B times the scale, in the slot's dtype, fused
    with other matrices as vLLM fuses them, and zeros where the adapter has no matrix. Adapters over experts are not
    compared.
    """
    manager = model.lora_manager
    if lora_id not in manager.lora_index_to_id:
        return [f"no slot has the adapter's id {lora_id} (ids in the slots: {manager.lora_index_to_id})"]
    slot = manager.lora_index_to_id.index(lora_id)
    expected = _by_module(model, adapter, manager.lora_config.lora_dtype)
    lines = []
    for name, module in manager.modules.items():
        pairs: list[_Pair] = [expected.pop(member, (None, None)) for member in manager.packed_modules.get(name, [name])]
        if not hasattr(module, "lora_a_stacked"):  # experts
            continue
        stacks = _stacks(module)
        for factor, parts, matrices in zip("AB", stacks, _parts(module, pairs, len(stacks[0])), strict=True):
            if not all(_holds(part[slot, 0], matrix) for part, matrix in zip(parts, matrices, strict=True)):
                lines.append(f"{factor} of {name} differs from the adapter's")
    return lines + [f"no slot has {name}" for name in expected if ".experts" not in name]


def _by_module(model: Any, adapter: Adapter, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (R, d_in) and scale x B (d_out, R) by vLLM's module name, rounded as in the learner's forward pass."""
    spec, tensors = peft_format.decode(adapter.config, adapter.weights)
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renames = mapper and mapper.get_rename_mapper()
    pairs = {}
    for name_a, a in tensors.items():
        key, factor = peft_format.parse(name_a)
        if factor == "lora_A":
            b = tensors[name_a.replace(".lora_A.", ".lora_B.")]
            module, _ = parse_fine_tuned_lora_name(name_a, renames)
            pairs[module] = a.to(dtype), b.to(dtype) * spec.scale(key, len(a))
    return pairs


def _stacks(module: Any) -> list[tuple[Tensor, ...]]:
    """Return all slots of a layer's A and of its B: a tensor (slots, 1, rows, columns) per part of a fused matrix."""
    stacks = module.lora_a_stacked, module.lora_b_stacked
    return [(stack,) if isinstance(stack, Tensor) else stack for stack in stacks]


def _parts(module: Any, pairs: list[_Pair], count: int) -> tuple[list[Any], list[Any]]:
    """Return the expected A and B of the `count` parts of a fused matrix, on this rank of tensor parallelism."""
    a, b = ([pair[factor] for pair in pairs] for factor in (0, 1))
    if len(a) != count:  # one matrix of the base that vLLM splits into several parts
        a, b = module.expand_packed_lora(a, b)
    if getattr(module, "tp_size", 1) == 1 or a == [None]:
        return a, b
    if count > 1:
        return module.slice_lora_a(a), module.slice_lora_b(b)
    return [module.slice_lora_a(a[0])], [module.slice_lora_b(b[0])]


def _holds(slot: Tensor, matrix: Tensor | None) -> bool:
    """Return whether the upper left corner of `slot` equals `matrix` and the rest of `slot` is zero."""
    expected = torch.zeros_like(slot)
    if matrix is not None:
        expected[: matrix.shape[0], : matrix.shape[1]] = matrix
    return slot.equal(expected)
