"""The cost of loading the next version into an engine, and the cost of an adapter in the engine.

    .venv/bin/python benchmarks/delivery.py            about forty minutes on two cores
    .venv/bin/python benchmarks/delivery.py --quick    fewer swaps, no stock engine, no runs, no kills

All measurements use SmolLM2-135M in bf16 with a rank-1 adapter on every weight matrix, and 128 sequences (16 prompts x
8 completions of at most 32 tokens). Versions are one Adam-sized step apart. The engines are separate Ray actors, which
run one after the other:

- swaps: from the learner's tensors until the engine has verified file and slot, on an idle and on a busy engine. The
  canary runs with a version's first prompt (`swap_and_canary`: until it has passed, one engine step more). For
  comparison: (a) the adapter merged into the base and all weights reloaded in place (`reload_weights`, the fastest way
  that vLLM has; the transfer to the engine is not counted), and (b) PEFT's save to disk and vLLM's load from there,
  without verification.
- sampling: tokens/s with and without the adapter in turn; with vLLM's own low-rank product in the same engine; with
  unmodified vLLM (its defaults, its own processes); and with unmodified vLLM without an adapter, compiled.
- runs: seconds per step of a short run with `max_staleness` 0 and 1, and the share of verification: file and slot, the
  canary in the engine, and the canary in the learner.
- kills: how much longer a step's sampling takes if an engine is killed during it.

The last line printed is one JSON object.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import psutil
import ray
import safetensors.torch
import torch
from peft import get_peft_model
from peft.config import PeftConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from rlora import cluster, machine
from rlora.cluster import processes
from rlora.cluster.ranks import Ranks
from rlora.config import validate
from rlora.core import peft_format
from rlora.core.learner import Learner
from rlora.core.lora import matrices
from rlora.core.setup import Setup
from rlora.engine import vllm_engine
from rlora.engine.cpu import patches, sampling
from rlora.model.base import DEMO
from rlora.records import BASE, OFF, Adapter, Sampling
from rlora.rollout.fleet import Fleet, wait_for
from rlora.rollout.requests import Request
from rlora.rollout.task import ServedPolicy, Task, load_task
from rlora.run.start import read
from rlora.store import write_adapter

PROMPTS, SAMPLING = 16, Sampling(max_tokens=32, group_size=8)
LR = 5e-4  # size of the step between two versions
POLICY = "benchmark"
HERE, ROOT = Path(__file__), Path(__file__).resolve().parent.parent
CONFIG: dict[str, Any] = {
    "model": DEMO, "env": "rlora.envs.arithmetic:Arithmetic", "reward": "rlora.rewards.integer:integer_answer",
    "prompts_per_step": PROMPTS, "group_size": SAMPLING.group_size, "steps": 8, "learner": {"lr": LR},
    "sampling": {"max_tokens": SAMPLING.max_tokens, "max_prompt_tokens": 64}, "evaluate": {"prompts": 0},
}  # fmt: skip
SETUP = Setup.of(validate(CONFIG))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer swaps, no stock engine, no runs, no kills")
    parser.add_argument("--swaps", type=int, default=1000, help="on the idle engine")
    parser.add_argument("--stock", metavar="ADAPTER", help="only unmodified vLLM, with this adapter; - for none")
    options = parser.parse_args()
    task = load_task(validate(CONFIG))
    if options.stock:
        print(stock(task, None if options.stock == "-" else Path(options.stock)))
        return
    figures: dict[str, float] = {}

    def measured(more: dict[str, float]) -> None:
        figures.update(more)
        print(json.dumps(more), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as directory:
        saved = Path(directory) / "adapter"
        measured(ours(task, 30 if options.quick else options.swaps, saved))
        measured(merging(task, saved))
        measured(with_stock_op(task, saved))
        if not options.quick:
            measured({"tokens_per_s_stock": alone("--stock", str(saved))})
            measured({"tokens_per_s_compiled_off": alone("--stock", "-")})
            measured(runs())
            measured(kills(task))
    on, swap = figures["tokens_per_s_on"], figures["swap_ms_p50"]
    figures["adapter_on_over_off"] = on / figures["tokens_per_s_off"]
    figures["ours_over_tuned_stock_op"] = on / figures["tokens_per_s_stock_op"]
    figures["swap_vs_merge"] = figures["merge_ms_p50"] / swap
    figures["swap_vs_disk"] = figures["disk_ms_p50"] / swap
    if not options.quick:
        figures["ours_over_stock"] = on / figures["tokens_per_s_stock"]
        figures["ours_over_compiled_off"] = on / figures["tokens_per_s_compiled_off"]
        proof = sum(figures[f"{part}_ms_p50"] for part in ("proof", "canary", "learner_canary"))
        figures["proof_share"] = proof / 1000 / figures["step_s_staleness_0"]
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    print(json.dumps(figures))


# --- in the engine's actor ---


class Probe(vllm_engine.Engine):
    """An engine that also reports the duration of its steps, its memory, adapters and files."""

    def __init__(self, *made_of: Any) -> None:
        self.steps: list[float] = []
        super().__init__(*made_of)

    def _step(self) -> None:
        start = time.perf_counter()
        super()._step()
        self.steps.append(time.perf_counter() - start)

    def step_seconds(self) -> Future[list[float]]:
        """The duration of each step since the last call."""

        def take() -> list[float]:
            steps, self.steps = self.steps, []
            return steps

        return self._post(take)

    def holds(self) -> Future[tuple[float, int, int]]:
        """MiB of private memory, number of adapters in vLLM, and number of files in the adapter directory."""
        return self._post(
            lambda: (
                psutil.Process().memory_full_info().uss / 2**20,
                len(self.llm.list_loras()),
                sum(1 for path in machine.adapter_directory(os.getpid()).rglob("*") if path.is_file()),
            )
        )

    def load_from_disk(self, path: str) -> Future[None]:
        """Load an adapter with vLLM's own loader, under a new name, and remove it."""

        def load() -> None:
            number = next(self._engine_ids)
            self.llm.add_lora(LoRARequest(f"disk-{number}", number, path))
            self.llm.remove_lora(number)

        return self._post(load)


