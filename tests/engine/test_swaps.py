"""Many swaps in one engine: each is verified, and nothing accumulates."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import safetensors.torch
import torch
from conftest import Solo, save_words, tiny_model

from rlora import cluster
from rlora.machine import adapter_directory, ram_directory
from rlora.records import Prompt, Sampling
from rlora.rollout.task import ServedPolicy, load_task
from rlora.settings import Config

pytestmark = pytest.mark.vllm


def states(state: bytes) -> Iterator[bytes]:
    """Successive states of a learner, each one version and one Adam-sized step after the previous one."""
    tensors = safetensors.torch.load(state)
    generator = torch.Generator().manual_seed(0)
    while True:
        tensors["version"] += 1
        for name, tensor in tensors.items():
            if name.endswith(".master"):
                tensor.add_(torch.randn(tensor.shape, generator=generator).sign(), alpha=5e-4)
        yield safetensors.torch.save(tensors)


def anonymous_mib(pid: int) -> float:
    """The process's anonymous memory. Pages of files are not counted: the kernel may drop them at any time."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1]) / 1024


def in_ram(pid: int) -> list[str]:
    """Names of the engine's files in the RAM file system, versions without their numbers."""
    openmp = [path.name for path in ram_directory().glob(f"*_{pid}_*")]
    return sorted(openmp + [path.name.rpartition("-v")[0] or path.name for path in adapter_directory(pid).rglob("*")])


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_swaps_leave_nothing_behind(config: Callable[..., Config], tmp_path: Path, count: int) -> None:
    base = str(tmp_path)
    tiny_model("llama", hidden_size=512, intermediate_size=4096).save_pretrained(base)  # 1 MB per version of rank 8
    save_words(base)
    small = config(sampling={"max_tokens": 8, "max_prompt_tokens": 40}, learner={"rank": 8})
    task = replace(load_task(small), base=base)
    learner = Solo(small, base)
    prompts = [Prompt("", token_ids=tuple(range(start, start + 5))) for start in (5, 17, 40)]
    memory, shm = [], []
    with cluster.start([ServedPolicy("run", small, task)], learn=False) as job:
        fleet = job.fleet
        engine: Any = fleet.engines[0]
        _, pid = ray.get(engine.process)
        adapter = learner.adapter()
        fleet.swap(adapter)
        for number, state in enumerate(states(learner.state())):
            requests = [fleet.generate(prompt, Sampling(4, 1.0, 2), "run") for prompt in prompts]  # and the canary
            for request in requests:
                (version,) = {episode.version for episode in request.group.result(60).episodes}
                assert version == adapter.version
            assert engine.stats().result().canaries["run"] < 1e-4
            memory.append(anonymous_mib(pid))
            shm.append(in_ram(pid))
            if number == count:
                break
            adapter = learner.resume(state)
            receipts = fleet.swap(adapter)
            assert [receipt.digest for receipt in receipts] == [adapter.digest]
        assert adapter.number == count
        assert engine.versions().result() == [adapter.version]
        assert len(engine.lora_ids().result()) == 1
        assert [path.name for path in adapter_directory(pid).iterdir()] == [adapter.name]
    early, late = (sorted(part)[len(part) // 2] for part in (memory[count // 4 : count // 2], memory[-count // 4 :]))
    # Less than a quarter of the MiB that were loaded in between. The process grows once by about 5 MiB whatever the
    # versions' size, which is why they have 1 MB: with 0.1 MB that growth exceeded the bound in some runs.
    assert late - early < count / 2 * len(adapter.weights) / 2**20 / 4
    assert shm[-1] == shm[count // 4]
