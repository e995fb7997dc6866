"""The learner: owns the adapter's fp32 masters and Adam; groups in, the next adapter version out."""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed
from torch import Tensor, nn

from rlora import machine, peft_format
from rlora.base import load_base, load_quantised
from rlora.batch import Microbatch, alone, idle, microbatches, shares
from rlora.config import Config, LearnerConfig
from rlora.lora import OFF, Spec
from rlora.loss import kl_k3, truncated_importance_loss
from rlora.policy import Policy
from rlora.records import WHOLE_FILES, Adapter, Canary, Group, RloraError, UpdateStats
from rlora.sharding import shard

_CANARY = 24  # tokens: one short prompt, and enough logprobs for a mean


class Learner:
    """A policy and its optimizer. `base` is where to load the frozen base from; `run` names the adapters."""

    def __init__(self, config: Config, base: str, run: str) -> None:
        self.config, self.base, self.run = config, base, run
        self.device = machine.device()
        dtype, quantise = machine.DTYPES[config.dtype], config.learner.quantise
        place = torch.device("cpu") if config.learner.shard else self.device  # `join` moves it, a layer at a time
        model = load_base(base, dtype, place) if quantise == "none" else load_quantised(base, dtype, quantise)
        learner = config.learner
        if learner.whole:
            self.policy = Policy(model, [], config.seed, learner.checkpointing)
        else:
            spec, start = first_adapter(learner)
            self.policy = Policy(model, [spec], config.seed, learner.checkpointing)
            if start is not None:
                peft_format.fill(self.policy.bank, 0, start)
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.parameters = [master_of(weight) for weight in self.trained]
        self.optimizer = torch.optim.Adam(self.parameters, lr=learner.lr, betas=learner.betas, eps=learner.eps)
        self.rank, self.ranks = 0, 1
        self.version = 0
        self.skipped_in_a_row = 0  # updates whose loss or gradient was not finite
        self.canary: Canary | None = None
        self.canary = self._canary()

    def join(self, address: str, rank: int, ranks: int) -> None:
        """Become one of `ranks` learners that share each update; the first listens at `address` (host:port)."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        host, _, port = address.rpartition(":")
        try:
            store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
                host, int(port), ranks, rank == 0, timeout=timedelta(minutes=2)
            )
            torch.distributed.init_process_group(  # Ray tells of a rank that died; one that is slow is waited for
                backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(days=1)
            )
            torch.distributed.all_reduce(torch.zeros(1, device=self.device))  # NCCL connects at its first use
        except RuntimeError as error:
            raise RloraError(f"learner {rank} of {ranks} could not meet the others at {address}: {error}") from error
        self.rank, self.ranks = rank, ranks
        if self.config.learner.shard:
            shard(self.policy.body, self.device)
            self.policy.to(self.device)  # what is not sharded

    def update(self, groups: Sequence[Group]) -> tuple[Adapter, UpdateStats]:
        """One step: the loss of `groups`, one Adam step on the adapter, and version + 1.

        Token losses are summed and divided once by the number of all completion tokens, those of groups without
        signal included. A non-finite loss or gradient leaves adapter and optimizer as they were; the version goes up
        all the same. Where several learners share the update, each is given all groups and computes its part; the
        gradients are added up, and all take the same step.
        """
        start = time.perf_counter()
        settings = self.config.learner
        total_tokens = sum(len(episode.completion_ids) for group in groups for episode in group.episodes)
        sums = torch.zeros(4, device=self.device)  # of this rank: loss, KL, truncated ratios, tokens
        self.optimizer.zero_grad()
        mine = shares(groups, self.ranks)[self.rank]
        batches = microbatches(mine, settings.microbatch_tokens, self.policy.base.dtype, self.device)
        for batch in self._in_step(batches) if settings.shard else batches:
            logprobs = self.policy.logprobs(batch, self.config.sampling.temperature)
            losses = truncated_importance_loss(
                logprobs, batch.behaviour_logprobs, batch.advantages, settings.importance_cap
            )
            loss = losses.sum() / total_tokens
            loss.backward()
            with torch.no_grad():
                kl = kl_k3(logprobs, batch.behaviour_logprobs).sum()
                truncated = (logprobs - batch.behaviour_logprobs > math.log(settings.importance_cap)).sum()
                sums += torch.stack([loss, kl, truncated, torch.full_like(loss, len(logprobs))])
        loss_sum, kl_sum, truncated_sum, tokens = self._over_ranks(sums).tolist()
        grad_norm = (
            torch.nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm) if tokens else torch.zeros(())
        )
        finite = math.isfinite(loss_sum) and bool(torch.isfinite(grad_norm))
        lr = scheduled_lr(self.config, self.version)
        if tokens and finite:
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = lr
            self.optimizer.step()
            self._round()
            self.canary = self._canary()
        self.version += 1
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        stats = UpdateStats(
            loss=loss_sum,
            grad_norm=float(grad_norm),
            lr=lr,
            kl_behaviour=kl_sum / tokens if tokens else None,
            ratio_truncated=truncated_sum / tokens if tokens else None,
            tokens=int(tokens),
            seconds=time.perf_counter() - start,
            skipped_in_a_row=self.skipped_in_a_row,
        )
        return self.adapter(), stats

    def _in_step(self, batches: Iterator[Microbatch]) -> Iterator[Microbatch]:
        """`batches`, then idle ones until no rank has any left: each pass of one rank needs the others' weights."""
        while True:
            batch = next(batches, None)
            left = torch.tensor(int(batch is not None), device=self.device)
            torch.distributed.all_reduce(left, torch.distributed.ReduceOp.MAX)
            if not left:
                return
            yield batch or idle(self.policy.base.dtype, self.device)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """Add up `sums` and the gradients over all ranks, in one message."""
        if self.ranks == 1:
            return sums
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in self.parameters
        ]
        flat = torch.cat([sums, *(gradient.flatten() for gradient in gradients)])
        torch.distributed.all_reduce(flat)
        sums, *parts = flat.split([len(sums), *(gradient.numel() for gradient in gradients)])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return sums

    def _round(self) -> None:
        """Let the policy have the masters' values, each in its dtype."""
        for weight, master in zip(self.trained, self.parameters, strict=True):
            if weight is not master:
                weight.data.copy_(master.data)

    def adapter(self) -> Adapter:
        """The current version, in PEFT's format; without an adapter all weights, in that of transformers."""
        if self.config.learner.whole:
            with tempfile.TemporaryDirectory() as saved:
                self.policy.base.save_pretrained(saved, max_shard_size="1000GB")
                config, weights = ((Path(saved) / name).read_bytes() for name in WHOLE_FILES)
            return Adapter(self.run, self.version, config, weights, whole=True, canary=self.canary)
        config, weights = peft_format.encode(self.policy.bank, 0, self.base)
        return Adapter(self.run, self.version, config, weights, canary=self.canary)

    @torch.no_grad()
    def _canary(self) -> Canary | None:
        """What the policy says of the same few random tokens each time.

        None where the context does not hold two, or where an adapter is over the head: vLLM can't apply that to the
        logprobs of a prompt.
        """
        count = min(_CANARY, self.config.max_model_len - 1)  # an engine samples one more
        if count < 2 or self.policy.head_factors:
            return None
        vocabulary = self.policy.base.config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0)).tolist()
        row = alone(tokens, self.policy.base.dtype, self.policy.base.device)
        logprobs = tuple(self.policy.logprobs(row).tolist())
        if self.canary:
            of_base = self.canary.base_logprobs
        else:
            of_base = tuple(self.policy.logprobs(replace(row, adapters=OFF)).tolist())
        return Canary(tuple(tokens), logprobs, of_base)

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
        self._round()
        self.canary = self._canary()
        self.version = int(tensors["version"])
        return self.adapter()


