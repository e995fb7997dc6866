"""What a run will take of a GPU's memory, and about how long a step: known before anything is started.

Memory is counted (`core.footprint`). Seconds are arithmetic over a card's published figures, at the shares of them that
such work usually reaches.
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
from rlora.core.footprint import FRAGMENTED, Footprint, Rows, bytes_of, fitting_rows, footprint, given_rows
from rlora.core.lora import matrices
from rlora.core.objectives import objective_of
from rlora.machine import DTYPES, cores
from rlora.model.base import kv_bytes_of_token, read_config, without_memory
from rlora.records import RloraError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from rlora.settings import Config

_LEARNER, _SAMPLER = 0.35, 0.6  # of a card's products that an update reaches, and of its bandwidth that decoding does
_STEP = 0.008  # seconds of an engine's step beside the GPU's work: vLLM's scheduling and Python
_HEAP = (0.1, 0.23 * GIB)  # of what rows hold, and beside it
_PROCESS = GIB  # of a process on a CPU: Python, torch, vLLM
_OF_COMPLETION = 0.5  # of sampling.max_tokens, the mean length that is reckoned with


class Kind(NamedTuple):
    """A card's published figures."""

    memory: float  # GiB that torch sees
    products: float  # FLOP/s in bf16, dense
    bandwidth: float  # bytes/s


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
    """Bytes that a learner and an engine take, and seconds of a step. What does not fit is said in `faults`."""

    where: str
    total: int  # bytes of the card, or of RAM
    on_gpu: bool
    shared: bool  # whether learner and engine are on one card
    learner: Footprint
    rows: Rows
    weights: int  # bytes, of the engine
    kv_cache: int  # bytes
    of_token: int  # bytes of one token's keys and values
    context: int  # tokens of the longest prompt and completion
    overhead: int  # bytes that an engine takes beside weights and KV cache
    seconds: dict[str, float] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def slack(self) -> int:
        """Bytes that an allocator keeps beside what is held: on a CPU, pieces of glibc's heap, as measured."""
        share, fixed = (FRAGMENTED - 1, cards.CONTEXT) if self.on_gpu else _HEAP
        return int(share * self.learner.of_rows + fixed)

    @property
    def taken(self) -> int:
        """Bytes of the card that they share, or of that of the fuller one, or of RAM."""
        learner = self.learner.fixed + self.learner.of_rows + self.slack
        engine = self.weights + self.overhead + self.kv_cache
        return learner + engine if self.shared else max(learner, engine)

    @property
    def sequences(self) -> int:
        """Completions of the longest context that the KV cache holds."""
        return self.kv_cache // (self.of_token * self.context)

    @property
    def lines(self) -> list[tuple[str, str, str]]:
        """What takes memory: who, what, and how much in words."""
        rows = f"activations, rows of {max(self.rows.tokens, self.context):,} tokens"
        rows += ", checkpointing" * self.rows.checkpointing
        tokens = self.kv_cache // self.of_token
        return [
            ("learner", "frozen base", gib(self.learner.base)),
            ("learner", "adapter, its gradient, Adam", gib(self.learner.adapter)),
            ("learner", rows, gib(self.learner.activations)),
            ("learner", "output head, logits at a time", gib(self.learner.head)),
            ("learner", "CUDA context, " * self.on_gpu + "the allocator's slack", gib(self.slack)),
            ("engine", "base", gib(self.weights)),
            ("engine", "to compute" + ", CUDA context and graphs" * self.on_gpu, gib(self.overhead)),
            (
                "engine",
                f"KV cache: {tokens:,} tokens, {self.sequences} completions of the longest",
                gib(self.kv_cache),
            ),
        ]


