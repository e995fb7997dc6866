"""The learner's step compared with a plain PEFT step, full fine-tuning, and the machine's limit.

    .venv/bin/python benchmarks/learner.py            about twenty minutes on two cores
    .venv/bin/python benchmarks/learner.py --quick    only the short shape
    .venv/bin/python benchmarks/learner.py --algorithms    GRPO, GRPO with a KL term, and PPO

All sides update SmolLM2-135M in bf16 on the same groups of random tokens, on all cores, each in a separate process:

- ours: `Learner.update`.
- PEFT: the step as TRL implements it: rows of prompt + completion, logits of the completions, log-softmax one row at a
  time, entropies without gradient, ratio, backward, clip, Adam. fp32 adapter with bf16 autocast; the faster of eager
  and sdpa attention; the same number of completion tokens per pass as ours.
- full: the same step with all weights trained.
- grpo, grpo-kl, ppo: ours with that `algorithm.name` (and `algorithm.kl`); PPO with 4 minibatches and a critic.
- mm: `torch.mm` of 2048 x 1536 x 1536 in bf16, in the same process as ours, before and after it.

Throughput is in trained completion tokens per second. Memory is the peak above what the process held before its first
step. `utilisation` counts 4 x body parameters x distinct tokens + 4 x head parameters x completion tokens FLOPs: a
frozen base needs a forward pass and the gradient of its activations, but not of its weights. The last line printed is
a JSON object: `short.vs_peft`, `balanced.vs_peft`, `long_prompt.vs_peft` (G = 8, rank 1), `utilisation` and
`memory.vs_peft` (balanced), `k4_over_k1` (seconds of four adapters divided by those of one, for the same tokens), and
every row. With `--algorithms` it contains `grpo-kl.memory`, `grpo-kl.seconds`, `ppo.memory` and `ppo.seconds`, relative
to GRPO, and the rows.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from rlora.config import validate
from rlora.core.batch import microbatches, sample_of
from rlora.core.learner import Learner
from rlora.core.lora import Spec
from rlora.core.objectives.reinforce import reinforce
from rlora.core.policy import Policies
from rlora.core.setup import Setup
from rlora.model.base import DEMO, locate
from rlora.records import Episode, Group, Prompt, Version
from rlora.settings import Config

COMPARED = {
    "short": (40, 32, 8),
    "balanced": (200, 200, 1),
    "long_prompt": (600, 100, 1),
}  # prompt, completion, prompts
SHAPES = COMPARED | {"four": (200, 200, 4)}  # each prompt is a minibatch
ALGORITHMS = {"grpo": {"name": "grpo"}, "grpo-kl": {"name": "grpo", "kl": 0.01}, "ppo": {"name": "ppo"}}
REPEATS, SECONDS = 5, 25  # limits on the timed steps


@dataclass(frozen=True)
class Case:
    side: str  # ours, one of ALGORITHMS, peft-eager, peft-sdpa, full or bank
    shape: str
    G: int = 8
    rank: int = 1
    K: int = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="only the short shape")
    parser.add_argument("--algorithms", action="store_true", help="only GRPO, GRPO with a KL term, and PPO")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)))))
        return
    if options.algorithms:
        rows = [in_process(Case(side, "four")) for side in ALGORITHMS]
        show(rows)
        print(json.dumps(over_grpo(rows)))
        return
    shapes = ["short"] if options.quick else list(COMPARED)
    cases = [Case(side, shape) for shape in shapes for side in ("ours", "peft-eager", "peft-sdpa", "full")]
    if not options.quick:
        for G, rank in ((16, 1), (8, 8)):
            cases += [Case(side, shape, G, rank) for shape in shapes for side in ("ours", "peft-eager")]
    cases += [Case("bank", "short", K=K) for K in (1, 4)]
    rows = [in_process(case) for case in cases]
    show(rows)
    print(json.dumps(ratios(rows)))


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("side", "shape", "G", "rank", "K", "tokens/s", "peak MiB", "of the mm limit")
    for row in rows:
        share = f"{row['utilisation']:.2f}" if row["utilisation"] else ""
        named = (str(row[key]) for key in ("side", "shape", "G", "rank", "K"))
        table.add_row(*named, f"{row['tokens_per_s']:.0f}", f"{row['peak_mib']:.0f}", share)
    Console().print(table)


def in_process(case: Case) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    print(out, file=sys.stderr, flush=True)
    return asdict(case) | json.loads(out)


def over_grpo(rows: list[dict[str, Any]]) -> dict[str, Any]:
    grpo, *others = rows
    ratios = {f"{row['side']}.memory": row["peak_mib"] / grpo["peak_mib"] for row in others}
    ratios |= {f"{row['side']}.seconds": min(row["seconds"]) / min(grpo["seconds"]) for row in others}
    return ratios | {"rows": rows}


def ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def of(side: str, shape: str, figure: str) -> list[float]:
        return [
            row[figure] for row in rows
            if row["side"].startswith(side) and row["shape"] == shape and (row["G"], row["rank"]) == (8, 1)
        ]  # fmt: skip

    found = {shape: of("ours", shape, "tokens_per_s") for shape in COMPARED}
    figures: dict[str, Any] = {
        f"{shape}.vs_peft": ours[0] / max(of("peft", shape, "tokens_per_s")) for shape, ours in found.items() if ours
    }
    if found["balanced"]:
        figures["utilisation"] = of("ours", "balanced", "utilisation")[0]
        figures["memory.vs_peft"] = of("ours", "balanced", "peak_mib")[0] / min(of("peft", "balanced", "peak_mib"))
    one, four = of("bank", "short", "tokens_per_s")
    return figures | {"k4_over_k1": one / four, "rows": rows}


def measure(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    groups = make_groups(case)
    config = validate(
        {
            "model": DEMO, "env": "-", "reward": "-", "learner": {"rank": case.rank}, "sampling": {"max_tokens": 256},
            "algorithm": ALGORITHMS.get(case.side, {}),
        }
    )  # fmt: skip
    make = {"bank": bank, "full": full, "peft-eager": peft, "peft-sdpa": peft}.get(case.side, ours)
    limit = [mm_flops()]
    step = make(case, config, groups)
    reset_peak()
    before = memory("VmRSS")
    step()
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < SECONDS:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak = memory("VmHWM") - before
    limit.append(mm_flops())
    tokens = sum(len(episode.completion_ids) for group in groups for episode in group.episodes)
    distinct = tokens + sum(len(group.prompt.token_ids) for group in groups)
    base = AutoModelForCausalLM.from_pretrained(locate(DEMO))
    head = base.get_output_embeddings().weight.numel()
    flops = 4 * (base.num_parameters() - head) * distinct + 4 * head * tokens
    best = min(seconds)
    return {
        "tokens_per_s": tokens / best,
        "seconds": seconds,
        "peak_mib": peak / 1024,
        "mm_gflops": [flops_a_second / 1e9 for flops_a_second in limit],
        "utilisation": flops / best / max(limit) if case.side == "ours" else None,
    }


def make_groups(case: Case) -> list[Group]:
    prompt, completion, prompts = SHAPES[case.shape]
    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1000, 40_000) for _ in range(count))

    def episode(index: int) -> Episode:
        version, logprobs = Version("benchmark", 0), (-10.0,) * completion
        return Episode(tokens(completion), logprobs, "length", version, reward=float(index % 2))

    return [
        Group(Prompt("", token_ids=tokens(prompt)), tuple(episode(index) for index in range(case.G)))
        for _ in range(prompts)
    ]


def ours(case: Case, config: Config, groups: list[Group]) -> Callable[[], object]:
    learner = Learner(config, locate(DEMO))
    learner.open("benchmark", Setup.of(config))
    return lambda: learner.update("benchmark", groups)


def bank(case: Case, config: Config, groups: list[Group]) -> Callable[[], object]:
    """Forward and backward of `case.K` adapters in separate rows; the groups are assigned to them in turn."""
    policies, names = Policies(load()), [f"{number}" for number in range(case.K)]
    for seed, name in enumerate(names):
        policies.add(name, Spec(case.rank), seed)
    owned = {
        name: [
            [sample_of(group.prompt.token_ids, episode, 1.0) for episode in group.episodes]
            for group in groups[number :: case.K]
        ]
        for number, name in enumerate(names)
    }

    def step() -> None:
        for name, samples in owned.items():
            for row in microbatches(samples, 4096, torch.bfloat16, policies.base.device):
                ratio = (policies.logprobs(row, name) - row.tokens.behaviour_logprobs).exp()
                reinforce(ratio, row.tokens.advantages).sum().backward()

    return step


def peft(case: Case, config: Config, groups: list[Group]) -> Callable[[], object]:
    from peft import LoraConfig, get_peft_model

    base = load(attn_implementation=case.side.removeprefix("peft-"))
    lora = LoraConfig(r=case.rank, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(base, lora)  # creates the adapter in fp32
    return plain_step(model, config, groups)


def full(case: Case, config: Config, groups: list[Group]) -> Callable[[], object]:
    return plain_step(load(), config, groups)


def load(**options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(locate(DEMO), dtype=torch.bfloat16, **options)


def plain_step(model: Any, config: Config, groups: list[Group]) -> Callable[[], None]:
    """The update as TRL implements it. All rows have the same length, so there is no padding."""
    samples = [[sample_of(group.prompt.token_ids, episode) for episode in group.episodes] for group in groups]
    batches = list(microbatches(samples, config.learner.microbatch_tokens, torch.bfloat16, torch.device("cpu")))
    rows_a_pass = len(batches[0].targets) // len(groups[0].episodes[0].completion_ids)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-5)
    rows = [(group.prompt.token_ids, episode) for group in groups for episode in group.episodes]
    ids = torch.tensor([prompt + episode.completion_ids for prompt, episode in rows])
    behaviour = torch.tensor([episode.behaviour_logprobs for _, episode in rows])
    rewards = torch.tensor([group.rewards for group in groups])
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
    T = behaviour.shape[1]
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        for start in range(0, len(rows), rows_a_pass):
            part = slice(start, start + rows_a_pass)
            mask = torch.ones_like(ids[part])
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids[part], attention_mask=mask, logits_to_keep=T + 1).logits[:, :-1]
            targets = ids[part][:, -T:, None]
            logprobs = torch.stack(
                [row.log_softmax(-1).gather(1, target)[:, 0] for row, target in zip(logits, targets, strict=True)]
            )
            with torch.no_grad():
                for row in logits:
                    spread = row.log_softmax(-1)
                    -(spread.exp() * spread).sum(-1)
            ratio = (logprobs - behaviour[part]).exp().clamp(max=2.0)
            (-(ratio * advantages[part, None]).sum() / behaviour.numel()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def mm_flops() -> float:
    """FLOP/s of torch.mm in bf16, best of five."""
    x, w = torch.randn(2048, 1536).bfloat16(), torch.randn(1536, 1536).bfloat16()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(5):
            x @ w
        best = min(best, (time.perf_counter() - start) / 5)
    return 2 * 2048 * 1536 * 1536 / best


def reset_peak() -> None:
    """Reset VmHWM, the peak, to the memory held now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