class StockOp(Probe):
    """The same engine with vLLM's own low-rank product; tokens are drawn as in rlora's engine."""

    def __init__(self, *made_of: Any) -> None:
        def without_the_product(head: bool) -> bool:
            TopKTopPSampler.forward_cpu = sampling.draw
            return False

        patches.install = without_the_product
        super().__init__(*made_of)


@contextmanager
def engines(task: Task, kind: type[Probe], learn: bool = False, **changes: Any) -> Iterator[tuple[Ranks, Fleet]]:
    """A learner, and a fleet of engines of class `kind` that use all cores each."""
    processes.ENGINE = f"{HERE}:{kind.__name__}"
    settings = {"engine": {"threads": machine.cores()}} | changes
    with cluster.start([ServedPolicy(POLICY, validate(CONFIG | settings), task)], learn=learn) as job:
        learners, fleet = job.learners, job.fleet
        yield learners.get(POLICY), fleet


# --- what is measured ---


def ours(task: Task, count: int, saved: Path) -> dict[str, float]:
    """Swaps on an idle and a busy engine, the cost of the canary, and sampling with and without the adapter."""
    figures: dict[str, float] = {}
    idle, proof, load, with_canary, without, busy, steps = ([] for _ in range(7))  # type: ignore[var-annotated]
    with engines(task, Probe, learn=True, max_staleness=2) as (learner, fleet):
        (probe,) = fleet.engines
        fresh = learner.open(POLICY, SETUP)  # B = 0: completions are as long as those of the base
        fleet.swap(fresh)
        batch(task, fleet)
        states = versions(learner.state(POLICY))

        def swap() -> tuple[float, Any]:
            """Swap to the next version. Returns the seconds until it is verified, and its receipt."""
            learner.close(POLICY)
            learner.open(POLICY, SETUP, next(states))
            start = time.perf_counter()
            proofs = fleet.swap(learner.adapter(POLICY))
            return time.perf_counter() - start, proofs[0]

        held = []
        for number in range(count):
            seconds, receipt = swap()
            idle.append(seconds), proof.append(receipt.proof_seconds), load.append(receipt.load_seconds)
            with_canary.append(timed(partial(token, task, fleet, 2 * number)))
            without.append(timed(partial(token, task, fleet, 2 * number + 1)))
            if number in (count // 10, count - 1):
                held.append(probe.holds().result())
        memory, adapters, files = (late - early for early, late in zip(*held, strict=True))
        figures |= {"swaps": count, "growth_mib": memory, "growth_adapters": adapters, "growth_files": files}

        for _ in range(4 if count < 100 else 12):
            probe.step_seconds().result()
            requests = [fleet.generate(prompt, SAMPLING, POLICY) for prompt in task.prompts[:PROMPTS]]
            for _ in range(2):  # more swaps would exceed max_staleness
                time.sleep(random.uniform(0.5, 1.5))
                busy.append(swap()[0])
            assert not all(request.group.done() for request in requests)  # the engine was busy
            finish(requests)
            steps += probe.step_seconds().result()[1:]  # the first step computes the prompts
        fleet.swap(fresh)
        rates: dict[int, list[float]] = {OFF: [], 0: []}
        for _ in range(3 if count < 100 else 8):
            for version in (0, OFF):
                rates[version].append(batch(task, fleet, base=version == OFF))

        write_adapter(fresh, saved)
        model = AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.bfloat16)
        model = get_peft_model(model, PeftConfig.from_pretrained(saved))

        def through_the_disk(path: str) -> None:
            model.save_pretrained(path)
            probe.load_from_disk(path).result()

        disk = [timed(lambda: through_the_disk(f"{saved}-{number}")) for number in range(20)]  # noqa: B023
    of_learner = Learner(validate(CONFIG), task.base)
    of_learner.open(POLICY, SETUP)
    in_learner = [timed(partial(of_learner.canary_of, of_learner.states[POLICY])) for _ in range(12)][2:]
    for name, seconds in (
        ("swap", idle), ("load", load), ("proof", proof), ("swap_busy", busy), ("step", steps), ("disk", disk),
        ("canary", [a - b for a, b in zip(with_canary, without, strict=True)]), ("learner_canary", in_learner),
        ("swap_and_canary", [a + b for a, b in zip(idle, with_canary, strict=True)]),
    ):  # fmt: skip
        figures[f"{name}_ms_p50"] = 1000 * median(seconds)
    figures["swap_ms_p99"] = 1000 * quantiles(idle, n=100)[98]
    figures["swap_busy_ms_max"] = 1000 * max(busy)
    figures |= {"tokens_per_s_on": median(rates[0]), "tokens_per_s_off": median(rates[OFF])}
    return figures | {"adapter_bytes": len(fresh.weights)}


