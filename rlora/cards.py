"""NVIDIA GPUs: what a node has, whether torch can use it, and how the memory of one is shared out.

`list_cards` asks nvidia-smi, which creates no CUDA context. Functions that ask torch run in learners and engines only.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rlora.records import RloraError

GIB = 2**30
LESS = (  # what to do where memory is short
    "Lower learner.microbatch_tokens or sampling.max_tokens, set learner.checkpointing = true, or give the engine less "
    "(engine.gpu_memory_utilization, engine.kv_cache_gib); `rlora plan` says what each takes"
)
_FIELDS = ("name", "uuid", "memory.total", "memory.free", "driver_version", "compute_cap", "mig.mode.current")
_OLDEST = (8, 0)  # compute capability: Ampere, the first with bf16
_DRIVERS = {"12": "525", "13": "580"}  # the oldest that runs a version of CUDA
CONTEXT = GIB  # of a process beside what its allocator has: CUDA's context, workspaces of cuBLAS
COMPUTE = GIB  # of an engine's activations and sampler
GRAPHS = 3 * GIB // 2  # of an engine's CUDA graphs, which vLLM does not count


@dataclass(frozen=True)
class Card:
    """A GPU as nvidia-smi knows it."""

    name: str
    uuid: str
    total: int  # bytes
    free: int  # bytes
    driver: str
    capability: tuple[int, int]
    is_divided: bool  # into MIG slices


@dataclass(frozen=True)
class LearnerMemory:
    """What learners hold of one card."""

    bytes: int = 0  # at most, measured
    gpus: float = 0.0  # that they reserved of Ray


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine has to know of the cards before it starts."""

    learners: Mapping[str, LearnerMemory] = field(default_factory=dict)  # by the card's uuid
    kv_cache: int = 0  # bytes that an engine before it found room for; 0: none was started yet


def error_text(error: Exception) -> str:
    """An error in words, with what to do where it is one of memory."""
    words = f"{type(error).__name__}: {error}"
    return f"{words}. {LESS}" if isinstance(error, torch.OutOfMemoryError) else words


def list_cards() -> list[Card]:
    """The cards of this node, also those that CUDA_VISIBLE_DEVICES hides. Raises RloraError where the driver fails."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RloraError(f"GPU: nvidia-smi does not answer ({error}); see that the driver works") from error
    if asked.returncode:
        if not Path("/dev/nvidia0").exists():
            return []
        said = (asked.stdout + asked.stderr).strip().splitlines()[:1]
        raise RloraError(f"GPU: nvidia-smi fails ({''.join(said)}); see that the driver works, or start the node again")
    return [_card(line) for line in asked.stdout.splitlines() if line.strip()]


def _card(line: str) -> Card:
    name, uuid, total, free, driver, capability, mig = (part.strip() for part in line.rsplit(",", len(_FIELDS) - 1))
    major, _, minor = capability.partition(".")
    return Card(name, uuid, _mib(total), _mib(free), driver, (int(major), int(minor or 0)), mig == "Enabled")


def _mib(number: str) -> int:
    return int(number) * 2**20 if number.isdecimal() else 0  # [N/A] on cards that share the host's memory


def check_cpu_is_intended(gpus_of_ray: float, wanted: bool) -> None:
    """Raise RloraError where this node has cards and Ray sees none: a run would train on the CPU without a word.

    It may where no GPU is `wanted`: engine.gpus and learner.gpus are 0.
    """
    if gpus_of_ray or not wanted or not (cards := list_cards()):
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = (
        f"CUDA_VISIBLE_DEVICES is {visible!r} here; unset it, or name a card in it"
        if visible is not None
        else "start Ray with --num-gpus"
    )
    raise RloraError(
        f"GPU: this machine has {len(cards)} ({cards[0].name}), and Ray sees none: {why}. To train on the CPU set "
        "engine.gpus and learner.gpus to 0"
    )


def check_usable() -> None:
    """Raise RloraError where torch can't use the card that this process was given."""
    if not torch.cuda.is_available():
        raise RloraError(f"GPU: Ray gave this process a card, and torch {torch.__version__} can't use it: {_reason()}")
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST:
        raise RloraError(
            f"GPU: {torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; bfloat16 "
            "needs 8.0 (Ampere) or later. Use a newer card, or set engine.gpus and learner.gpus to 0"
        )


