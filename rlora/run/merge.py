"""Merges an adapter into its base's weights, for servers without adapter support. For export only, not training."""

import torch
from transformers import PreTrainedModel

from rlora.core.lora import matrices, split_experts
from rlora.core.peft_format import decode, matrices_by_name
from rlora.records import Adapter, RloraError


def merge(base: PreTrainedModel, adapter: Adapter, dtype: torch.dtype) -> float:
    """Replace every adapted matrix W of `base` by W + scale B A, computed in fp32 and rounded to `dtype`, in place.

    `base` is the pristine base in fp32. Returns the relative error that rounding adds to the update:
    ||rounded(W + scale B A) - rounded(W) - scale B A|| / ||scale B A||, Frobenius norms over all matrices. Raises
    RloraError if the base is not in fp32, or if the adapter does not fit it.
    """
    if base.dtype != torch.float32:
        raise RloraError(f"merge: the base is in {base.dtype}; load it in float32, otherwise weights are rounded twice")
    spec, tensors = decode(adapter.config, adapter.weights)
    adapted = matrices_by_name(matrix for matrix in matrices(base) if spec.rank_of(matrix))
    if {name for names in adapted for name in names} != tensors.keys():
        raise RloraError(
            f"adapter {adapter.name}: its matrices do not match {type(base).__name__}; use the base that the adapter "
            "was trained on"
        )
    lost = update = 0.0
    with torch.no_grad():
        for names, matrix in adapted.items():
            a, b = (tensors[name].float() for name in names)
            if len(matrix.shape) == 3:
                a, b = split_experts(a, b, matrix.shape[0])
            delta = spec.scale(matrix.key, spec.rank_of(matrix)) * (b @ a)
            merged, rounded = (matrix.weight + delta).to(dtype).float(), matrix.weight.to(dtype).float()
            lost += float((merged - rounded - delta).square().sum())
            matrix.weight.copy_(merged)
            update += float(delta.square().sum())
    relative_error = (lost / update) ** 0.5 if update else 0.0
    base.to(dtype)  # type: ignore[arg-type]  # transformers wraps Module.to
    return relative_error