def merging(task: Task, saved: Path) -> dict[str, float]:
    """Merge the adapter in fp32, round, write the weights to RAM, and reload them in place."""
    spec, tensors = peft_format.decode(*read(saved))
    base = AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.float32)
    config = (Path(task.base) / "config.json").read_bytes()
    factors = peft_format.matrices_by_name(matrix for matrix in matrices(base) if spec.rank_of(matrix))
    seconds = []
    fixed = {name: weight.to(torch.bfloat16) for name, weight in base.state_dict().items() if name != "lm_head.weight"}
    with torch.no_grad(), engines(task, Probe, learner={"adapter": "none"}) as (_, fleet):
        (probe,) = fleet.engines
        for version in range(6):
            start = time.perf_counter()
            merged = dict(fixed)  # embeddings and norms do not change; the head is tied
            for (a, b), matrix in factors.items():
                scale = spec.scale(matrix.key, spec.rank)
                weight = torch.addmm(matrix.weight, tensors[b], tensors[a], alpha=scale)
                merged[f"{matrix.key}.weight"] = weight.to(torch.bfloat16)
            weights = safetensors.torch.save(merged, {"format": "pt"})
            merge_seconds = time.perf_counter() - start
            adapter = Adapter(POLICY, version, config, weights, full_weights=True)
            seconds.append(merge_seconds + probe.load(adapter).result().load_seconds)
    return {"merge_ms_p50": 1000 * median(seconds[1:]), "merge_bytes": len(weights)}


def with_stock_op(task: Task, saved: Path) -> dict[str, float]:
    config, weights = read(saved)
    with engines(task, StockOp, max_staleness=2) as (_, fleet):
        fleet.swap(Adapter(POLICY, 1, config, weights))
        return {"tokens_per_s_stock_op": median([batch(task, fleet) for _ in range(6)][1:])}


