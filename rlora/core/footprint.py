"""Memory of a learner's forward and backward pass, counted on torch's meta device.

A meta tensor has a shape but no data. The code that trains therefore runs there in seconds, for any model and the
largest row, while the bytes that its tensors would hold at a time are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from rlora import cards
from rlora.core.batch import Microbatch, Sample, microbatches
from rlora.core.flash import Segments, check_heads
from rlora.core.logprobs import LOGITS
from rlora.core.lora import matrices
from rlora.core.loss import Tokens
from rlora.core.policy import Policies
from rlora.core.setup import Setup
from rlora.device import DTYPES, Live, release, room_of_learner
from rlora.model.base import META, meta_model
from rlora.records import Kept, RloraError
from rlora.settings import Config, LearnerConfig

CPU_TOKENS = 2048  # tokens per row: above a thousand, larger rows are no faster
GPU_TOKENS = (16384, 8192, 4096, 2048)  # tokens per row: with larger rows a GPU waits less for Python between kernels
FRAGMENTED = 1.1  # bytes that the allocator reserves for rows, per byte that they hold
_POLICY, _CRITIC = "footprint", "footprint/critic"
_QUANTISED = {"none": 1.0, "int8": 0.5, "nf4": 0.28}  # size relative to 16 bits, scales included


class Rows(NamedTuple):
    """What determines the memory of a learner's activations."""

    tokens: int  # maximum number of tokens per packed row
    checkpointing: bool  # whether the backward pass recomputes activations


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory that a learner with one policy needs, by part."""

    base: int  # the frozen weights
    adapter: int  # fp32 master weights, gradients and Adam's moments of the trained weights
    activations: int  # peak of a forward and backward pass over the largest row, without logits
    head: int  # the logits that are in memory at the same time

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the row."""
        return self.base + self.adapter

    @property
    def per_row(self) -> int:
        """Bytes that are held only while a row is computed."""
        return self.activations + self.head

    @property
    def on_gpu(self) -> int:
        """Bytes of GPU memory, including the fragmentation of torch's allocator."""
        return int(self.fixed + FRAGMENTED * self.per_row)


