"""The machine in one place: device, dtype, threads, and the environment that engines and the learner start with."""

import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from rlora import cards
from rlora.records import RloraError

_SHM_NEEDED = 256 * 1024  # bytes; an engine takes a few pages
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def send(tensor: Tensor, to: torch.device) -> Tensor:
    """A tensor of the CPU on `to`; a GPU takes it when it gets there, and nobody waits for that."""
    return tensor.pin_memory().to(to, non_blocking=True) if to.type == "cuda" else tensor.to(to)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name() -> str:
    """What the bits of a result depend on: processor, its vector instructions, and how many cores share the work.

    Libraries choose their kernels by the vendor too, and those for bf16 by AVX512_BF16 and AMX.
    """
    told = _cpuinfo()
    kind = " ".join([platform.machine(), *told.get("vendor_id", "").split(), torch.backends.cpu.get_cpu_capability()])
    flags = told.get("flags", "").split()
    extras = [short for flag, short in (("avx512_bf16", "bf16"), ("amx_bf16", "AMX")) if flag in flags]
    cpu = f"{'+'.join([kind, *extras])}, {cores()} cores"
    if not torch.cuda.is_available():
        return cpu
    gpus = cards.list_cards()  # torch would take a context of CUDA's to say it, half a GiB of a card
    return f"{cpu}, {gpus[0].name}" if gpus else cpu


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def describe_device() -> str:
    """What this process computes on, in words. On a GPU it takes a context of CUDA's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"


def engine_environment(threads: int, kv_cache_gib: int, cuda: bool) -> dict[str, str]:
    """Environment variables of an engine's process.

    vLLM runs inside it (no core process of its own that spins on a core beside the learner), so threads have to be set
    from outside. On CPU the OpenMP library that vLLM's kernels are tuned for is loaded first.
    """
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    if not cuda:
        environment |= {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib)}
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.exists():
            environment["LD_PRELOAD"] = str(openmp)
    return environment


def learner_environment(threads: int, cuda: bool) -> dict[str, str]:
    """Environment variables of the learner's process."""
    environment = {"OMP_NUM_THREADS": str(threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # for deterministic kernels
    if cuda:  # rows differ in length, and fixed segments would be left in pieces
        environment["PYTORCH_CUDA_ALLOC_CONF"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return environment


def seed(number: int) -> None:
    """Start every random generator of this process."""
    random.seed(number)
    numpy.random.seed(number % 2**32)
    torch.manual_seed(number)


def random_state() -> dict[str, Tensor]:
    """The state of every random generator of this process: Python's, NumPy's, torch's, and each GPU's."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    of_python = json.dumps([random.getstate(), [kind, list(map(int, keys)), *rest]]).encode()
    states = {"random.python": torch.frombuffer(bytearray(of_python), dtype=torch.uint8)}
    return states | {f"random.{name}": state for name, state in _torch_states().items()}


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Take them back; of a GPU that is not here its state is left out."""
    (version, internal, gauss), of_numpy = json.loads(bytes(states["random.python"].tolist()))
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(tuple(of_numpy))
    torch.set_rng_state(states["random.cpu"])
    for index in range(torch.cuda.device_count()):
        if (state := states.get(f"random.cuda{index}")) is not None:
            torch.cuda.set_rng_state(state, index)


def _torch_states() -> dict[str, Tensor]:
    of_gpus = {f"cuda{index}": torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}
    return {"cpu": torch.get_rng_state()} | of_gpus


def release() -> None:
    """Give the memory that torch's allocator keeps on a GPU back: an engine may start there."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def own_bytes() -> int | None:
    """RAM that this process has for itself now, without files and what it shares (Ray's objects); None off Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM, that cleaning up is not stopped half way."""
    before = {number: on_signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            on_signal(number, handler)


def on_signal(number: signal.Signals, handler: Any) -> Any:
    """Set a signal's handler and return the one before; only the main thread can, elsewhere nothing changes."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(number, handler)
    return None


def ram_directory() -> Path:
    """Where short-lived files that another library has to read are written."""
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


def adapter_directory(pid: int, place: Path | None = None) -> Path:
    """Where the engine in process `pid` keeps its adapters' files: in RAM, unless another `place` is given."""
    return (place or ram_directory()) / f"rlora-{pid}"


def check_ram_directory() -> None:
    """Raise RloraError where vLLM could not start: Python's semaphores and Intel's OpenMP need pages in /dev/shm, and
    the latter dies of a bus error without one."""
    shm = Path("/dev/shm")
    if shm.exists() and (free := shutil.disk_usage(shm).free) < _SHM_NEEDED:
        raise RloraError(
            f"{shm} has {free / 1024:,.0f} KiB free, and vLLM needs {_SHM_NEEDED / 1024:,.0f} to start; remove what "
            "fills it, or start the container with a larger --shm-size (in Kubernetes, mount an emptyDir of medium "
            "Memory there)"
        )
