"""NVIDIA GPUs ("cards"): detection, and division of a card's memory.

Does not import torch: `list_cards` calls nvidia-smi, which creates no CUDA context.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlora.records import RloraError

GIB = 2**30
MEMORY_ADVICE = (  # appended to out-of-memory errors
    "Lower learner.microbatch_tokens or sampling.max_tokens, set learner.checkpointing = true, or give the engine less "
    "(engine.gpu_memory_utilization, engine.kv_cache_gib); `rlora plan` lists what each part takes"
)
_FIELDS = ("name", "uuid", "memory.total", "memory.free", "driver_version", "compute_cap", "mig.mode.current")
CONTEXT = GIB  # per process, outside its allocator: CUDA context, cuBLAS workspaces
COMPUTE = GIB  # activations and sampler of an engine
GRAPHS = 3 * GIB // 2  # CUDA graphs of an engine, which vLLM's memory budget leaves out


@dataclass(frozen=True)
class Card:
    """A GPU as reported by nvidia-smi."""

    name: str
    uuid: str
    total: int  # bytes
    free: int  # bytes
    driver: str
    capability: tuple[int, int]
    is_divided: bool  # MIG mode is on


@dataclass(frozen=True)
class LearnerMemory:
    """Memory of one card that learners hold."""

    bytes: int = 0  # measured peak
    gpus: float = 0.0  # share of the card that they reserved from Ray


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that an engine must account for when it starts."""

    learners: Mapping[str, LearnerMemory] = field(default_factory=dict)  # by uuid of the card
    kv_cache: int = 0  # bytes of an earlier engine's KV cache, 0 for the first engine


def list_cards() -> list[Card]:
    """All cards of this node, regardless of CUDA_VISIBLE_DEVICES. Raises RloraError if the driver fails."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RloraError(f"GPU: nvidia-smi does not answer ({error}); check that the driver works") from error
    if result.returncode:
        if not Path("/dev/nvidia0").exists():
            return []
        message = "".join((result.stdout + result.stderr).strip().splitlines()[:1])
        raise RloraError(f"GPU: nvidia-smi fails ({message}); check that the driver works, or reboot the node")
    return [_card(line) for line in result.stdout.splitlines() if line.strip()]


def _card(line: str) -> Card:
    name, uuid, total, free, driver, capability, mig = (part.strip() for part in line.rsplit(",", len(_FIELDS) - 1))
    major, _, minor = capability.partition(".")
    return Card(name, uuid, _mib(total), _mib(free), driver, (int(major), int(minor or 0)), mig == "Enabled")


def _mib(number: str) -> int:
    return int(number) * 2**20 if number.isdecimal() else 0  # [N/A] on cards that share the host's memory


def check_cpu_is_intended(gpus_of_ray: float, wanted: bool) -> None:
    """Raise RloraError if this node has cards but Ray sees none, since a run would silently train on the CPU.

    Returns if no GPU is `wanted`, that is, if engine.gpus and learner.gpus are 0.
    """
    if gpus_of_ray or not wanted or not (cards := list_cards()):
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    reason = (
        f"CUDA_VISIBLE_DEVICES is {visible!r}; unset it, or name a card in it"
        if visible is not None
        else "start Ray with --num-gpus"
    )
    raise RloraError(
        f"GPU: this machine has {len(cards)} ({cards[0].name}), and Ray sees none: {reason}. To train on the CPU set "
        "engine.gpus and learner.gpus to 0"
    )


def share_of_learner(free: int, total: int, gpus: float, name: str) -> tuple[int, str]:
    """Bytes that a learner may take of its card if it reserved `gpus` of it, and a description of that share.

    Raises RloraError if other processes hold part of that share: of the card's `total` bytes only `free` are free.
    """
    share = int(total * min(1.0, gpus)) - CONTEXT
    description = f"{min(1.0, gpus):g} (learner.gpus) of {name} with {total / GIB:.1f} GiB"
    if free < share:
        raise RloraError(
            f"GPU: the learner's share of the card is {description}, and only {free / GIB:.1f} GiB are free: "
            "another process holds memory there (see nvidia-smi); end it, use another card, or lower learner.gpus"
        )
    return share, description


def budget_of_engine(
    free: int, total: int, gpus: float, learners: LearnerMemory, eager: bool, name: str, utilization: float = 0.0
) -> int:
    """Bytes that an engine may take of a card, including its KV cache: `utilization` of the card if that is set, else
    the memory that the learners leave, in proportion to the reserved `gpus`. Raises RloraError if it is not free."""
    if utilization:
        return int(utilization * total)
    remaining = total - learners.bytes - (CONTEXT if learners.bytes else 0)
    share = min(1.0, gpus / max(1e-6, 1 - learners.gpus)) if learners.gpus < 1 else 0.0
    budget = int(remaining * share) - CONTEXT - (0 if eager else GRAPHS)
    if budget <= 0:
        raise RloraError(
            f"GPU: {name} has {total / GIB:.1f} GiB, of which the learner takes {learners.bytes / GIB:.1f}; nothing is "
            "left for an engine. Lower learner.microbatch_tokens, or give the engine a whole card (engine.gpus = 1)"
        )
    if free < budget:
        raise RloraError(
            f"GPU: an engine's share of {name} is {budget / GIB:.1f} GiB, and only {free / GIB:.1f} are free: another "
            "process holds memory there (see nvidia-smi); end it, use another card, or set "
            "engine.gpu_memory_utilization to a share that is free"
        )
    return budget


def check_fits(budget: int, weights: int, kv_token: int, context: int, name: str) -> None:
    """Raise RloraError if an engine's budget does not hold the base and the KV cache of one sequence.

    `weights` and `kv_token`, the keys and values of a token, are in bytes; `context` is in tokens.
    """
    need = weights + kv_token * context + COMPUTE
    if budget < need:
        fits = (budget - weights - COMPUTE) // kv_token
        fix = (
            f"a context of {fits} tokens would fit (sampling.max_prompt_tokens + sampling.max_tokens)"
            if fits > 0
            else "use a smaller model, a larger card, or a whole card for the engine (engine.gpus = 1)"
        )
        raise RloraError(
            f"GPU: the engine may take {budget / GIB:.1f} GiB of {name}, and needs {need / GIB:.1f}: "
            f"{weights / GIB:.1f} for the base, {kv_token * context / GIB:.1f} for the KV cache of a sequence of "
            f"{context} tokens, {COMPUTE / GIB:.1f} for activations; {fix}"
        )
