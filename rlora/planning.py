"""Estimates a run's memory, and the duration of a step, before anything starts.

Memory is counted (`core.footprint`). Durations are computed from a GPU's published speed, at typical utilization.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rlora import cards
from rlora.cards import GIB, LearnerMemory
from rlora.core.footprint import FRAGMENTED, Footprint, Rows, bytes_of, cpu_rows, fitting_rows, footprint
from rlora.core.lora import matrices
from rlora.core.objectives import objective_of
from rlora.device import DTYPES
from rlora.machine import cores
from rlora.model.base import kv_bytes_per_token, meta_model, read_config
from rlora.records import RloraError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from rlora.settings import Config

_LEARNER, _SAMPLER = 0.35, 0.6  # utilization: of peak FLOP/s by an update, of peak bandwidth by decoding
_STEP = 0.008  # seconds of CPU work per engine step: vLLM's scheduler and Python
_HEAP = (0.1, 0.23 * GIB)  # overhead of glibc's heap, as measured: share of the rows' bytes, and fixed bytes
_PROCESS = GIB  # of a process on CPU: Python, torch, vLLM
_MEAN_LENGTH = 0.5  # assumed mean length of completions, as a share of sampling.max_tokens


class Kind(NamedTuple):
    """Published specifications of a kind of GPU."""

    memory: float  # GiB visible to torch
    flops: float  # peak FLOP/s in bf16, dense
    bandwidth: float  # peak bytes/s


KINDS = {
    "b200-180": Kind(178.4, 2250e12, 8.0e12),
    "h200-141": Kind(139.8, 989e12, 4.8e12),
    "h100-80": Kind(79.1, 989e12, 3.35e12),
    "a100-80": Kind(79.1, 312e12, 2.0e12),
    "a100-40": Kind(39.4, 312e12, 1.55e12),
    "l40s-48": Kind(44.4, 362e12, 0.86e12),
    "a10g-24": Kind(22.0, 70e12, 0.6e12),
    "l4-24": Kind(22.0, 121e12, 0.3e12),
    "rtx5090-32": Kind(31.3, 210e12, 1.79e12),
    "rtx4090-24": Kind(23.5, 165e12, 1.0e12),
    "rtx3090-24": Kind(23.6, 71e12, 0.94e12),
}


@dataclass(frozen=True)
class Plan:
    """Memory of a learner and an engine in bytes, and duration of a step. `faults` lists what does not fit.

    In a run without engines `weights`, `kv_cache` and `overhead` are 0.
    """

    device: str  # name of the GPU or the CPU
    total: int  # bytes of the GPU's memory, or of RAM
    on_gpu: bool
    shared: bool  # learner and engine share one GPU, or RAM
    learner: Footprint
    rows: Rows
    weights: int  # bytes of the engine's base
    kv_cache: int  # bytes
    kv_token: int  # bytes of one token's keys and values
    context: int  # maximum tokens of prompt and completion
    overhead: int  # bytes that an engine takes in addition to weights and KV cache
    seconds: dict[str, float] = field(default_factory=dict)  # of a step, by phase
    faults: tuple[str, ...] = ()

    @property
    def slack(self) -> int:
        """Bytes of allocator overhead: fragmentation, and the CUDA context or glibc's heap."""
        share, fixed = (FRAGMENTED - 1, cards.CONTEXT) if self.on_gpu else _HEAP
        return int(share * self.learner.per_row + fixed)

    @property
    def used(self) -> int:
        """Bytes used on the shared GPU, on the fuller of two GPUs, or in RAM."""
        learner = self.learner.fixed + self.learner.per_row + self.slack
        engine = self.weights + self.overhead + self.kv_cache
        return learner + engine if self.shared else max(learner, engine)

    @property
    def sequences(self) -> int:
        """Number of sequences of maximum length that fit in the KV cache."""
        return self.kv_cache // (self.kv_token * self.context)

    @property
    def lines(self) -> list[tuple[str, str, str]]:
        """Rows of a table of the memory: learner or engine, the part, and the size of the part as text."""
        rows = f"activations, rows of {max(self.rows.tokens, self.context):,} tokens"
        rows += ", checkpointing" * self.rows.checkpointing
        process = "activations, CUDA context and graphs" if self.on_gpu else "Python, torch, vLLM"
        cache = f"KV cache: {self.kv_cache // self.kv_token:,} tokens, {self.sequences} sequences of maximum length"
        learner = [
            ("learner", "frozen base", gib(self.learner.base)),
            ("learner", "adapter, its gradient, Adam", gib(self.learner.adapter)),
            ("learner", rows, gib(self.learner.activations)),
            ("learner", "logits of the output head", gib(self.learner.head)),
            ("learner", "CUDA context, " * self.on_gpu + "allocator overhead", gib(self.slack)),
        ]
        engine = [
            ("engine", "base", gib(self.weights)),
            ("engine", process, gib(self.overhead)),
            ("engine", cache, gib(self.kv_cache)),
        ]
        return learner + engine if self.weights else learner


