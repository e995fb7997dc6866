"""rlora on one GPU: correctness, waits for the device, kernels, speed and memory.

    python benchmarks/gpu.py                           all parts at Qwen3-0.6B's and 8B's shapes
    python benchmarks/gpu.py --device cpu              the same parts with a tiny model, in seconds
    python benchmarks/gpu.py --parts correct speed --sizes 0.6b --seconds 200

The first five parts need neither vLLM nor Ray. Only `whole` needs a network: the models of the other parts have random
weights. In addition to torch, transformers, safetensors and PEFT they need the imports of `rlora.core.learner`
(pydantic, universal-pathlib). A part that lacks a package is skipped with a message. No part starts after `--seconds`.

- correct: logprobs, loss and gradients of one update on the CPU in fp32 (the reference) and bf16, and on the device in
  fp32, in bf16, and with checkpointing. In bf16 a device may be about as far off as bf16 on the CPU.
- waits: the source lines at which an update makes the host wait for the device (`torch.cuda.set_sync_debug_mode`).
- attention: the kernels that run for one layer's attention, and its time and memory with each of torch's backends.
- profile: the time of one update by kind of kernel, the number of kernels, and the share of the time that the device is
  busy.
- speed: tokens/s and peak memory of updates with many short completions (GSM8K) and with few long ones, for rlora with
  and without checkpointing, and for PEFT with padded rows and no mask, so that torch uses its flash kernel. `again`
  repeats the same groups; `fresh` has different lengths in each update, as in training.
- engine: vLLM alone, at rank 1 and 8: start-up, tokens/s with and without an adapter, swaps under load, canaries.
- whole: seconds per step by phase, and memory, for a recipe (`--recipe`): Ray, vLLM and the learner together.

The last line printed is a JSON object with a key per part; the tables before it are Markdown.
"""

import argparse
import gc
import json
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from rlora.config import validate
from rlora.core import attention
from rlora.core.batch import sample_of
from rlora.core.flash import Segments
from rlora.core.footprint import cpu_rows, fitting_rows
from rlora.core.learner import Learner
from rlora.core.setup import Setup
from rlora.records import Episode, Group, Prompt, Version

POLICY = "benchmark"
SIZES: dict[str, dict[str, Any]] = {  # shapes of Qwen3
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "head_dim": 32, "intermediate_size": 128, "vocab_size": 512, "tie_word_embeddings": False},
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
             "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False},
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The size of the groups of an update; lengths are in tokens."""

    prompts: int
    group_size: int
    prompt: int
    shortest: int
    longest: int


SHAPES = {
    "gsm8k": Shape(4, 16, 150, 100, 500),
    "long": Shape(1, 4, 600, 3000, 4000),
    "few": Shape(2, 3, 150, 60, 90),  # small enough for fp32 on a CPU
    "tiny": Shape(2, 3, 9, 3, 12),
}
LAUNCH = Path(__file__).resolve().parent.parent / "launch"
QWEN, SUMS = LAUNCH / "gpu" / "qwen3-1.7b-24gb.toml", LAUNCH / "arithmetic.toml"
PADDED_ROW = 16384  # tokens per forward pass of PEFT, including padding
KINDS = {  # kinds of kernels, by parts of their names; the first match counts
    "attention": ("flash", "fmha", "sdpa", "cudnn", "attention"),
    "matrix products": ("gemm", "gemv", "cutlass", "nvjet", "splitk", "cublas", "xmma", "aten::mm", "addmm", "matmul"),
    "copies": ("memcpy", "memset", "copy", "cat", "index", "gather", "aten::to"),
    "reductions": ("reduce", "softmax", "norm", "sum"),
    "elementwise": ("elementwise", "vectorized", "unrolled", "fill", "aten::mul", "aten::add"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="for the part speed; profile uses the last one")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=540, help="no part and no row of speed starts after this")
    parser.add_argument("--recipe", type=Path, help="for the part whole")
    parser.add_argument("--out", type=Path, help="a file for the JSON object")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU (torch.cuda.is_available() is false); use --device cpu")
    sizes = options.sizes or (["0.6b", "8b"] if options.device == "cuda" else ["tiny"])
    recipe = options.recipe or (QWEN if options.device == "cuda" else SUMS)
    deadline = time.monotonic() + options.seconds
    bench = Bench(torch.device(options.device), sizes, options.rank, deadline, recipe)
    found: dict[str, Any] = {"environment": environment(bench.device)}
    print(json.dumps(found["environment"]), flush=True)
    for name in options.parts:
        print(f"\n## {name}\n", flush=True)
        found[name] = PARTS[name](bench) if bench.has_time() else "not begun: --seconds are over"
        release()
    if options.out:
        options.out.write_text(json.dumps(found))
    print(json.dumps(found))


@dataclass(frozen=True)
class Bench:
    """The device and settings of all parts."""

    device: torch.device
    sizes: Sequence[str]
    rank: int
    deadline: float  # on the clock of time.monotonic
    recipe: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def has_time(self) -> bool:
        return time.monotonic() < self.deadline

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of one call, including the device's work."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    @contextmanager
    def peak(self, row: dict[str, Any]) -> Iterator[None]:
        """Write the peak of allocated memory in this context to `row`, in GiB; nothing on a CPU."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.on_gpu:
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)


