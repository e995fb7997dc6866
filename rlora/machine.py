"""This machine: device, threads, environment variables of engines and learners, random state, signals."""

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

_SHM_NEEDED = 256 * 1024  # bytes; an engine uses a few pages
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def send(tensor: Tensor, target: torch.device) -> Tensor:
    """Copy a CPU tensor to a device. The copy to a GPU is asynchronous, from pinned memory."""
    return tensor.pin_memory().to(target, non_blocking=True) if target.type == "cuda" else tensor.to(target)


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name() -> str:
    """Name of the hardware that the bits of a result depend on: processor, vector instructions, cores, GPU.

    Libraries also choose kernels by the CPU's vendor, and bf16 kernels by AVX512_BF16 and AMX.
    """
    cpuinfo = _cpuinfo()
    words = [platform.machine(), *cpuinfo.get("vendor_id", "").split(), torch.backends.cpu.get_cpu_capability()]
    flags = cpuinfo.get("flags", "").split()
    extras = [short for flag, short in (("avx512_bf16", "bf16"), ("amx_bf16", "AMX")) if flag in flags]
    cpu = f"{'+'.join([' '.join(words), *extras])}, {cores()} cores"
    if not torch.cuda.is_available():
        return cpu
    gpus = cards.list_cards()  # torch would create a CUDA context for the name, which takes half a GiB
    return f"{cpu}, {gpus[0].name}" if gpus else cpu


def _cpuinfo() -> dict[str, str]:
    """Linux's entries for the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def describe_device() -> str:
    """Name of the device that this process computes on. On a GPU this creates a CUDA context."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"


def engine_environment(threads: int, kv_cache_gib: int, cuda: bool) -> dict[str, str]:
    """Environment variables of an engine's process.

    vLLM runs inside that process, not in a separate core process, which would busy-wait on a core that the learner
    needs. Its number of threads must therefore be set here. On CPU, the OpenMP library that vLLM's kernels are tuned
    for is preloaded.
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
    if cuda:  # rows differ in length, which fragments fixed segments
        environment["PYTORCH_CUDA_ALLOC_CONF"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return environment


def seed(number: int) -> None:
    """Seed every random generator of this process."""
    random.seed(number)
    numpy.random.seed(number % 2**32)
    torch.manual_seed(number)


def random_state() -> dict[str, Tensor]:
    """State of every random generator of this process: Python, NumPy, torch, and each GPU."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    python_and_numpy = json.dumps([random.getstate(), [kind, list(map(int, keys)), *rest]]).encode()
    states = {"random.python": torch.frombuffer(bytearray(python_and_numpy), dtype=torch.uint8)}
    return states | {f"random.{name}": state for name, state in _torch_states().items()}


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Restore the state from `random_state`. States of absent GPUs are ignored."""
    (version, internal, gauss), numpy_state = json.loads(bytes(states["random.python"].tolist()))
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(tuple(numpy_state))
    torch.set_rng_state(states["random.cpu"])
    for index in range(torch.cuda.device_count()):
        if (state := states.get(f"random.cuda{index}")) is not None:
            torch.cuda.set_rng_state(state, index)


def _torch_states() -> dict[str, Tensor]:
    gpus = {f"cuda{index}": torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())}
    return {"cpu": torch.get_rng_state()} | gpus


def release() -> None:
    """Return the GPU memory that torch's allocator caches, so that an engine can start there."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def private_bytes() -> int | None:
    """Anonymous resident memory of this process: no files, no shared memory (Ray's objects). None if not on Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM inside the context, so that cleanup is not interrupted."""
    handlers = {number: on_signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            on_signal(number, handler)


def on_signal(number: signal.Signals, handler: Any) -> Any:
    """Set a signal's handler and return the previous one. Does nothing outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(number, handler)
    return None


def ram_directory() -> Path:
    """Directory for short-lived files that another library reads: in RAM if possible."""
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


def adapter_directory(pid: int, parent: Path | None = None) -> Path:
    """Directory for the adapter files of the engine in process `pid`, in `parent` or in RAM by default."""
    return (parent or ram_directory()) / f"rlora-{pid}"


def check_ram_directory() -> None:
    """Raise RloraError if /dev/shm is full, so that vLLM can't start: Python's semaphores and Intel's OpenMP need pages
    there, and the latter dies of a bus error without them."""
    shm = Path("/dev/shm")
    if shm.exists() and (free := shutil.disk_usage(shm).free) < _SHM_NEEDED:
        raise RloraError(
            f"{shm} has {free / 1024:,.0f} KiB free, and vLLM needs {_SHM_NEEDED / 1024:,.0f} to start; delete files "
            "in it, or start the container with a larger --shm-size (in Kubernetes, mount an emptyDir of medium "
            "Memory there)"
        )
