"""An adapter added into the weights of its base, for those who can't serve one: to export, never to train with."""

import torch
from transformers import PreTrainedModel

from rlora.core.lora import matrices, of_each_expert
from rlora.core.peft_format import by_names, decode
from rlora.records import Adapter, RloraError


def merge(base: PreTrainedModel, adapter: Adapter, dtype: torch.dtype) -> float:
    """W + scale B A in fp32, then rounded to `dtype`, for every matrix of `base` in place.

    `base` is the pristine base in fp32. Returns how far the merged update, rounded(W + scale B A) - rounded(W), is from
    the adapter's, as a share of ||scale B A|| over all matrices: what rounding takes of the update. Raises RloraError
    where the adapter does not fit the base.
    """
    if base.dtype != torch.float32:
        raise RloraError(f"merge: the base is in {base.dtype}; load it in float32, or its own rounding is added twice")
    spec, tensors = decode(adapter.config, adapter.weights)
    over = by_names(matrix for matrix in matrices(base) if spec.rank_of(matrix))
    if {name for names in over for name in names} != tensors.keys():
        raise RloraError(f"adapter {adapter.name}: its matrices are not those of {type(base).__name__}")
    lost = update = 0.0
    with torch.no_grad():
        for names, matrix in over.items():
            a, b = (tensors[name].float() for name in names)
            if len(matrix.shape) == 3:
                a, b = of_each_expert(a, b, matrix.shape[0])
            delta = spec.scale(matrix.key, spec.rank_of(matrix)) * (b @ a)
            merged, alone = (matrix.weight + delta).to(dtype).float(), matrix.weight.to(dtype).float()
            lost += float((merged - alone - delta).square().sum())
            matrix.weight.copy_(merged)
            update += float(delta.square().sum())
    share = (lost / update) ** 0.5 if update else 0.0
    base.to(dtype)  # type: ignore[arg-type]  # transformers wraps Module.to
    return share