def footprint(config: Config, base: PreTrainedConfig, rows: Rows, on_gpu: bool) -> Footprint:
    """Count the memory of a learner with one policy, on a GPU or CPU. `base` is the config of the base model."""
    model, learner = meta_model(base, DTYPES[config.dtype]), config.learner
    base_bytes, layers = _base_bytes(model, learner), list(getattr(model.base_model, "layers", ()))
    row = largest_row(config, rows.tokens, META, on_gpu)
    count = partial(_activations, config, base, row, rows.checkpointing)
    if len(layers) > 3 and _are_equal(layers):  # each layer after the second adds the same
        activations = (two := count(2)) + (len(layers) - 2) * (count(3) - two)
    else:
        activations = count(None)
    activations += bytes_of(row.support.ids) + bytes_of(row.support.rows) if row.support else 0
    by_autograd = config.algorithm.entropy > 0 or learner.full_finetuning or learner.head  # keeps fp32 logits
    logits = min(len(row.targets), max(1, LOGITS["cuda" if on_gpu else "cpu"] // _vocabulary(base))) * _vocabulary(base)
    return Footprint(
        base=base_bytes,
        adapter=adapter_bytes(config, base),
        activations=activations,
        head=logits * (2 * model.dtype.itemsize + 4 * 4 if by_autograd else model.dtype.itemsize),
    )


def _activations(
    config: Config, base: PreTrainedConfig, row: Microbatch, checkpointing: bool, depth: int | None
) -> int:
    """Count the peak of a pass over `row` through the first `depth` layers, without gradients of trained weights."""
    model = meta_model(base, DTYPES[config.dtype])
    if depth:
        model.base_model.layers = cast(nn.ModuleList, model.base_model.layers)[:depth]
    policies = Policies(model, checkpointing, config.learner.full_finetuning)
    trained = _add_policies(policies, config)
    with Live() as live:
        forward_backward(policies, _POLICY, row, entropies=config.algorithm.entropy > 0)
    return int(live.peak) - sum(bytes_of(weight.grad) for weight in trained if weight.grad is not None)


def _are_equal(layers: Sequence[nn.Module]) -> bool:
    """Return whether layers have the same type, kind of attention, and shapes of parameters."""
    kinds = {
        (
            type(layer),
            getattr(layer, "attention_type", ""),
            *((name, weight.shape) for name, weight in layer.named_parameters()),
        )
        for layer in layers
    }
    return len(kinds) == 1


def adapter_bytes(config: Config, base: PreTrainedConfig) -> int:
    """Count `Footprint.adapter` only: the bytes that a learner needs for each further policy with its critic."""
    policies = Policies(meta_model(base, DTYPES[config.dtype]), full_weights=config.learner.full_finetuning)
    return _training_bytes(_add_policies(policies, config), config)


def _add_policies(policies: Policies, config: Config) -> list[Tensor]:
    """Add a policy and its critic. Return the trained weights of both."""
    if config.learner.full_finetuning:
        return list(policies.base.parameters())
    setup, trained = _setup(config), list[Tensor]()
    for name, spec in ((_POLICY, setup.spec), (_CRITIC, setup.critic_spec)):
        if spec:
            policies.add(name, spec, seed=0, values=name == _CRITIC)
            trained += policies.parameters_of(name).values()
    return trained


def _training_bytes(weights: Sequence[Tensor], config: Config) -> int:
    """Count 4 bytes per weight for the gradient, 8 for Adam's moments, 4 for the master unless the base has it."""
    masters = 0 if config.learner.full_finetuning and config.dtype == "float32" else 4
    return sum(int(weight.numel()) for weight in weights) * (masters + 4 + 8)


def rows_for(config: Config, base: str, device: torch.device) -> Rows:
    """Return the rows of a learner on `device`: resolve `learner.microbatch_tokens = 0` and
    `learner.checkpointing = "auto"`. `base` is the directory or hub id of the base model.

    On a GPU the rows are the largest that fit into the learner's share of the GPU, preferably without checkpointing.
    Raises RloraError if no row fits (the message says which would), or if the GPU kernels do not support the base.
    """
    if device.type != "cuda":
        return cpu_rows(config)
    model = AutoConfig.from_pretrained(base, trust_remote_code=False)
    check_heads(model)
    gpus = config.learner.gpus
    budget, part = room_of_learner(1.0 if gpus == "auto" else gpus)
    return fitting_rows(config, model, budget, part)


def cpu_rows(config: Config) -> Rows:
    """Return the rows on a CPU: 2048 tokens by default. `learner.checkpointing = "auto"` is without checkpointing."""
    return Rows(config.learner.microbatch_tokens or CPU_TOKENS, config.learner.checkpointing is True)


def fitting_rows(config: Config, base: PreTrainedConfig, budget: int, part: str) -> Rows:
    """Return the largest rows that fit into `budget` bytes of a GPU. `part` describes the budget in error messages.

    Only a row of the longest prompt and completion is counted, without and with checkpointing. The activations of
    larger rows are extrapolated in proportion to their tokens. Raises RloraError if no row fits.
    """
    tokens, checkpointing = config.learner.microbatch_tokens, config.learner.checkpointing
    shortest = config.max_model_len
    sizes = [tokens] if tokens else [*(size for size in GPU_TOKENS if size > shortest), shortest]
    for recompute in [False, True] if checkpointing == "auto" else [checkpointing]:
        memory = footprint(config, base, Rows(shortest, recompute), on_gpu=True)
        free = (budget - memory.fixed) / FRAGMENTED - memory.head
        fits = max(0, int(free * shortest / memory.activations))
        for size in sizes:
            if max(size, shortest) <= fits:
                return Rows(size, recompute)
    if tokens and checkpointing != "auto" and memory.fixed <= budget:
        return Rows(tokens, checkpointing)  # the user chose both
    gib = cards.GIB
    fix = (
        f"rows of about {fits} tokens would fit: lower sampling.max_tokens or sampling.max_prompt_tokens, since a row "
        "holds at least one prompt with one completion"
        if fits
        else "use a smaller model, a larger GPU, learner.quantise, or learner.shard with learner.replicas = 2 or more"
    )
    raise RloraError(
        f"GPU: the learner needs {memory.on_gpu / gib:.1f} GiB and has {budget / gib:.1f}, {part}: "
        f"{memory.base / gib:.1f} for the base, {memory.adapter / gib:.2f} for adapter and Adam, "
        f"{FRAGMENTED * memory.per_row / gib:.1f} for a row of {shortest} tokens"
        f"{' with checkpointing' * bool(checkpointing)}; {fix}"
    )


def largest_row(config: Config, tokens: int, device: torch.device, on_gpu: bool) -> Microbatch:
    """Make the largest row of up to `tokens` tokens, or of one sample: the longest prompts, each with the longest
    completions. `on_gpu` gives a row on the meta device the layout of a GPU."""
    completion, prompt = config.sampling.max_tokens, config.sampling.max_prompt_tokens
    groups, remaining = list[int](), max(tokens, config.max_model_len)  # completions per group, and tokens
    while (count := min(config.group_size, (remaining - prompt) // completion)) > 0:
        groups.append(count)
        remaining -= prompt + count * completion
    zeros, predictors = torch.zeros(completion), tuple(range(prompt - 1, prompt - 1 + completion))
    top_k = config.sampling.top_k  # without it the number of kept tokens is unknown
    kept = Kept(bytes(4 * completion * top_k), (top_k,) * completion) if top_k else None
    tokens_of_sample = Tokens(zeros, zeros, zeros)
    sample = Sample((0,) * prompt, (0,) * completion, predictors, (0,) * completion, tokens_of_sample, kept=kept)
    limit = 2 * max(tokens, config.max_model_len)  # large enough for a single row
    (row,) = microbatches([[sample] * count for count in groups], limit, DTYPES[config.dtype], device)
    if on_gpu and device == META:  # on other devices `microbatches` chooses the layout
        lengths = [(prompt, [completion - 1] * count) for count in groups]
        row = replace(row, layout=Segments.from_lengths(lengths, device))
    return row


def rehearse(policies: Policies, config: Config, tokens: int, device: torch.device) -> int:
    """Compute the largest row once, forward and backward, and release unused memory. Return the peak bytes that torch
    reserved on the GPU; 0 on a CPU."""
    if not policies.full_weights:
        policies.add(_POLICY, _setup(config).spec, seed=0)
    try:
        row = largest_row(config, tokens, device, on_gpu=device.type == "cuda")
        forward_backward(policies, _POLICY, row, config.algorithm.entropy > 0)
    finally:
        for weight in policies.parameters_of(_POLICY).values():
            weight.grad = None
        policies.remove(_POLICY)
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
    release()
    return peak


def forward_backward(policies: Policies, policy: str, row: Microbatch, entropies: bool = False) -> None:
    """Run a forward and backward pass over `row`. The loss is a dummy: the sum of the logprobs, plus the entropies if
    `entropies` is True. Gradients accumulate in `.grad` of the policy's parameters."""
    outputs = policies.outputs(row, policy, entropies=entropies)
    (outputs.logprobs if outputs.entropies is None else outputs.logprobs + outputs.entropies).sum().backward()


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _setup(config: Config) -> Setup:
    return Setup(config.learner, config.algorithm, config.critic)


def _vocabulary(base: PreTrainedConfig) -> int:
    return int(base.get_text_config().vocab_size)


def _base_bytes(model: PreTrainedModel, learner: LearnerConfig) -> int:
    """Count the bytes of the base in a learner. Embeddings and head are neither quantised nor sharded."""
    total = sum(map(bytes_of, [*model.parameters(), *model.buffers()]))
    inner = sum(bytes_of(matrix.weight) for matrix in matrices(model) if matrix.kind != "head")
    share = _QUANTISED[learner.quantise] / (learner.replicas if learner.shard else 1)
    return int(total - inner + inner * share)
