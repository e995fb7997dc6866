"""The machine in one place: device, dtype, threads, and the environment that engines and the learner start with."""

import os
import sys
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def learner_environment(threads: int) -> dict[str, str]:
    """Environment variables of the learner's process."""
    return {"OMP_NUM_THREADS": str(threads)}


def ram_directory() -> Path:
    """Where short-lived files that another library has to read are written."""
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))


def adapter_directory(pid: int) -> Path:
    """Where the engine in process `pid` keeps its adapters' files."""
    return ram_directory() / f"rlora-{pid}"