def master_of(weight: nn.Parameter) -> nn.Parameter:
    """What the optimizer steps in place of a weight that is trained: itself in fp32, else an fp32 copy.

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


def first_adapter(learner: LearnerConfig) -> tuple[Spec, dict[str, Tensor] | None]:
    """What a run starts with: the adapter the config asks for, and its tensors where it was saved before.

    Raises RloraError where `start_from` can't be read, or is of another rank or scale than the config says.
    """
    spec = Spec(learner.rank, learner.alpha, learner.rslora, learner.init, learner.targets, learner.head)
    if not learner.start_from:
        return spec, None
    for name in ("targets", "head", "init"):
        if getattr(learner, name) != getattr(LearnerConfig(), name):
            raise RloraError(
                f"learner.{name} = {getattr(learner, name)!r}: learner.start_from brings its own; leave it out"
            )
    try:
        saved, tensors = peft_format.decode(*peft_format.read(Path(learner.start_from)))
    except RloraError as error:
        raise RloraError(f"learner.start_from = {learner.start_from!r}: {error}") from error
    for field in ("rank", "alpha", "rslora"):
        ours, its = getattr(spec, field), getattr(saved, field)
        if ours != its:
            raise RloraError(
                f"learner.start_from = {learner.start_from!r}: its {field} is {its}, learner.{field} is {ours}; "
                f"set learner.{field} to {its}"
            )
    return saved, tensors


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
