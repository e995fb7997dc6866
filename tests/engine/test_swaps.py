"""Swap after swap in one engine: each proven, and nothing gathers."""

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
    """State after state of a learner, each a version and one Adam-sized step from the one before."""
    tensors = safetensors.torch.load(state)
    generator = torch.Generator().manual_seed(0)
    while True:
        tensors["version"] += 1
        for name, tensor in tensors.items():
            if name.endswith(".master"):
                tensor.add_(torch.randn(tensor.shape, generator=generator).sign(), alpha=5e-4)
        yield safetensors.torch.save(tensors)


def anonymous_mib(pid: int) -> float:
    """Memory that is the process's own: pages of files come and go as the system likes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Anonymous:")).split()[1]) / 1024


def in_ram(pid: int) -> list[str]:
    """What the engine has in the RAM file system, versions without their numbers."""
    openmp = [path.name for path in ram_directory().glob(f"*_{pid}_*")]
    return sorted(openmp + [path.name.rpartition("-v")[0] or path.name for path in adapter_directory(pid).rglob("*")])


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_swaps_leave_nothing_behind(config: Callable[..., Config], tmp_path: Path, count: int) -> None:
    base = str(tmp_path)
    tiny_model("llama", hidden_size=512, intermediate_size=4096).save_pretrained(base)  # of rank 8, 1 MB a version
    save_words(base)
    small = config(sampling={"max_tokens": 8, "max_prompt_tokens": 40}, learner={"rank": 8})
    task = replace(load_task(small), base=base)
    learner = Solo(small, base)
    prompts = [Prompt("", token_ids=tuple(range(start, start + 5))) for start in (5, 17, 40)]
    memory, shm = [], []
    with cluster.start([ServedPolicy("run", small, task)], learn=False) as job:
        fleet = job.fleet
        engine: Any = fleet.engines[0]
        _, pid = ray.get(engine.placed)
        adapter = learner.adapter()
        fleet.swap(adapter)
        for number, state in enumerate(states(learner.state())):
            # and the version's canary
            sampled = [fleet.generate(prompt, Sampling(4, 1.0, 2), "run") for prompt in prompts]
            for request in sampled:
                (version,) = {episode.version for episode in request.group.result(60).episodes}
                assert version == adapter.version
            assert engine.stats().result().canaries["run"] < 1e-4
            memory.append(anonymous_mib(pid))
            shm.append(in_ram(pid))
            if number == count:
                break
            adapter = learner.resume(state)
            proofs = fleet.swap(adapter)
            assert [proof.digest for proof in proofs] == [adapter.digest]
        assert adapter.number == count
        assert engine.versions().result() == [adapter.version]
        assert len(engine.loaded().result()) == 1
        assert [path.name for path in adapter_directory(pid).iterdir()] == [adapter.name]
    early, late = (sorted(part)[len(part) // 2] for part in (memory[count // 4 : count // 2], memory[-count // 4 :]))
    # MiB: a quarter of what was loaded between. The process grows by some 5 once, whatever the versions' size: with
    # versions of 0.1 MB that was above the bound in some runs
    assert late - early < count / 2 * len(adapter.weights) / 2**20 / 4
    assert shm[-1] == shm[count // 4]
