"""Adam on the fp32 master weights of a policy."""

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
    max_grad_norm: float = 0.0  # larger gradients are scaled down to this norm; 0: no clipping


@dataclass(frozen=True)
class StepStats:
    """The outcome of one optimizer step."""

    grad_norm: float  # before clipping; NaN if not finite, 0 without a gradient
    stepped: bool  # False without a finite gradient: weights and moments are unchanged


class Optimizer:
    """Adam over a policy's weights of any dtype. `weights` are keyed by matrix and factor, or by parameter name."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.weights = dict(weights)
        self._hooks: list[RemovableHandle] = []
        self.masters = {name: self._master_of(weight) for name, weight in weights.items()}
        self.adam = torch.optim.AdamW(self.masters.values(), lr=0.0)

    def close(self) -> None:
        """Remove the hooks from the weights, so that another optimizer can step them."""
        for hook in self._hooks:
            hook.remove()

    def zero_grad(self) -> None:
        self.adam.zero_grad()

    def all_reduce(self) -> None:
        """Sum the gradients over all ranks in one message. If no rank has a gradient, the gradients stay None."""
        masters = list(self.masters.values())
        gradients = [torch.zeros_like(master) if master.grad is None else master.grad for master in masters]
        has_gradient = gradients[0].new_tensor([float(any(master.grad is not None for master in masters))])
        flat = torch.cat([has_gradient, *(gradient.flatten() for gradient in gradients)])
        torch.distributed.all_reduce(flat)
        has_gradient, *parts = flat.split([1, *(master.numel() for master in masters)])
        for master, part in zip(masters, parts, strict=True):
            master.grad = part.view_as(master) if has_gradient else None

    def step(self, settings: Adam) -> StepStats:
        """Step along the gradient and clear the gradient. A gradient that is not finite changes no weight."""
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
        """Return master weights and Adam's moments on the CPU: `<name>.master` and `<name>.adam.<moment>`."""
        tensors = {}
        for name, master in self.masters.items():
            tensors[f"{name}.master"] = master.detach().cpu()
            for moment, value in self.adam.state[master].items():
                tensors[f"{name}.adam.{moment}"] = value.cpu()
        return tensors

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore from `state()`. Raises RloraError, changing nothing, if the tensors do not fit the weights."""
        shapes = {f"{name}.master": master.shape for name, master in self.masters.items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items() if name.endswith(".master")}:
            raise RloraError("resume: the saved state is of a different model or rank; use the config of the saved run")
        for name, master in self.masters.items():
            master.data.copy_(tensors[f"{name}.master"])
            self.adam.state.pop(master, None)  # the state has no moments if no step was taken
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                if (value := tensors.get(f"{name}.adam.{moment}")) is not None:
                    self.adam.state[master][moment] = value.clone() if moment == "step" else value.to(master.device)
        self._round()

    def _round(self) -> None:
        """Copy the master weights into the weights, rounding to each weight's dtype."""
        for name, weight in self.weights.items():
            if weight is not (master := self.masters[name]):
                weight.data.copy_(master.data)

    def _master_of(self, weight: nn.Parameter) -> nn.Parameter:
        """Return the tensor that Adam steps for a trained weight: the weight itself if it is fp32, else an fp32 copy.

        16 bits would round many steps to nothing; the fp32 copy keeps these steps. The copy also accumulates the
        gradients of all microbatches in fp32.
        """
        if weight.dtype == torch.float32:
            return weight
        master = nn.Parameter(weight.detach().float())

        def accumulate(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient, weight.grad = weight.grad.float(), None
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

        self._hooks.append(weight.register_post_accumulate_grad_hook(accumulate))
        return master


def scheduled_lr(learner: LearnerConfig, lr: float, step: int, steps: int) -> float:
    """Return the learning rate at `step` (0-based) of `steps`: `lr` times the factor of `learner.lr_schedule`."""
    progress = step / steps
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return lr * (learner.lr_floor + (1 - learner.lr_floor) * decay[learner.lr_schedule])
