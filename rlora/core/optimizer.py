"""Adam on fp32 masters of what is trained; the policy and the critic each have a learning rate of their own."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rlora.records import RloraError
from rlora.settings import Config, LearnerConfig


class Optimizer:
    """Steps the policy's weights and the critic's, whatever their dtype; clips the gradient of each by itself."""

    def __init__(self, policy: Sequence[nn.Parameter], critic: Sequence[nn.Parameter], config: LearnerConfig) -> None:
        self.weights = [*policy, *critic]
        self.masters = [_master_of(weight) for weight in self.weights]
        of_policy, of_critic = self.masters[: len(policy)], self.masters[len(policy) :]
        groups = [{"params": masters} for masters in (of_policy, of_critic) if masters]
        self.adam = torch.optim.Adam(groups, lr=0.0, betas=config.betas, eps=config.eps)
        self.max_grad_norm = config.max_grad_norm

    def zero_grad(self) -> None:
        self.adam.zero_grad()

    def add_over_ranks(self, sums: Tensor) -> Tensor:
        """Add up `sums` and the gradients over all ranks, in one message."""
        gradients = [torch.zeros_like(master) if master.grad is None else master.grad for master in self.masters]
        flat = torch.cat([sums, *(gradient.flatten() for gradient in gradients)])
        torch.distributed.all_reduce(flat)
        sums, *parts = flat.split([len(sums), *(gradient.numel() for gradient in gradients)])
        for master, part in zip(self.masters, parts, strict=True):
            master.grad = part.view_as(master)
        return sums

    def step(self, *lrs: float) -> float:
        """A step at the policy's learning rate, and the critic's where there is one; returns the norm of the policy's
        gradient. Where a gradient is not finite it steps nothing and returns NaN."""
        norms = [
            float(nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm)) for group in self.adam.param_groups
        ]
        if not math.isfinite(sum(norms)):
            return math.nan
        for group, lr in zip(self.adam.param_groups, lrs, strict=True):
            group["lr"] = lr
        self.adam.step()
        self._round()
        return norms[0]

    def state(self) -> dict[str, Tensor]:
        """The masters and Adam's moments, on the CPU."""
        tensors = {}
        for index, master in enumerate(self.masters):
            tensors[f"{index}.master"] = master.detach().cpu()
            for name, value in self.adam.state[master].items():
                tensors[f"{index}.adam.{name}"] = value.cpu()
        return tensors

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them back. Raises RloraError where they are of other shapes, with nothing changed."""
        shapes = {f"{index}.master": master.shape for index, master in enumerate(self.masters)}
        if shapes != {name: tensor.shape for name, tensor in tensors.items() if name.endswith(".master")}:
            raise RloraError("resume: the saved state is of another model or rank; resume with the config of the run")
        for index, master in enumerate(self.masters):
            master.data.copy_(tensors[f"{index}.master"])
            self.adam.state.pop(master, None)  # before the first step there are no moments
            for name in ("step", "exp_avg", "exp_avg_sq"):
                if (moment := tensors.get(f"{index}.adam.{name}")) is not None:
                    self.adam.state[master][name] = moment if name == "step" else moment.to(master.device)
        self._round()

    def _round(self) -> None:
        """Let the weights have the masters' values, each in its dtype."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight is not master:
                weight.data.copy_(master.data)


def scheduled_lr(config: Config, lr: float, step: int) -> float:
    """The learning rate of a step."""
    learner, done = config.learner, step / config.steps
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[learner.lr_schedule]
    return lr * (learner.lr_floor + (1 - learner.lr_floor) * left)


def auto_lr(config: Config, base: PreTrainedConfig) -> float:
    """What `learner.lr = "auto"` is: 5e-5 (2000 / hidden size)^p, ten times that for an adapter; p is 0.781 for Llama
    and 0.0775 for Qwen ("LoRA Without Regret", Thinking Machines 2025). Fitted on supervised runs; other models are
    taken for Llamas."""
    power = 0.0775 if "qwen" in base.model_type else 0.781
    lr = 5e-5 if config.learner.whole else 5e-4
    return float(lr * (2000 / base.get_text_config().hidden_size) ** power)


def _master_of(weight: nn.Parameter) -> nn.Parameter:
    """What Adam steps in place of a weight that is trained: itself in fp32, else an fp32 copy.

    A step is often smaller than 16 bits can tell from nothing; the copy keeps it. It also gathers the gradients, and
    adds those of all microbatches up in fp32.
    """
    if weight.dtype == torch.float32:
        return weight
    master = nn.Parameter(weight.detach().float())

    def gather(weight: Tensor) -> None:
        assert weight.grad is not None
        gradient, weight.grad = weight.grad.float(), None
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    weight.register_post_accumulate_grad_hook(gather)
    return master
