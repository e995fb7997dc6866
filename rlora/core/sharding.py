"""Shard the frozen base over ranks (FSDP2): each rank holds a part of every layer, and gathers a layer to run it."""

from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rlora.records import RloraError


def shard(body: nn.Module, device: torch.device) -> None:
    """Shard the frozen weights of `body.layers` over all ranks, one layer after the other; the shards are on `device`.

    A layer's weights are gathered before its forward and its backward pass and freed afterwards (FSDP2; Zhao et al.
    2023, arXiv:2304.11277), so all ranks must run the same passes. Every rank keeps full copies of the trained
    weights, the embeddings, the last norm and the output head: the head's weight is used outside of any forward pass
    that could gather it, and may be tied to the embeddings. These weights stay on their device.

    Raises RloraError if the model has no list of layers.
    """
    if not hasattr(body, "layers"):
        raise RloraError(f"learner.shard = true: {type(body).__name__} has no list of layers; unset learner.shard")
    ranks = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = cast(nn.ModuleList, body.layers)
    for layer in layers:
        fully_shard(layer, mesh=ranks)
    # The root prefetches the next layer while one runs; it shards no weights itself.
    fully_shard(body, mesh=ranks, ignored_params=set(body.parameters()))
