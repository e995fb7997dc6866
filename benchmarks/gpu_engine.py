"""The parts of benchmarks/gpu.py that need vLLM and Ray: the engine alone, and the steps of a whole run.

    python benchmarks/gpu_engine.py MODEL --rank 1 --device cuda       (`engine` runs this in a process per rank)

- engine: start-up time; completion tokens/s with the base and with an adapter; swaps under load: their duration and the
  canary's distance from the learner; two versions in flight, each request finished under its own version.
- whole: seconds per step by phase, and the GPU's memory in use, for a recipe.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rlora import cards, machine
from rlora.config import validate
from rlora.core.learner import Learner
from rlora.core.setup import Setup
from rlora.device import release
from rlora.records import BASE, Adapter, Prompt, Sampling
from rlora.settings import Config

POLICY = "benchmark"
WORDS = 97  # size of the tokenizer for random weights


def engine(model: Path, ranks: Sequence[int], on_gpu: bool) -> dict[str, Any]:
    """One row per rank."""
    rows = []
    for rank in ranks:
        command = [sys.executable, __file__, str(model), "--rank", str(rank), "--device", "cuda" if on_gpu else "cpu"]
        environment = machine.engine_environment(machine.cores(), 1, on_gpu)
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return {"rows": rows, "failed": f"rank {rank}: the process ended with {done.returncode}"}
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return {"rows": rows}


def whole(recipe: Path, steps: int, changes: Sequence[str]) -> dict[str, Any]:
    """Medians over the steps of a run, without the first step."""
    with tempfile.TemporaryDirectory() as directory, memory_in_use() as memory:
        run = Path(directory) / "run"
        command = [sys.executable, "-m", "rlora", "train", str(recipe), "--run-dir", str(run), "--steps", str(steps)]
        done = subprocess.run(
            [*command, *changes], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            return {"failed": done.stdout.strip().splitlines()[-1]}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (placed,) = [line for line in done.stdout.splitlines() if line.startswith("learner on ")]
    names = (
        "time/step",
        "time/sampling",
        "time/update",
        "time/swap",
        "rollout/tokens_per_second",
        "learner/tokens_per_second",
    )
    row = {name: median(line.get(name) or 0.0 for line in lines[1:]) for name in names}
    return {"rows": [{"recipe": recipe.name, "steps": steps, **row, **memory}], "placed": placed}


@contextmanager
def memory_in_use() -> Iterator[dict[str, float]]:
    """Peak memory in use of the fullest GPU, in GiB, sampled twice per second; empty without a GPU."""
    memory: dict[str, float] = {}
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(0.5):
            for card in cards.list_cards():
                memory["card_gib"] = max(memory.get("card_gib", 0.0), (card.total - card.free) / cards.GIB)

    watching = threading.Thread(target=watch)
    if cards.list_cards():
        watching.start()
    try:
        yield memory
    finally:
        stopped.set()
        if watching.ident:
            watching.join()


def save(model: Any, path: Path) -> None:
    """Save the model, and a tokenizer that vLLM can start with."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(WORDS)}
    model.save_pretrained(path)
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(path)


def versions(config: Config, base: str, count: int) -> list[Adapter]:
    """Versions of one policy, each one Adam-sized step after the previous one, with the learner's canary."""
    learner = Learner(config, base)
    setup = Setup.of(config)
    adapters = [learner.open(POLICY, setup)]
    draw = torch.Generator().manual_seed(0)
    while len(adapters) < count:
        for master in learner.states[POLICY].optimizer.masters.values():
            step = torch.randn(master.shape, generator=draw).sign() * 5e-4
            master.data.add_(step.to(master.device))
        learner.states[POLICY].canary = None
        adapters.append(learner.next_version(POLICY))
    return adapters


def measure(model: str, rank: int, on_gpu: bool) -> dict[str, Any]:
    """Measure one rank. Call it in a separate process."""
    from rlora.engine.vllm_engine import Engine

    rows, tokens, swaps = (256, 256, 50) if on_gpu else (8, 8, 5)
    config = validate(
        {
            "model": model, "env": "-", "reward": "-", "learner": {"rank": rank, "gpus": 0.5 * on_gpu},
            "engine": {"gpus": 0.5 * on_gpu}, "sampling": {"max_tokens": tokens, "max_prompt_tokens": 128},
        }
    )  # fmt: skip
    adapters = versions(config, model, swaps + 1)
    gc.collect()
    release()
    start = time.perf_counter()
    served = Engine(config, model, slots=3, number=0, version=0)
    row: dict[str, Any] = {"rank": rank, "start_s": time.perf_counter() - start}
    prompts = [Prompt("", token_ids=tuple((7 * n + k) % WORDS for k in range(100))) for n in range(rows // 8)]
    sampling = Sampling(8, 1.0, tokens)

    def rate(version: Any) -> float:
        began = time.perf_counter()
        groups = [served.generate(prompt, sampling, version) for prompt in prompts]
        count = sum(len(episode.completion_ids) for group in groups for episode in group.result().episodes)
        return count / (time.perf_counter() - began)

    rate(BASE.version)  # the first call is slower
    served.load(adapters[0]).result()
    pairs = [(rate(BASE.version), rate(adapters[0].version)) for _ in range(3)]  # in turn: a machine's speed varies
    row["base_tokens_per_s"], row["adapter_tokens_per_s"] = map(max, zip(*pairs, strict=True))
    row["adapter_costs"] = 1 - row["adapter_tokens_per_s"] / row["base_tokens_per_s"]
    times, far = [], []
    previous = adapters[0]
    for adapter in adapters[1:]:  # under load: requests of the previous version are in flight
        flying = [served.generate(prompt, sampling, previous.version) for prompt in prompts[:4]]
        began = time.perf_counter()
        served.load(adapter, oldest=previous.number).result()
        times.append(time.perf_counter() - began)
        new = served.generate(prompts[0], sampling, adapter.version).result()  # runs with the canary
        assert {episode.version for episode in new.episodes} == {adapter.version}
        for group in flying:
            assert {episode.version for episode in group.result().episodes} == {previous.version}
        far.append(served.stats().result().canaries[POLICY])
        previous = adapter
    row |= {
        "swaps": swaps,
        "swap_median_s": median(times),
        "swap_longest_s": max(times),
        "canary_furthest_nats": max(far),
    }
    info = served.about().result()
    served.close().result()
    return row | {"kv_cache_gib": info.kv_cache / cards.GIB, "about": info.description}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.rank, options.device == "cuda")), flush=True)
    os._exit(0)  # do not wait for vLLM's threads


if __name__ == "__main__":
    main()
