"""NVIDIA GPUs: detection, and division of a GPU's memory between learners and engines.

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
    "Lower learner.microbatch_tokens or sampling.max_tokens, set learner.checkpointing = true, or lower the engine's "
    "share (engine.gpu_memory_utilization, engine.kv_cache_gib); `rlora plan` lists the memory of each part"
)
_FIELDS = ("name", "uuid", "memory.total", "memory.free", "driver_version", "compute_cap", "mig.mode.current")
CONTEXT = GIB  # per process, outside its allocator: CUDA context, cuBLAS workspaces
COMPUTE = GIB  # activations and sampler of an engine
GRAPHS = 3 * GIB // 2  # CUDA graphs of an engine, which vLLM's memory budget does not include


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
    """Memory that learners hold on one GPU."""

    bytes: int = 0  # measured peak
    gpus: float = 0.0  # share of the GPU that the learners reserved from Ray


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that an engine must account for when it starts."""

    learners: Mapping[str, LearnerMemory] = field(default_factory=dict)  # by uuid of the GPU
    kv_cache: int = 0  # bytes of an earlier engine's KV cache, 0 for the first engine


def list_cards() -> list[Card]:
    """Return all GPUs of this node, regardless of CUDA_VISIBLE_DEVICES; an empty list without nvidia-smi or a GPU.

    Raises RloraError if nvidia-smi fails or takes more than a minute.
    """
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RloraError(f"GPU: nvidia-smi failed ({error}); reboot the node, or reinstall the driver") from error
    if result.returncode:
        if not Path("/dev/nvidia0").exists():
            return []
        message = "".join((result.stdout + result.stderr).strip().splitlines()[:1])
        raise RloraError(f"GPU: nvidia-smi failed ({message}); reboot the node, or reinstall the driver")
    return [_card(line) for line in result.stdout.splitlines() if line.strip()]


def _card(line: str) -> Card:
    name, uuid, total, free, driver, capability, mig = (part.strip() for part in line.rsplit(",", len(_FIELDS) - 1))
    major, _, minor = capability.partition(".")
    return Card(name, uuid, _mib(total), _mib(free), driver, (int(major), int(minor or 0)), mig == "Enabled")


def _mib(number: str) -> int:
    return int(number) * 2**20 if number.isdecimal() else 0  # [N/A] on GPUs that share the host's memory


def check_cpu_is_intended(gpus_of_ray: float, wanted: bool) -> None:
    """Raise RloraError if this node has GPUs but Ray sees none, since a run would silently train on the CPU.

    `gpus_of_ray` is the number of GPUs that Ray sees. No error is raised unless GPUs are `wanted`: engine.gpus or
    learner.gpus is not 0.
    """
    if gpus_of_ray or not wanted or not (cards := list_cards()):
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    reason = (
        f"CUDA_VISIBLE_DEVICES is {visible!r}; unset the variable, or set it to the index of a GPU"
        if visible is not None
        else "start Ray with --num-gpus"
    )
    raise RloraError(
        f"GPU: this machine has {len(cards)} ({cards[0].name}), and Ray sees none: {reason}. To train on the "
        "CPU, set engine.gpus and learner.gpus to 0"
    )


def share_of_learner(free: int, total: int, gpus: float, name: str) -> tuple[int, str]:
    """Return the bytes of a GPU that a learner may use if the learner reserved the share `gpus`, and a description of
    the share for messages, in which `name` is the GPU's name.

    `free` and `total` are in bytes. Raises RloraError if less than the share is free.
    """
    share = int(total * min(1.0, gpus)) - CONTEXT
    description = f"{min(1.0, gpus):g} (learner.gpus) of {name} with {total / GIB:.1f} GiB"
    if free < share:
        raise RloraError(
            f"GPU: the learner's share of the GPU is {description}, and only {free / GIB:.1f} GiB are free: another "
            "process holds memory there (`nvidia-smi` lists the processes); end that process, use another GPU, or "
            "lower learner.gpus"
        )
    return share, description


def budget_of_engine(
    free: int, total: int, gpus: float, learners: LearnerMemory, eager: bool, name: str, utilization: float = 0.0
) -> int:
    """Return the bytes of a GPU that an engine may use, including the KV cache: the share `utilization` of the GPU. If
    `utilization` is 0, engines divide the memory that the learners leave, in proportion to their reservations `gpus`.

    `free` and `total` are in bytes; `eager` engines need no memory for CUDA graphs; `name` is the GPU's name for
    messages. Without `utilization`, raises RloraError if no memory is left for the engine or less is free.
    """
    if utilization:
        return int(utilization * total)
    remaining = total - learners.bytes - (CONTEXT if learners.bytes else 0)
    share = min(1.0, gpus / max(1e-6, 1 - learners.gpus)) if learners.gpus < 1 else 0.0
    budget = int(remaining * share) - CONTEXT - (0 if eager else GRAPHS)
    if budget <= 0:
        raise RloraError(
            f"GPU: {name} has {total / GIB:.1f} GiB, of which the learner takes {learners.bytes / GIB:.1f}; nothing is "
            "left for an engine. Lower learner.microbatch_tokens, or give the engine a GPU of its own (engine.gpus = 1)"
        )
    if free < budget:
        raise RloraError(
            f"GPU: an engine's share of {name} is {budget / GIB:.1f} GiB, and only {free / GIB:.1f} are free: another "
            "process holds memory there (`nvidia-smi` lists the processes); end that process, use another GPU, or set "
            "engine.gpu_memory_utilization to a share that is free"
        )
    return budget


def check_fits(budget: int, weights: int, kv_token: int, context: int, name: str) -> None:
    """Raise RloraError if an engine's `budget` is too small for the base and the KV cache of one sequence.

    `budget`, `weights` and `kv_token` (the keys and values of a token) are in bytes, and `context`, the maximum length
    of a sequence, is in tokens. `name` is the GPU's name for messages.
    """
    need = weights + kv_token * context + COMPUTE
    if budget < need:
        fits = (budget - weights - COMPUTE) // kv_token
        fix = (
            f"a context of {fits} tokens would fit: lower sampling.max_prompt_tokens or sampling.max_tokens"
            if fits > 0
            else "use a smaller model, a larger GPU, or a GPU of its own for the engine (engine.gpus = 1)"
        )
        raise RloraError(
            f"GPU: the engine may take {budget / GIB:.1f} GiB of {name}, and needs {need / GIB:.1f}: "
            f"{weights / GIB:.1f} for the base, {kv_token * context / GIB:.1f} for the KV cache of a sequence of "
            f"{context} tokens, {COMPUTE / GIB:.1f} for activations; {fix}"
        )
