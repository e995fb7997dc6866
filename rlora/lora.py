"""Low-rank layers over every weight matrix of a frozen base."""

import math
from typing import Any

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
        if not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype) * self.scale
        return _LowRank.apply(x, self.base.weight, self.base.bias, a, b)  # type: ignore[no-any-return, no-untyped-call]


class _LowRank(torch.autograd.Function):
    """y = W x + b A x, in place: the thin product is added to W x as it is made, and so is its part of x's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        h = flat @ a.mT  # (tokens, r)
        ctx.save_for_backward(flat, h, weight, a, b)
        y = linear(flat, weight, bias).addmm_(h, b.mT)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, weight, a, b = ctx.saved_tensors
        g = grad.flatten(0, -2)
        g_h = g @ b
        g_x = (g @ weight).addmm_(g_h, a).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return g_x, None, None, g_h.mT @ x, g.mT @ h


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
