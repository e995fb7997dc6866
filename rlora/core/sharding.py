"""The frozen base divided among ranks: each holds its part of every layer, and all of a layer while it runs."""

from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rlora.records import RloraError


def shard(body: nn.Module, device: torch.device) -> None:
    """Leave this rank its part of the frozen weights in each of `body.layers`, on `device`, one layer after the other.

    A layer's weights are gathered before its forward and its backward pass and let go after it (FSDP2; Zhao et al.
    2023, arXiv:2304.11277), so all ranks have to run the same passes. What is trained stays whole on each rank; so do
    embeddings, output head and the last norm: the head's weight is used outside of any forward pass that could gather
    it, and may be the embeddings' too. Their device does not change.

    Raises RloraError where the model has no list of layers.
    """
    if not hasattr(body, "layers"):
        raise RloraError(f"learner.shard = true: {type(body).__name__} has no list of layers; leave it off")
    ranks = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = cast(nn.ModuleList, body.layers)
    for layer in layers:
        fully_shard(layer, mesh=ranks)
    # the root fetches the next layer while one runs; it holds no weights of its own
    fully_shard(body, mesh=ranks, ignored_params=set(body.parameters()))