def stock(task: Task, adapter: Path | None) -> float:
    """Tokens per second of vLLM with its defaults."""
    length = validate(CONFIG).max_model_len
    llm = LLM(task.base, enable_lora=adapter is not None, max_model_len=length, seed=0)
    request = LoRARequest("adapter", 1, str(adapter)) if adapter else None
    settings = SamplingParams(
        n=SAMPLING.group_size, temperature=1.0, max_tokens=SAMPLING.max_tokens, logprobs=0, detokenize=False,
        stop_token_ids=list(task.chat.stop_token_ids),
    )  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=list(prompt.token_ids)) for prompt in task.prompts[:PROMPTS]]
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        outputs = llm.generate(prompts, settings, lora_request=request, use_tqdm=False)
        tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        rates.append(tokens / (time.perf_counter() - start))
    return median(rates[1:])


def alone(*arguments: str) -> float:
    """Run this file with these arguments in a separate process. Returns the number that it prints."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, str(HERE), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def runs() -> dict[str, float]:
    """Seconds per step, without the first step."""
    figures = {}
    for staleness in (0, 1):
        with tempfile.TemporaryDirectory() as directory:
            toml, run = Path(directory) / "config.toml", Path(directory) / "run"
            table = CONFIG | {"max_staleness": staleness}
            toml.write_text("".join(f"{key} = {inline(value)}\n" for key, value in table.items()))
            command = [sys.executable, "-m", "rlora", "train", str(toml), "--run-dir", str(run)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        figures[f"step_s_staleness_{staleness}"] = fmean(line["time/step"] for line in lines[1:])
    return figures


def inline(value: Any) -> str:
    """The value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


def kills(task: Task) -> dict[str, float]:
    """Additional seconds of a step in which an engine is killed, with one and with two engines."""
    figures = {}
    for replicas in (1, 2):
        with engines(task, Probe, engine={"replicas": replicas, "kv_cache_gib": 1}) as (_, fleet):
            fleet.swap(Learner(validate(CONFIG), task.base).open(POLICY, SETUP))
            batch(task, fleet)

            def step(kill: bool, fleet: Fleet = fleet) -> None:
                requests = [fleet.generate(prompt, SAMPLING, POLICY) for prompt in task.prompts[:PROMPTS]]
                time.sleep(2.0)
                if kill:
                    _, pid = ray.get(fleet.engines[0].process)  # type: ignore[attr-defined]
                    os.kill(pid, signal.SIGKILL)
                finish(requests)

            unhurt = median([timed(lambda: step(False)) for _ in range(3)])
            figures[f"kill_s_{replicas}_engines"] = median([timed(lambda: step(True)) for _ in range(3)]) - unhurt
    return figures


def versions(state: bytes) -> Iterator[bytes]:
    """Yield learner states; each is one version and one Adam-sized step after the previous one."""
    tensors, generator = safetensors.torch.load(state), torch.Generator().manual_seed(0)
    while True:
        tensors["version"] += 1
        for name, tensor in tensors.items():
            if name.endswith(".master"):
                tensor.add_(torch.randn(tensor.shape, generator=generator).sign(), alpha=LR)
        yield safetensors.torch.save(tensors)


def batch(task: Task, fleet: Fleet, base: bool = False) -> float:
    """Tokens per second for 128 concurrent completions."""
    start = time.perf_counter()
    if base:
        (probe,) = fleet.engines
        sampled = [probe.generate(prompt, SAMPLING, BASE.version) for prompt in task.prompts[:PROMPTS]]
        groups = [future.result() for future in sampled]
    else:
        groups = finish([fleet.generate(prompt, SAMPLING, POLICY) for prompt in task.prompts[:PROMPTS]])
    tokens = sum(len(episode.completion_ids) for group in groups for episode in group.episodes)
    return tokens / (time.perf_counter() - start)


def token(task: Task, fleet: Fleet, number: int) -> None:
    """Sample one token of a prompt that is new to the version."""
    finish([fleet.generate(task.prompts[number % len(task.prompts)], Sampling(max_tokens=1), POLICY)])


def finish(requests: list[Request]) -> list[Any]:
    wait_for([request.group for request in requests], len(requests), 600.0, 120.0, lambda: None)
    return [request.group.result() for request in requests]


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
