"""Low-rank layers over every weight matrix of a frozen base."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rlora.records import RloraError


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x, with W frozen (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    A (r, d_in) and B (d_out, r) are fp32 masters. The forward pass uses them as the engine serves them: rounded to
    the dtype of the activations, with the scale folded into B. Gradients pass through the rounding to the masters.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        device = base.weight.device
        bound = 1 / math.sqrt(base.in_features)
        a_RI = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.base = base
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(a_RI.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))  # B = 0: the policy is the base
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype) * self.scale
        return y + linear(linear(x, a), b)


def add_lora(model: nn.Module, rank: int, alpha: float, seed: int) -> dict[str, LoRALinear]:
    """Freeze `model` and put a low-rank layer over each of its linear layers except the output head, in place.

    Returns the layers by their module name. Raises RloraError where there is no linear layer to adapt.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, leaf = name.rpartition(".")
            layers[name] = LoRALinear(module, rank, alpha, generator)
            setattr(model.get_submodule(parent), leaf, layers[name])
    if not layers:
        raise RloraError(f"model = {type(model).__name__}: it has no torch.nn.Linear layer to adapt; use another model")
    return layers
