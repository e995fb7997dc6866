"""The device that this process computes on: its name, memory and random state.

On a GPU most of these functions create a CUDA context: call them only in learners and engines.
"""

import json
import platform
import random
import weakref
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlora import cards, machine
from rlora.records import RloraError

_OLDEST = (8, 0)  # minimum compute capability: Ampere, the first with bf16
_DRIVERS = {"12": "525", "13": "580"}  # oldest driver per major version of CUDA
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def current_device() -> torch.device:
    """Return the device that this process computes on: the GPU if torch can use one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def send(tensor: Tensor, target: torch.device) -> Tensor:
    """Copy a CPU tensor to a device. The copy to a GPU is asynchronous, from pinned memory."""
    return tensor.pin_memory().to(target, non_blocking=True) if target.type == "cuda" else tensor.to(target)


@cache
def multiplies_in_16_bits() -> bool:
    """Return whether torch has kernels for bf16 matrix products on this CPU. On x86 they need AVX-512."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def wide(*tensors: Any) -> tuple[Any, ...]:
    """Return the factors of a matrix product; bf16 tensors on a CPU without 16-bit products as fp32, None unchanged.

    Without AVX-512, torch multiplies bf16 matrices at a tenth of the speed of fp32 ones or less. The caller rounds the
    product to the dtype that it would have had.
    """
    return tuple(
        tensor.float()
        if tensor is not None
        and tensor.dtype == torch.bfloat16
        and tensor.device.type == "cpu"
        and not multiplies_in_16_bits()
        else tensor
        for tensor in tensors
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias as `torch.nn.functional.linear` does, with `wide` factors, rounded to x's dtype."""
    return functional.linear(*wide(x, weight, bias)).to(x.dtype)


def hardware() -> str:
    """Return a name for the hardware that the bits of a result depend on: processor, vector instructions, cores, GPU.

    Libraries also choose kernels by the CPU's vendor, and bf16 kernels by AVX512_BF16 and AMX.
    """
    cpuinfo = _cpuinfo()
    words = [platform.machine(), *cpuinfo.get("vendor_id", "").split(), torch.backends.cpu.get_cpu_capability()]
    flags = cpuinfo.get("flags", "").split()
    extras = [short for flag, short in (("avx512_bf16", "bf16"), ("amx_bf16", "AMX")) if flag in flags]
    cpu = f"{'+'.join([' '.join(words), *extras])}, {machine.cores()} cores"
    if not torch.cuda.is_available():
        return cpu
    gpus = cards.list_cards()  # torch would create a CUDA context for the name, which takes half a GiB
    return f"{cpu}, {gpus[0].name}" if gpus else cpu


def _cpuinfo() -> dict[str, str]:
    """Return Linux's entries for the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def describe_device() -> str:
    """Return the name of the device that this process computes on. On a GPU this creates a CUDA context."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({torch.get_num_threads()} threads)"


def seed(number: int) -> None:
    """Seed every random generator of this process."""
    random.seed(number)
    numpy.random.seed(number % 2**32)
    torch.manual_seed(number)


def random_state() -> dict[str, Tensor]:
    """Return the state of every random generator of this process: Python, NumPy, torch, and each GPU."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    python_and_numpy = json.dumps([random.getstate(), [kind, list(map(int, keys)), *rest]]).encode()
    states = {"random.python": torch.frombuffer(bytearray(python_and_numpy), dtype=torch.uint8)}
    return states | {f"random.{name}": state for name, state in _torch_states().items()}


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Restore `states`, the result of `random_state`. States of absent GPUs are ignored."""
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
    """Free the GPU memory that torch's allocator caches, so that an engine can use it. Does nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_usable() -> None:
    """Raise RloraError if torch can't use the GPU that Ray assigned to this process, or if the GPU lacks bfloat16."""
    if not torch.cuda.is_available():
        raise RloraError(f"GPU: Ray gave this process a GPU, but torch {torch.__version__} can't use it: {_reason()}")
    capability = torch.cuda.get_device_capability()
    if capability < _OLDEST:
        raise RloraError(
            f"GPU: {torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; bfloat16 "
            "needs 8.0 (Ampere) or later. Use a newer GPU, or train on the CPU: set engine.gpus and learner.gpus to 0"
        )


def _reason() -> str:
    needed = torch.version.cuda
    if needed is None:
        return "torch is built for CPUs; install rlora with the extra cuda, in a new environment"
    driver = next((card.driver for card in cards.list_cards()), None)
    oldest = _DRIVERS.get(needed.partition(".")[0])
    if driver and oldest and int(driver.partition(".")[0]) < int(oldest):
        return f"torch is built for CUDA {needed}, which needs driver {oldest} or later; update the driver ({driver})"
    return f"torch is built for CUDA {needed}; run `python -c 'import torch; torch.cuda.init()'` for the cause"


def card_uuid() -> str:
    """Return the UUID of this process's GPU; "" on a CPU."""
    return str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else ""


def room_of_learner(gpus: float) -> tuple[int, str]:
    """Return the bytes of this process's GPU that a learner may use if the learner reserved the share `gpus`, and a
    description of the share. Raises RloraError if other processes hold part of the share.
    """
    free, total = torch.cuda.mem_get_info()
    return cards.share_of_learner(free, total, gpus, torch.cuda.get_device_name())


def error_text(error: Exception) -> str:
    """Return the type and message of an error, with advice if the error is an out-of-memory error."""
    text = f"{type(error).__name__}: {error}"
    return f"{text}. {cards.MEMORY_ADVICE}" if isinstance(error, torch.OutOfMemoryError) else text


class Live(TorchDispatchMode):
    """Context that counts the bytes of live tensors that were created within it: `now`, and their maximum, `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._live = set[int]()

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        inputs = {_storage(tensor)._cdata for tensor in _tensors((arguments, options))}  # may be older: not counted
        outputs = operation(*arguments, **(options or {}))
        for tensor in _tensors(outputs):
            storage = _storage(tensor)
            if storage._cdata not in inputs and storage._cdata not in self._live:
                self._add(storage, storage.nbytes())
        return outputs

    def _add(self, storage: Any, size: int) -> None:
        self._live.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage._cdata, size)

    def _remove(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
