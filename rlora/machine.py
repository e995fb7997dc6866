"""This machine: cores, environment variables of engines and learners, memory, signals. Does not import torch."""

import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlora.records import RloraError

_SHM_NEEDED = 256 * 1024  # bytes; an engine uses a few pages


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def engine_environment(threads: int, kv_cache_gib: int, cuda: bool) -> dict[str, str]:
    """Return the environment variables of an engine's process. `threads` and `kv_cache_gib` have an effect on CPU only.

    vLLM runs inside the engine's process, because its separate core process would busy-wait on a core that the learner
    needs. vLLM's number of threads must therefore be set here. On CPU, the OpenMP library that vLLM's kernels are tuned
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
    """Return the environment variables of a learner's process."""
    environment = {"OMP_NUM_THREADS": str(threads), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # for deterministic kernels
    if cuda:  # rows differ in length, which fragments fixed segments
        environment["PYTORCH_CUDA_ALLOC_CONF"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return environment


@contextmanager
def importing() -> Iterator[None]:
    """Context in which Python's garbage collector does not run. Imports create many objects that stay, which the
    collector would visit again and again: a sixth of the time that vLLM's imports take."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # it never visits them
        gc.enable()


def private_bytes() -> int | None:
    """Return the bytes of this process's anonymous resident memory, which excludes files and shared memory (Ray's
    objects). None if not on Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Context in which Ctrl-C and SIGTERM are ignored, so that cleanup is not interrupted."""
    handlers = {number: on_signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            on_signal(number, handler)


def on_signal(number: signal.Signals, handler: Any) -> Any:
    """Set a signal's handler and return the previous handler. Outside the main thread, do nothing and return None."""
    if threading.current_thread() is threading.main_thread():
        return signal.signal(number, handler)
    return None


def ram_directory() -> Path:
    """Return the directory for short-lived files that another library reads: /dev/shm, which is in RAM, if writable."""
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


def adapter_directory(pid: int, parent: Path | None = None) -> Path:
    """Return the directory for the adapter files of the engine in process `pid`: in `parent`, by default in RAM."""
    return (parent or ram_directory()) / f"rlora-{pid}"


def check_ram_directory() -> None:
    """Raise RloraError if /dev/shm is full. vLLM can't start then: Python's semaphores and Intel's OpenMP need pages
    there, and OpenMP dies of a bus error without pages."""
    shm = Path("/dev/shm")
    if shm.exists() and (free := shutil.disk_usage(shm).free) < _SHM_NEEDED:
        raise RloraError(
            f"{shm} has {free / 1024:,.0f} KiB free, and vLLM needs {_SHM_NEEDED / 1024:,.0f} to start; delete files "
            "there, or start the container with a larger --shm-size (in Kubernetes, mount an emptyDir of medium "
            "Memory there)"
        )
