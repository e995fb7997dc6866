"""Adam on fp32 masters of one policy's weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlora.records import RloraError
from rlora.settings import LearnerConfig


@dataclass(frozen=True)
class Adam:
    """The settings of one step (Kingma and Ba 2014, arXiv:1412.6980; weight decay is decoupled, arXiv:1711.05101)."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0  # the gradient is scaled down to this norm where it is longer; 0: never


@dataclass(frozen=True)
class StepStats:
    """What one step of the optimizer did."""

    grad_norm: float  # before the gradient was scaled down; NaN where it was not finite
    stepped: bool  # not without a finite gradient: then weights and moments are as they were


class Optimizer:
    """Steps a policy's weights, whatever their dtype. `weights` are by matrix and factor."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.weights = dict(weights)
        self._hooks: list[RemovableHandle] = []
        self.masters = {name: self._master_of(weight) for name, weight in weights.items()}
        self.adam = torch.optim.AdamW(self.masters.values(), lr=0.0)

    def close(self) -> None:
        """Let go of the weights: another may step them."""
        for hook in self._hooks:
            hook.remove()

    def zero_grad(self) -> None:
        self.adam.zero_grad()

    def add_over_ranks(self) -> None:
        """Add up the gradients over all ranks, in one message. Where no rank has one, none has one after."""
        masters = list(self.masters.values())
        gradients = [torch.zeros_like(master) if master.grad is None else master.grad for master in masters]
        some = gradients[0].new_tensor([float(any(master.grad is not None for master in masters))])
        flat = torch.cat([some, *(gradient.flatten() for gradient in gradients)])
        torch.distributed.all_reduce(flat)
        some, *parts = flat.split([1, *(master.numel() for master in masters)])
        for master, part in zip(masters, parts, strict=True):
            master.grad = part.view_as(master) if some else None

    def step(self, settings: Adam) -> StepStats:
        """A step along the gradient, which is gone then. One that is not finite steps nothing."""
        masters = [master for master in self.masters.values() if master.grad is not None]
        if not masters:
            return StepStats(0.0, stepped=False)
        norm = float(nn.utils.clip_grad_norm_(masters, settings.max_grad_norm or math.inf))
        if math.isfinite(norm):
            (group,) = self.adam.param_groups
            group |= {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}
            self.adam.step()
            self._round()
        self.zero_grad()
        return StepStats(norm if math.isfinite(norm) else math.nan, stepped=math.isfinite(norm))

    def state(self) -> dict[str, Tensor]:
        """The masters and Adam's moments, on the CPU, by matrix and factor."""
        tensors = {}
        for name, master in self.masters.items():
            tensors[f"{name}.master"] = master.detach().cpu()
            for moment, value in self.adam.state[master].items():
                tensors[f"{name}.adam.{moment}"] = value.cpu()
        return tensors

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them back. Raises RloraError where they are of other weights, with nothing changed."""
        shapes = {f"{name}.master": master.shape for name, master in self.masters.items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items() if name.endswith(".master")}:
            raise RloraError("resume: the saved state is of another model or rank; resume with the config of the run")
        for name, master in self.masters.items():
            master.data.copy_(tensors[f"{name}.master"])
            self.adam.state.pop(master, None)  # before the first step there are no moments
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                if (value := tensors.get(f"{name}.adam.{moment}")) is not None:
                    self.adam.state[master][moment] = value.clone() if moment == "step" else value.to(master.device)
        self._round()

    def _round(self) -> None:
        """Let the weights have the masters' values, each in its dtype."""
        for name, weight in self.weights.items():
            if weight is not (master := self.masters[name]):
                weight.data.copy_(master.data)

    def _master_of(self, weight: nn.Parameter) -> nn.Parameter:
        """What Adam steps in place of a weight that is trained: itself in fp32, else an fp32 copy.

        A step is often smaller than 16 bits can tell from nothing; the copy keeps it. It also gathers the gradients,
        and adds those of all microbatches up in fp32.
        """
        if weight.dtype == torch.float32:
            return weight
        master = nn.Parameter(weight.detach().float())

        def gather(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient, weight.grad = weight.grad.float(), None
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

        self._hooks.append(weight.register_post_accumulate_grad_hook(gather))
        return master


def scheduled_lr(learner: LearnerConfig, lr: float, step: int, steps: int) -> float:
    """The learning rate of a step of `steps`."""
    done = step / steps
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[learner.lr_schedule]
    return lr * (learner.lr_floor + (1 - learner.lr_floor) * left)