def plan(config: Config, gpu: str | None = None, gpus: int = 1) -> Plan:
    """What a run of this config takes: on `gpus` cards of a kind, or else on what this machine has.

    Raises RloraError for a kind that is not known, and for a config that can't be placed on so many cards.
    """
    from rlora.cluster import placed

    base = read_config(config.model)
    card = _card(gpu)
    config = placed(config, gpus if card else 0)
    weights, products = _weights_and_products(config, base)
    parts = config.engine.tensor_parallel_size
    of_token = kv_bytes_of_token(base, parts)
    if card is None:
        return _on_cpu(config, base, weights, products, of_token)
    where, kind = card
    total, faults = int(kind.memory * GIB), list[str]()
    of_learner, of_engine = float(config.learner.gpus), float(config.engine.gpus)
    shared = of_learner + of_engine <= 1
    room, part = cards.share_of_learner(total, total, of_learner, where)
    try:
        rows = fitting_rows(config, base, room, part)
    except RloraError as error:
        faults.append(str(error))
        rows = Rows(config.learner.microbatch_tokens or config.max_model_len, config.learner.checkpointing is not False)
    taken = footprint(config, base, rows, on_gpu=True)
    held = LearnerMemory(taken.on_gpu, of_learner) if shared else LearnerMemory()
    kv_cache = 0
    try:
        asked = config.engine.gpu_memory_utilization
        budget = cards.budget_of_engine(total, total, of_engine, held, config.engine.eager, where, asked)
        cards.check_fits(budget, weights // parts, of_token, config.max_model_len, where)
        kv_cache = config.engine.kv_cache_gib * GIB or budget - weights // parts - cards.COMPUTE
    except RloraError as error:
        faults.append(str(error))
    overhead = cards.COMPUTE + cards.CONTEXT + (0 if config.engine.eager else cards.GRAPHS)
    made = Plan(
        where, total, True, shared, taken, rows, weights // parts, kv_cache, of_token, config.max_model_len, overhead
    )
    seconds = _seconds(config, kind, made, products)
    return replace(made, seconds=seconds, faults=tuple(faults))


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _card(gpu: str | None) -> tuple[str, Kind] | None:
    """Its name and figures; this machine's where none is named, None where it has none."""
    if gpu is not None:
        if gpu not in KINDS:
            raise RloraError(f"--gpu {gpu}: no such card; there are {', '.join(KINDS)}")
        return gpu, KINDS[gpu]
    found = cards.list_cards()
    if not found:
        return None
    plain = found[0].name.lower().replace(" ", "")
    known = next((kind for name, kind in KINDS.items() if name.split("-")[0] in plain), KINDS["a100-40"])
    return found[0].name, known._replace(memory=found[0].total / GIB or known.memory)


def _weights_and_products(config: Config, base: PreTrainedConfig) -> tuple[int, int]:
    """Bytes of the weights, and the weights that a token meets: with experts those of the ones that are active."""
    model = without_memory(base, DTYPES[config.dtype])
    every = sum(weight.numel() for weight in model.parameters())
    idle = sum(
        math.prod(matrix.shape) * (1 - matrix.active / matrix.shape[0])
        for matrix in matrices(model)
        if len(matrix.shape) == 3
    )
    embeddings: Any = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embeddings
    met = every - idle - (0 if tied else embeddings.numel())
    return sum(map(bytes_of, model.parameters())), int(met)


def _on_cpu(config: Config, base: PreTrainedConfig, weights: int, products: int, of_token: int) -> Plan:
    rows = given_rows(config)
    kv_cache = (config.engine.kv_cache_gib or 2) * GIB
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    taken = footprint(config, base, rows, on_gpu=False)
    engines, name = config.engine.replicas, f"CPU ({cores()} cores)"
    made = Plan(name, total, False, True, taken, rows, weights, kv_cache, of_token, config.max_model_len, _PROCESS)
    needed = _PROCESS + taken.fixed + taken.of_rows + made.slack + engines * (weights + kv_cache + _PROCESS)
    too_much = f"RAM: {gib(needed)} are needed and the machine has {gib(total)}; lower engine.kv_cache_gib"
    faults = (too_much,) if needed > total else ()
    return replace(made, seconds=_seconds(config, _this_cpu(config), made, products), faults=faults)


def _this_cpu(config: Config) -> Kind:
    """What its cores reach now, measured in a tenth of a second."""
    x, y = (torch.ones(768, 768, dtype=DTYPES[config.dtype]) for _ in range(2))
    copied = torch.ones(2**25)

    def rate(work: Any, amount: float) -> float:
        work()
        start, times = time.perf_counter(), 0
        while time.perf_counter() - start < 0.05:
            work()
            times += 1
        return amount * times / (time.perf_counter() - start)

    return Kind(0, rate(lambda: x @ y, 2 * 768**3), rate(copied.clone, 2 * 4 * 2**25))


def _seconds(config: Config, kind: Kind, made: Plan, products: int) -> dict[str, float]:
    """Of a step by phase, where completions are half of sampling.max_tokens long on average."""
    completions = config.prompts_per_step * config.group_size
    length = _OF_COMPLETION * config.sampling.max_tokens
    prompts = config.prompts_per_step * config.sampling.max_prompt_tokens / 2
    engines, parts = config.engine.replicas, config.engine.tensor_parallel_size
    context = made.context - config.sampling.max_tokens / 2 - length / 2  # tokens of one that is half done
    most = min(config.engine.sequences(made.on_gpu), max(1, int(made.kv_cache / (made.of_token * context))))
    together = max(1, min(most, math.ceil(completions / engines)))
    turns = math.ceil(completions / (engines * together))

    def decoding(sequences: float) -> float:
        read = made.weights + sequences * made.of_token * context
        return _STEP + max(
            read / (_SAMPLER * kind.bandwidth), 2 * products * sequences / parts / (_LEARNER * kind.products)
        )

    sampling = turns * length * decoding(together) + (config.sampling.max_tokens - length) * decoding(together / 8)
    sampling += 2 * products * prompts / (_LEARNER * kind.products * engines * parts)
    tokens = prompts + completions * length
    objective = objective_of(config.algorithm, config.sampling.max_tokens)
    passes = config.algorithm.epochs * (6 if made.rows.checkpointing else 4) + 2 * len(objective.needs)
    update = passes * products * tokens / (_LEARNER * kind.products * config.learner.replicas)
    return {"sampling": sampling, "update": update, "swap": 0.1}