def environment(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__}
    for package in ("transformers", "peft", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        found |= {"gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)}
    return found


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print("|", " | ".join(f"{v:.5g}" if isinstance(v := row.get(n, ""), float) else str(v) for n in names), "|")


# --- models, groups and learners ---


def build(size: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A Qwen3 of this size with random weights, created on the device."""
    config = Qwen3Config(
        **SIZES[size], max_position_embeddings=40960, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def make_groups(shape: Shape, vocabulary: int, seed: int) -> list[Group]:
    """Groups of random tokens and rewards; each has a correct and a wrong episode, so all carry a gradient."""
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(count))

    def episode(index: int) -> Episode:
        count = draw.randint(shape.shortest, shape.longest)
        ids, logprobs = tokens(count), (-float(torch.tensor(float(vocabulary)).log()),) * count
        reward = float(index) if index < 2 else float(draw.random() < 0.5)
        return Episode(ids, logprobs, "stop", Version("benchmark", 0), reward=reward)

    return [
        Group(Prompt("", token_ids=tokens(shape.prompt)), tuple(episode(index) for index in range(shape.group_size)))
        for _ in range(shape.prompts)
    ]


def completion_tokens(groups: Sequence[Group]) -> int:
    return sum(len(episode.completion_ids) for group in groups for episode in group.episodes)


def learner_over(model: PreTrainedModel, bench: Bench, **settings: Any) -> Learner:
    """rlora's learner on a model that is already loaded."""
    config = validate(
        {
            "model": "-", "env": "-", "reward": "-", "dtype": str(model.dtype).removeprefix("torch."),
            "learner": {"rank": bench.rank, "lr": 1e-5} | settings,
            "sampling": {"max_tokens": 4096, "max_prompt_tokens": 1024},
        }
    )  # fmt: skip
    rows = cpu_rows(config)
    if model.device.type == "cuda":
        total = torch.cuda.get_device_properties(model.device).total_memory
        rows = fitting_rows(config, model.config, int(0.9 * total), "nine tenths of the card")
    with (
        mock.patch("rlora.core.learner.load_base", return_value=model),
        mock.patch("rlora.core.learner.rows_for", return_value=rows),
        mock.patch("rlora.device.current_device", return_value=model.device),
    ):
        learner = Learner(config, "random weights")
        learner.open(POLICY, Setup.of(config))
    return learner


# --- correct ---


def correct(bench: Bench) -> dict[str, Any]:
    size, shape = ("0.6b", SHAPES["few"]) if bench.on_gpu else ("tiny", SHAPES["tiny"])
    cpu = torch.device("cpu")
    base = build(size, torch.float32, cpu)
    with torch.no_grad():
        for weight in base.parameters():  # values that bf16 holds, so that no side rounds the base
            weight.copy_(weight.bfloat16())
    groups = make_groups(shape, SIZES[size]["vocab_size"], 1)
    sides = [("cpu", cpu, torch.float32, False), ("cpu", cpu, torch.bfloat16, False)]
    sides += [
        (bench.device.type, bench.device, dtype, False) for dtype in (torch.float32, torch.bfloat16)
    ] * bench.on_gpu
    sides += [(bench.device.type, bench.device, torch.float32, True)]
    rows: list[dict[str, Any]] = []
    reference: tuple[Tensor, Tensor] | None = None
    for name, device, dtype, checkpointing in sides:
        learner = learner_over(deepcopy(base).to(device, dtype), bench, checkpointing=checkpointing, max_grad_norm=1e9)
        generator = torch.Generator().manual_seed(5)
        for pair in learner.policies.bank.pairs_of(POLICY).values():  # B = 0 would make the gradient of A 0
            pair.b.data.copy_(torch.randn(pair.b.shape, generator=generator) * 1e-3)
        logprobs = logprobs_of(learner, groups)
        if reference is None:
            groups = on_policy(groups, logprobs)
        _, stats = learner.update(POLICY, groups)
        optimizer = learner.states[POLICY].optimizer
        moments = [optimizer.adam.state[master]["exp_avg"] for master in optimizer.masters.values()]
        gradient = torch.cat([each.flatten().double().cpu() for each in moments])  # times 1 - beta, for all sides
        reference = reference or (logprobs, gradient)
        difference = (logprobs - reference[0]).abs()
        rows.append({
            "device": name, "dtype": str(dtype).removeprefix("torch."), "checkpointing": checkpointing,
            "logprobs, mean difference": difference.mean().item(), "logprobs, largest": difference.max().item(),
            "loss": stats.loss, "gradient, cosine": cosine_similarity(gradient, reference[1], dim=0).item(),
            "gradient, norm": (gradient.norm() / reference[1].norm()).item(),
        })  # fmt: skip
        del learner
        release()
    table(rows)
    rounding = rows[1]
    return {"size": size, "rows": rows, "as_expected": all(as_expected(row, rounding) for row in rows)}


def as_expected(row: dict[str, Any], rounding: dict[str, Any]) -> bool:
    """Whether a side is close enough to fp32 on the CPU; in bf16, at most twice as far as bf16 on the CPU."""
    if row["dtype"] == "float32":
        return bool(row["logprobs, mean difference"] < 1e-4 and row["gradient, cosine"] > 0.9999)
    return bool(
        row["logprobs, mean difference"] <= 2 * rounding["logprobs, mean difference"]
        and 1 - row["gradient, cosine"] <= 2 * (1 - rounding["gradient, cosine"]) + 1e-3
    )


@torch.no_grad()
def logprobs_of(learner: Learner, groups: Sequence[Group]) -> Tensor:
    """The logprob of each completion token, group by group: (C,) fp32 on the CPU."""
    samples = [[sample_of(group.prompt.token_ids, episode) for episode in group.episodes] for group in groups]
    return torch.cat([logprobs for of_group in learner.forward(POLICY, samples) for logprobs in of_group])


def on_policy(groups: Sequence[Group], logprobs: Tensor) -> list[Group]:
    """The groups with `logprobs`, (C,), as behaviour logprobs."""
    left = iter(logprobs.tolist())
    return [
        replace(
            group,
            episodes=tuple(
                replace(episode, behaviour_logprobs=tuple(next(left) for _ in episode.completion_ids))
                for episode in group.episodes
            ),
        )
        for group in groups
    ]


# --- waits ---


def waits(bench: Bench) -> dict[str, Any]:
    if not bench.on_gpu:
        print("A CPU has nothing to wait for.")
        return {"waits": 0, "by_line": {}}
    learner = learner_over(build("0.6b", torch.bfloat16, bench.device), bench)
    groups = make_groups(SHAPES["gsm8k"], SIZES["0.6b"]["vocab_size"], 2)[:2]
    learner.update(POLICY, groups)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        learner.update(POLICY, groups)
        torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message))
    table([{"line": line, "waits": count} for line, count in lines.most_common()])
    return {"waits": lines.total(), "by_line": dict(lines.most_common())}


# --- attention ---


def attention_part(bench: Bench) -> dict[str, Any]:
    heads, kv_heads, dim, prompt, lengths = (32, 8, 128, 600, (3001, 3407)) if bench.on_gpu else (4, 2, 16, 9, (12, 17))
    completions, dtype = 2, torch.bfloat16

    def layer(length: int) -> Callable[[], None]:
        """Forward and backward attention of two completions of this length with their prompt, as in a row."""
        keys = prompt + length
        q, k, v = (
            torch.randn(completions, n, tokens, dim, device=bench.device, dtype=dtype, requires_grad=True)
            for n, tokens in ((heads, length), (kv_heads, keys), (kv_heads, keys))
        )
        seen = torch.ones(length, keys, dtype=torch.bool).tril(prompt)
        bias = torch.zeros(length, keys, dtype=dtype).masked_fill_(~seen, float("-inf"))[None, None].to(bench.device)
        return lambda: attention._attention(q, k, v, bias, dim**-0.5).sum().backward()

    with profile(activities=activities(bench)) as found:
        layer(lengths[0])()
        bench.synchronize()
    kernels = [name for name, _ in by_name(found, bench).most_common(4)]
    print(f"Kernels: {', '.join(kernels)}\n")
    backends = {"as torch chooses": None}
    if bench.on_gpu:
        backends |= {
            b.name.lower(): b for b in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
        }
    rows = []
    for name, backend in backends.items():
        for length in lengths:  # two odd lengths: a mask with unaligned rows, and a new shape
            row: dict[str, Any] = {"backend": name, "completion": length}
            rows.append(row)
            try:
                call = layer(length)
                with sdpa_kernel(backend) if backend else nullcontext(), bench.peak(row):
                    row["first, ms"] = 1e3 * bench.timed(call)
                    row["then, ms"] = 1e3 * min(bench.timed(call) for _ in range(3))
            except RuntimeError as error:  # the backend does not support it, or is out of memory
                row["error"] = str(error).splitlines()[0][:80]
            release()
    rows += [by_segments(bench, heads, kv_heads, dim, prompt, length) for length in lengths]
    table(rows)
    return {"kernels": kernels, "rows": rows}


def by_segments(bench: Bench, heads: int, kv_heads: int, dim: int, prompt: int, length: int) -> dict[str, Any]:
    """The same attention with the kernels that the learner uses on a GPU."""
    tokens, row = prompt + 2 * length, dict[str, Any](backend="by segments, as the learner does", completion=length)
    segments = Segments.from_lengths([(prompt, [length] * 2)], bench.device)
    q, k, v = (
        torch.randn(tokens, n, dim, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )

    def call() -> None:
        segments.attend(q, k, v, dim**-0.5).sum().backward()

    with bench.peak(row):
        row["first, ms"] = 1e3 * bench.timed(call)
        row["then, ms"] = 1e3 * min(bench.timed(call) for _ in range(3))
    return row


# --- profile ---


def activities(bench: Bench) -> list[ProfilerActivity]:
    return [ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU]


def by_name(found: profile, bench: Bench) -> Counter[str]:
    """Microseconds per kernel; on a CPU, per operator."""
    times: Counter[str] = Counter()
    for event in found.key_averages():
        times[event.key[:80]] += event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total
    return times


def profile_part(bench: Bench) -> dict[str, Any]:
    size = bench.sizes[-1]
    shape = SHAPES["gsm8k" if bench.on_gpu else "tiny"]
    groups = make_groups(replace(shape, prompts=1), SIZES[size]["vocab_size"], 3)
    learner = learner_over(build(size, torch.bfloat16, bench.device), bench)
    learner.update(POLICY, groups)
    seconds = bench.timed(lambda: learner.update(POLICY, groups))
    with profile(activities=activities(bench)) as found:
        learner.update(POLICY, groups)
        bench.synchronize()
    times = by_name(found, bench)
    kinds: Counter[str] = Counter()
    for name, spent in times.items():
        kinds[next((kind for kind, words in KINDS.items() if any(w in name.lower() for w in words)), "other")] += spent
    busy = times.total() / 1e6
    table([{"kind": kind, "ms": spent / 1e3} for kind, spent in kinds.most_common()])
    launches = sum(event.count for event in found.key_averages())
    print(f"\n{completion_tokens(groups)} tokens in {seconds:.3f} s, {launches} kernels, busy {busy / seconds:.2f}")
    return {
        "size": size, "tokens": completion_tokens(groups), "seconds": seconds, "busy": busy / seconds,
        "launches": launches, "kinds_ms": {kind: spent / 1e3 for kind, spent in kinds.items()},
        "most_ms": {name: spent / 1e3 for name, spent in times.most_common(10)},
    }  # fmt: skip


# --- speed ---


def speed(bench: Bench) -> dict[str, Any]:
    sides: dict[str, dict[str, Any] | None] = {
        "rlora": {}, "rlora, checkpointing": {"checkpointing": True, "microbatch_tokens": 16384}, "peft": None
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for size in bench.sizes:
        for shape in ("gsm8k", "long") if bench.on_gpu else ("tiny",):
            for side, settings in sides.items():
                if bench.has_time():
                    rows.append({"size": size, "groups": shape, "side": side} | _speed(bench, size, shape, settings))
                    release()
    table(rows)
    return {"rows": rows}


def _speed(bench: Bench, size: str, shape: str, settings: dict[str, Any] | None) -> dict[str, Any]:
    vocabulary, row = SIZES[size]["vocab_size"], {}
    model = build(size, torch.bfloat16, bench.device)
    try:
        step = (
            peft_step(model, bench)
            if settings is None
            else partial(learner_over(model, bench, **settings).update, POLICY)
        )
        first = make_groups(SHAPES[shape], vocabulary, 10)
        fresh = [make_groups(SHAPES[shape], vocabulary, seed) for seed in (20, 21)]
        with bench.peak(row):
            step(first)
            again = min(bench.timed(lambda: step(first)) for _ in range(2))
            seconds = [bench.timed(lambda groups=groups: step(groups)) for groups in fresh]  # type: ignore[misc]
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    tokens = completion_tokens(first)
    return {
        "tokens": tokens, "again, tokens/s": round(tokens / again),
        "fresh, tokens/s": round(sum(map(completion_tokens, fresh)) / sum(seconds)), **row,
    }  # fmt: skip


def peft_step(model: PreTrainedModel, bench: Bench) -> Callable[[Sequence[Group]], None]:
    """An update with PEFT on padded rows, sorted by length; padding is at the end, so no mask is needed."""
    from peft import LoraConfig, get_peft_model

    model.set_attn_implementation("sdpa")
    tuned = get_peft_model(model, LoraConfig(r=bench.rank, lora_alpha=32, target_modules="all-linear")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, lr=1e-5, betas=(0.9, 0.95), eps=1e-12)
    body, head = model.base_model, model.get_output_embeddings()

    def logprobs_of(hidden: Tensor, targets: Tensor) -> Tensor:
        logprobs: Tensor = head(hidden).float().log_softmax(-1)
        return logprobs.gather(1, targets[:, None])[:, 0]

    def put(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(bench.device)

    def backward(rows: Sequence[tuple[Sequence[int], Episode, float]], total: int) -> None:
        longest = max(len(prompt) + len(episode.completion_ids) for prompt, episode, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        places: list[int] = []
        for i, (prompt, episode, _) in enumerate(rows):
            text = [*prompt, *episode.completion_ids]
            ids[i, : len(text)] = torch.tensor(text)
            places += range(i * longest + len(prompt) - 1, i * longest + len(text) - 1)
        targets = put([token for _, episode, _ in rows for token in episode.completion_ids], torch.int64)
        behaviour = put([logprob for _, episode, _ in rows for logprob in episode.behaviour_logprobs])
        advantages = put([advantage for _, episode, advantage in rows for _ in episode.completion_ids])
        with torch.autocast(bench.device.type, torch.bfloat16):
            hidden = body(input_ids=ids.to(bench.device), use_cache=False).last_hidden_state.flatten(0, 1)
            chunks = zip(hidden[put(places, torch.int64)].split(2048), targets.split(2048), strict=True)
            logprobs = torch.cat([checkpoint(logprobs_of, *chunk, use_reentrant=False) for chunk in chunks])
        ratio = (logprobs - behaviour).exp().clamp(max=2.0)
        (-(ratio * advantages).sum() / total).backward()

    def step(groups: Sequence[Group]) -> None:
        adam.zero_grad()
        rows = []
        for group in groups:
            mean = sum(group.rewards) / len(group.rewards)
            rows += [(group.prompt.token_ids, episode, (episode.reward or 0.0) - mean) for episode in group.episodes]
        rows.sort(key=lambda row: len(row[0]) + len(row[1].completion_ids))
        while rows:
            longest = len(rows[-1][0]) + len(rows[-1][1].completion_ids)
            count = max(1, PADDED_ROW // longest)
            backward(rows[-count:], completion_tokens(groups))
            del rows[-count:]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()

    return step


# --- engine and whole ---


def engine_part(bench: Bench) -> dict[str, Any]:
    if missing := lacking("vllm"):
        return missing
    import gpu_engine

    with TemporaryDirectory() as directory:
        gpu_engine.save(build(bench.sizes[-1], torch.bfloat16, bench.device), Path(directory))
        release()
        found = gpu_engine.engine(Path(directory), (1, 8), bench.on_gpu)
    table([{name: value for name, value in row.items() if name != "about"} for row in found["rows"]])
    return found


def whole_part(bench: Bench) -> dict[str, Any]:
    if missing := lacking("vllm", "ray", "datasets"):
        return missing
    import gpu_engine

    found = gpu_engine.whole(
        bench.recipe, 6 if bench.on_gpu else 2, [] if bench.on_gpu else ["--evaluate.prompts", "0"]
    )
    table(found.get("rows", []))
    return found


def lacking(*packages: str) -> dict[str, Any]:
    """The result of a part that lacks packages; empty if all are installed."""
    missing = [package for package in packages if find_spec(package) is None]
    return {"left_out": f"needs {', '.join(missing)}"} if missing else {}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "correct": correct, "waits": waits, "attention": attention_part, "profile": profile_part, "speed": speed,
    "engine": engine_part, "whole": whole_part,
}  # fmt: skip

if __name__ == "__main__":
    main()
