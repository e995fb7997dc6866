"""The learner: owns the adapter's fp32 masters and Adam; groups in, the next adapter version out."""

import json
import math
import time
from collections.abc import Sequence

import safetensors.torch
import torch

from rlora import machine
from rlora.base import load_base
from rlora.batch import microbatches
from rlora.config import Config
from rlora.loss import kl_k3, truncated_importance_loss
from rlora.policy import Policy
from rlora.records import Adapter, Group, RloraError, UpdateStats


class Learner:
    """A policy and its optimizer. `base` is where to load the frozen base from; `run` names the adapters."""

    def __init__(self, config: Config, base: str, run: str) -> None:
        self.config, self.base, self.run = config, base, run
        self.device = machine.device()
        model = load_base(base, machine.DTYPES[config.dtype])
        self.policy = Policy(model, config.learner.rank, config.learner.alpha, config.seed)
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        learner = config.learner
        self.optimizer = torch.optim.Adam(self.parameters, lr=learner.lr, betas=learner.betas, eps=learner.eps)
        self.version = 0
        self.skipped_in_a_row = 0  # updates whose loss or gradient was not finite

    def update(self, groups: Sequence[Group]) -> tuple[Adapter, UpdateStats]:
        """One step: the loss of `groups`, one Adam step on the adapter, and version + 1.

        Token losses are summed and divided once by the number of all completion tokens, those of groups without
        signal included. A non-finite loss or gradient leaves adapter and optimizer as they were; the version goes up
        all the same.
        """
        start = time.perf_counter()
        settings = self.config.learner
        total_tokens = sum(len(episode.completion_ids) for group in groups for episode in group.episodes)
        loss_sum = kl_sum = truncated = torch.zeros((), device=self.device)
        tokens = 0
        self.optimizer.zero_grad()
        for batch in microbatches(groups, settings.microbatch_tokens, self.policy.base.dtype, self.device):
            logprobs = self.policy.logprobs(batch, self.config.sampling.temperature)
            losses = truncated_importance_loss(
                logprobs, batch.behaviour_logprobs, batch.advantages, settings.importance_cap
            )
            loss = losses.sum() / total_tokens
            loss.backward()
            with torch.no_grad():
                loss_sum = loss_sum + loss
                kl_sum = kl_sum + kl_k3(logprobs, batch.behaviour_logprobs).sum()
                truncated = truncated + (logprobs - batch.behaviour_logprobs > math.log(settings.importance_cap)).sum()
            tokens += len(logprobs)
        grad_norm = (
            torch.nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm) if tokens else torch.zeros(())
        )
        finite = bool(torch.isfinite(loss_sum) and torch.isfinite(grad_norm))
        lr = scheduled_lr(self.config, self.version)
        if tokens and finite:
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = lr
            self.optimizer.step()
        self.version += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        stats = UpdateStats(
            loss=float(loss_sum),
            grad_norm=float(grad_norm),
            lr=lr,
            kl_behaviour=float(kl_sum) / tokens if tokens else None,
            ratio_truncated=float(truncated) / tokens if tokens else None,
            tokens=tokens,
            seconds=time.perf_counter() - start,
            skipped_in_a_row=self.skipped_in_a_row,
        )
        return self.adapter(), stats

    def adapter(self) -> Adapter:
        """The current version, in PEFT's format."""
        tensors = {}
        for name, layer in self.policy.layers.items():
            for matrix in ("lora_A", "lora_B"):
                tensors[f"base_model.model.{name}.{matrix}.weight"] = getattr(layer, matrix).detach().cpu().contiguous()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.config.learner.rank,
            "lora_alpha": self.config.learner.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name in self.policy.layers}),
            "inference_mode": True,
        }
        weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
        return Adapter(self.run, self.version, json.dumps(config, indent=2).encode(), weights)

    def state(self) -> bytes:
        """All that `resume` needs: the version, the masters and Adam's moments, in safetensors format."""
        tensors = {"version": torch.tensor(self.version)}
        for index, parameter in enumerate(self.parameters):
            tensors[f"{index}.master"] = parameter.detach().cpu()
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"{index}.adam.{name}"] = value.cpu()
        return safetensors.torch.save(tensors)

    def resume(self, state: bytes) -> Adapter:
        """Go on from `state`; returns its adapter. Raises RloraError where it is of another base, rank or target."""
        tensors = safetensors.torch.load(state)
        shapes = {f"{index}.master": parameter.shape for index, parameter in enumerate(self.parameters)}
        if shapes != {name: tensor.shape for name, tensor in tensors.items() if name.endswith(".master")}:
            raise RloraError("resume: the saved state is of another model or rank; resume with the config of the run")
        for index, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"{index}.master"])
            for name in ("step", "exp_avg", "exp_avg_sq"):
                if (moment := tensors.get(f"{index}.adam.{name}")) is not None:
                    self.optimizer.state[parameter][name] = moment if name == "step" else moment.to(self.device)
        self.version = int(tensors["version"])
        return self.adapter()


def scheduled_lr(config: Config, step: int) -> float:
    """The learning rate of a step."""
    decay = 1 - step / config.steps if config.learner.lr_schedule == "linear" else 1.0
    return config.learner.lr * decay


def refuse_to_go_on(config: Config, update: UpdateStats) -> None:
    """Raise RloraError after `learner.max_bad_updates` skipped updates in a row."""
    if update.skipped_in_a_row >= config.learner.max_bad_updates:
        raise RloraError(
            f"learner: {update.skipped_in_a_row} updates in a row had a non-finite loss or gradient ({update}); the "
            'adapter is as it was before them. Lower learner.lr or use dtype = "float32"'
        )