def _reason() -> str:
    needed = torch.version.cuda
    if needed is None:
        return "it is built for CPUs; install rlora with the extra cuda, in an environment of its own"
    driver = next((card.driver for card in list_cards()), None)
    oldest = _DRIVERS.get(needed.partition(".")[0])
    if driver and oldest and int(driver.partition(".")[0]) < int(oldest):
        return f"it is built for CUDA {needed}, which needs driver {oldest} or later, and this is {driver}; update it"
    return f"see what `python -c 'import torch; torch.cuda.init()'` says (it is built for CUDA {needed})"


def uuid() -> str:
    """That of this process's card; empty on a CPU."""
    return str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else ""


def room_of_learner(gpus: float) -> tuple[int, str]:
    """Bytes that a learner which reserved `gpus` may take of its card, and of what they are a part, in words.

    Raises RloraError where others hold its part.
    """
    free, total = torch.cuda.mem_get_info()
    return share_of_learner(free, total, gpus, torch.cuda.get_device_name())


def share_of_learner(free: int, total: int, gpus: float, name: str) -> tuple[int, str]:
    """The arithmetic of `room_of_learner`."""
    share = int(total * min(1.0, gpus)) - CONTEXT
    words = f"{min(1.0, gpus):g} (learner.gpus) of {name} with {total / GIB:.1f} GiB"
    if free < share:
        raise RloraError(
            f"GPU: the learner's part of the card is {words}, and only {free / GIB:.1f} GiB are free: another process "
            "holds memory there (nvidia-smi shows which); end it, use another card, or lower learner.gpus"
        )
    return share, words


def budget_of_engine(
    free: int, total: int, gpus: float, beside: LearnerMemory, eager: bool, name: str, share_asked: float = 0.0
) -> int:
    """Bytes that an engine which reserved `gpus` of a card may take, with its KV cache: the share that is asked for, or
    of what learners leave as much as it reserved of what they left. Raises RloraError where others hold that."""
    if share_asked:
        return int(share_asked * total)
    left = total - beside.bytes - (CONTEXT if beside.bytes else 0)
    share = min(1.0, gpus / max(1e-6, 1 - beside.gpus)) if beside.gpus < 1 else 0.0
    budget = int(left * share) - CONTEXT - (0 if eager else GRAPHS)
    if budget <= 0:
        raise RloraError(
            f"GPU: {name} has {total / GIB:.1f} GiB, of which the learner takes {beside.bytes / GIB:.1f}; nothing is "
            "left for an engine. Lower learner.microbatch_tokens, or give the engine a whole card (engine.gpus = 1)"
        )
    if free < budget:
        raise RloraError(
            f"GPU: an engine's part of {name} is {budget / GIB:.1f} GiB, and only {free / GIB:.1f} are free: another "
            "process holds memory there (nvidia-smi shows which); end it, use another card, or set "
            "engine.gpu_memory_utilization to a share that is free"
        )
    return budget


def check_fits(budget: int, weights: int, of_token: int, context: int, name: str) -> None:
    """Raise RloraError where an engine's budget does not hold the base and the keys and values of one completion."""
    need = weights + of_token * context + COMPUTE
    if budget < need:
        fits = (budget - weights - COMPUTE) // of_token
        instead = (
            f"a context of {fits} tokens would fit (sampling.max_prompt_tokens + sampling.max_tokens)"
            if fits > 0
            else "use a smaller model, a larger card, or a card for the engine alone (engine.gpus = 1)"
        )
        raise RloraError(
            f"GPU: the engine may take {budget / GIB:.1f} GiB of {name}, and needs {need / GIB:.1f}: "
            f"{weights / GIB:.1f} for the base, {of_token * context / GIB:.1f} for the keys and values of a completion "
            f"of {context} tokens, {COMPUTE / GIB:.1f} to compute; {instead}"
        )
