"""The parts of benchmarks/gpu.py that need vLLM and Ray: the engine alone, and the steps of a whole run.

    python benchmarks/gpu_engine.py MODEL --rank 1 --device cuda       what `engine` runs, in a process for each rank

- engine: seconds to start; completions' tokens/s under the base and under an adapter; swaps under load: seconds of
  each, and how far the canary is from the learner's; two versions in flight, each request answered under its own.
- whole: seconds of a step by phase, and the card's memory in use, of a recipe.
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
from rlora.records import BASE, Adapter, Prompt, Sampling
from rlora.settings import Config

POLICY = "benchmark"
WORDS = 97  # of the tokenizer that stands beside random weights


def engine(model: Path, ranks: Sequence[int], on_gpu: bool) -> dict[str, Any]:
    """A row for each rank."""
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
    """Medians over the steps of a run but the first."""
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
    """The most that is in use of the fullest card within, in GiB, by asking twice a second; nothing where there is
    none."""
    found: dict[str, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            for card in cards.list_cards():
                found["card_gib"] = max(found.get("card_gib", 0.0), (card.total - card.free) / cards.GIB)

    watching = threading.Thread(target=watch)
    if cards.list_cards():
        watching.start()
    try:
        yield found
    finally:
        over.set()
        if watching.ident:
            watching.join()


def save(model: Any, path: Path) -> None:
    """The model, and a tokenizer that vLLM can start with."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(WORDS)}
    model.save_pretrained(path)
    made = Tokenizer(WordLevel(words, unk_token="w2"))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w1").save_pretrained(path)


def versions(config: Config, base: str, count: int) -> list[Adapter]:
    """Of one policy, each a step of Adam's size from the one before, with the learner's canary."""
    learner = Learner(config, base)
    setup = Setup.of(config)
    made = [learner.open(POLICY, setup)]
    draw = torch.Generator().manual_seed(0)
    while len(made) < count:
        for master in learner.held[POLICY].optimizer.masters.values():
            step = torch.randn(master.shape, generator=draw).sign() * 5e-4
            master.data.add_(step.to(master.device))
        learner.held[POLICY].canary = None
        made.append(learner.next_version(POLICY))
    return made


def measure(model: str, rank: int, on_gpu: bool) -> dict[str, Any]:
    """The row of one rank, in a process of its own."""
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
    machine.release()
    start = time.perf_counter()
    served = Engine(config, model, (), (), slots=3, number=0, version=0)
    row: dict[str, Any] = {"rank": rank, "start_s": time.perf_counter() - start}
    prompts = [Prompt("", token_ids=tuple((7 * n + k) % WORDS for k in range(100))) for n in range(rows // 8)]
    sampling = Sampling(8, 1.0, tokens)

    def rate(version: Any) -> float:
        began = time.perf_counter()
        groups = [served.generate(prompt, sampling, version) for prompt in prompts]
        count = sum(len(episode.completion_ids) for group in groups for episode in group.result().episodes)
        return count / (time.perf_counter() - began)

    rate(BASE.version)  # the first is slower
    served.load(adapters[0]).result()
    pairs = [(rate(BASE.version), rate(adapters[0].version)) for _ in range(3)]  # in turns: a machine's speed moves
    row["base_tokens_per_s"], row["adapter_tokens_per_s"] = map(max, zip(*pairs, strict=True))
    row["adapter_costs"] = 1 - row["adapter_tokens_per_s"] / row["base_tokens_per_s"]
    times, far = [], []
    before = adapters[0]
    for adapter in adapters[1:]:  # under load: those of the version before are in flight
        flying = [served.generate(prompt, sampling, before.version) for prompt in prompts[:4]]
        began = time.perf_counter()
        served.load(adapter, oldest=before.number).result()
        times.append(time.perf_counter() - began)
        new = served.generate(prompts[0], sampling, adapter.version).result()  # with its canary
        assert {episode.version for episode in new.episodes} == {adapter.version}
        for group in flying:
            assert {episode.version for episode in group.result().episodes} == {before.version}
        far.append(served.stats().result().canaries[POLICY])
        before = adapter
    row |= {
        "swaps": swaps,
        "swap_median_s": median(times),
        "swap_longest_s": max(times),
        "canary_furthest_nats": max(far),
    }
    about = served.about().result()
    served.close().result()
    return row | {"kv_cache_gib": about.kv_cache / cards.GIB, "about": about.words}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    print(json.dumps(measure(options.model, options.rank, options.device == "cuda")), flush=True)
    os._exit(0)  # vLLM's threads would be waited for


if __name__ == "__main__":
    main()