def plan(config: Config, gpu: str | None = None, gpus: int = 1) -> Plan:
    """Plan a run on `gpus` GPUs of the kind `gpu` (a key of KINDS), by default of the kind in this machine, or on its
    CPU if this machine has no GPU.

    Raises RloraError for an unknown kind, and for a config that needs more than `gpus` GPUs. A run that does not fit is
    no error: the plan's `faults` say what does not fit.
    """
    from rlora.cluster.resources import assign_gpus, check_sampling_on_gpu

    base = read_config(config.model)
    card = _card(gpu)
    config = assign_gpus(config, gpus if card else 0)
    weights, active = _weights_and_active(config, base)
    parts = config.engine.tensor_parallel_size
    kv_token = kv_bytes_per_token(base, parts)
    if card is None:
        return _plan_on_cpu(config, base, weights, active, kv_token)
    check_sampling_on_gpu(config)
    device, kind = card
    total, faults = int(kind.memory * GIB), list[str]()
    learner_gpus, engine_gpus = float(config.learner.gpus), float(config.engine.gpus)
    shared = learner_gpus + engine_gpus <= 1
    limit, share = cards.share_of_learner(total, total, learner_gpus, device)
    try:
        rows = fitting_rows(config, base, limit, share)
    except RloraError as error:
        faults.append(str(error))
        rows = Rows(config.learner.microbatch_tokens or config.max_model_len, config.learner.checkpointing is not False)
    learner = footprint(config, base, rows, on_gpu=True)
    learners = LearnerMemory(learner.on_gpu, learner_gpus) if shared else LearnerMemory()
    kv_cache = overhead = 0
    if config.engines:
        eager, utilization = config.engine.eager, config.engine.gpu_memory_utilization
        overhead = cards.COMPUTE + cards.CONTEXT + (0 if eager else cards.GRAPHS)
        try:
            budget = cards.budget_of_engine(total, total, engine_gpus, learners, eager, device, utilization)
            cards.check_fits(budget, weights // parts, kv_token, config.max_model_len, device)
            kv_cache = config.engine.kv_cache_gib * GIB or budget - weights // parts - cards.COMPUTE
        except RloraError as error:
            faults.append(str(error))
    else:
        weights = 0
    memory = Plan(
        device, total, True, shared, learner, rows, weights // parts, kv_cache, kv_token, config.max_model_len, overhead
    )
    return replace(memory, seconds=_seconds(config, kind, memory, active), faults=tuple(faults))


def gib(size: float) -> str:
    """Format a number of bytes in GiB."""
    return f"{size / GIB:.2f} GiB"


def _card(gpu: str | None) -> tuple[str, Kind] | None:
    """Return name and specifications of the GPU `gpu`, by default of this machine's first GPU; None without a GPU."""
    if gpu is not None:
        if gpu not in KINDS:
            raise RloraError(f"--gpu {gpu}: unknown GPU; use one of {', '.join(KINDS)}")
        return gpu, KINDS[gpu]
    listed = cards.list_cards()
    if not listed:
        return None
    card = listed[0]
    name = card.name.lower().replace(" ", "")
    similar = next((kind for key, kind in KINDS.items() if key.split("-")[0] in name), KINDS["a100-40"])
    return card.name, similar._replace(memory=card.total / GIB or similar.memory)


def _weights_and_active(config: Config, base: PreTrainedConfig) -> tuple[int, int]:
    """Return the bytes of all weights, and the number of weights used per token (of experts, only the active)."""
    model = meta_model(base, DTYPES[config.dtype])
    count = sum(weight.numel() for weight in model.parameters())
    idle = sum(
        math.prod(matrix.shape) * (1 - matrix.active / matrix.shape[0])
        for matrix in matrices(model)
        if len(matrix.shape) == 3
    )
    embeddings: Any = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embeddings
    active = count - idle - (0 if tied else embeddings.numel())
    return sum(map(bytes_of, model.parameters())), int(active)


def _plan_on_cpu(config: Config, base: PreTrainedConfig, weights: int, active: int, kv_token: int) -> Plan:
    rows = cpu_rows(config)
    kv_cache, process = (config.engine.kv_cache_gib or 2) * GIB, _PROCESS
    if not config.engines:
        weights = kv_cache = process = 0
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    learner = footprint(config, base, rows, on_gpu=False)
    engines, name = config.engines, f"CPU ({cores()} cores)"
    memory = Plan(name, total, False, True, learner, rows, weights, kv_cache, kv_token, config.max_model_len, process)
    needed = _PROCESS + learner.fixed + learner.per_row + memory.slack + engines * (weights + kv_cache + _PROCESS)
    fix = "lower engine.kv_cache_gib, or use a smaller model"
    fault = f"RAM: the run needs {gib(needed)}, and the machine has {gib(total)}; {fix}"
    faults = (fault,) if needed > total else ()
    return replace(memory, seconds=_seconds(config, _measure_cpu(config), memory, active), faults=faults)


def _measure_cpu(config: Config) -> Kind:
    """Measure the speed of this CPU's cores, which takes a tenth of a second."""
    x, y = (torch.ones(768, 768, dtype=DTYPES[config.dtype]) for _ in range(2))
    source = torch.ones(2**25)

    def rate(work: Any, amount: float) -> float:
        work()
        start, times = time.perf_counter(), 0
        while time.perf_counter() - start < 0.05:
            work()
            times += 1
        return amount * times / (time.perf_counter() - start)

    return Kind(0, rate(lambda: x @ y, 2 * 768**3), rate(source.clone, 2 * 4 * 2**25))


def _seconds(config: Config, kind: Kind, memory: Plan, active: int) -> dict[str, float]:
    """Estimate the seconds of a step by phase, for completions of half of sampling.max_tokens on average."""
    completions = config.prompts_per_step * config.completions_per_prompt
    length = _MEAN_LENGTH * config.sampling.max_tokens
    prompts = config.prompts_per_step * config.sampling.max_prompt_tokens / 2
    engines, parts = max(1, config.engines), config.engine.tensor_parallel_size
    context = memory.context - config.sampling.max_tokens / 2 - length / 2  # tokens of a half-finished sequence
    limit = min(config.engine.sequences(memory.on_gpu), max(1, int(memory.kv_cache / (memory.kv_token * context))))
    batch = max(1, min(limit, math.ceil(completions / engines)))
    batches = math.ceil(completions / (engines * batch))

    def decoding(sequences: float) -> float:
        read = memory.weights + sequences * memory.kv_token * context
        return _STEP + max(read / (_SAMPLER * kind.bandwidth), 2 * active * sequences / parts / (_LEARNER * kind.flops))

    sampling = batches * length * decoding(batch) + (config.sampling.max_tokens - length) * decoding(batch / 8)
    sampling += 2 * active * prompts / (_LEARNER * kind.flops * engines * parts)
    tokens = prompts + completions * length
    objective = objective_of(config.algorithm, config.sampling.max_tokens)
    passes = config.algorithm.epochs * (6 if memory.rows.checkpointing else 4) + 2 * len(objective.needs)
    update = passes * active * tokens / (_LEARNER * kind.flops * config.learner.replicas)
    return {"sampling": sampling, "update": update, "swap": 0.1} if config.engines else {"update": update}
