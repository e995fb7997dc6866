"""Directories of runs with metrics, weights and completions, for the tests of the report and benchmarks/report.py."""

import json
import math
import random
import struct
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tomli_w
from upath import UPath

from rlora.config import validate
from rlora.records import Adapter, Episode, Group, Prompt, Trained, Version
from rlora.rollout.cursor import Cursor
from rlora.rollout.stream import Collection
from rlora.run.directory import CONFIG, MATRICES, SUMMARY, Provenance
from rlora.run.writer import CheckpointWriter

MATRIX_NAMES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qkvo"]
WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file of no tensors


def played(
    number: int, text: str = "", tokens: int = 6, reward: float = 1.0, generator: random.Random | None = None
) -> Episode:
    """An episode of version `number`, with random tokens."""
    draw = generator or random.Random(f"{number} {text}")
    ids = tuple(draw.randrange(2, 97) for _ in range(tokens))
    status = "correct" if reward == 1 else "wrong"
    return Episode(
        ids, tuple(-2 * draw.random() for _ in ids), "stop", Version("run", number), text or "an answer", reward,
        status=status, parts={"integer_answer": reward},
    )  # fmt: skip


def step_groups(number: int, prompts: int = 2, size: int = 4, tokens: int = 6) -> list[Group]:
    """The groups of a step, whose prompts return every second step."""
    draw = random.Random(f"groups of {number}")
    return [
        Group(
            Prompt(f"What is {index} + {number % 2}?", index + number % 2, (3, 4 + index, 5 + number % 2)),
            tuple(
                played(number, tokens=tokens, reward=float(draw.random() < 0.5), generator=draw) for _ in range(size)
            ),
        )
        for index in range(prompts)
    ]


def trained_on(groups: Sequence[Group]) -> dict[tuple[int, int], Trained]:
    """What an update computes of the groups, at ratios near 1."""

    def one(episode: Episode, advantage: float) -> Trained:
        count = len(episode.completion_ids)
        logprobs = [value + 0.05 * math.sin(index) for index, value in enumerate(episode.behaviour_logprobs)]
        return Trained(struct.pack(f"{count}f", *[advantage] * count), struct.pack(f"{count}f", *logprobs))

    return {
        (g, e): one(episode, (episode.reward or 0.0) - 0.5)
        for g, group in enumerate(groups)
        for e, episode in enumerate(group.episodes)
    }


def line(step: int, steps: int, shift: float = 0.0) -> dict[str, Any]:
    """A step's line of metrics.jsonl, with the metrics that the charts need."""
    share = min(1.0, max(0.0, shift + 0.1 + 0.8 * step / steps))
    return {
        "step": step, "adapter": "0" * 64, "reward/mean": share, "reward/std": math.sqrt(share * (1 - share)),
        "reward/max": 1.0, "reward/min": 0.0, "reward/integer_answer": share, "status/correct": share,
        "status/wrong": 1 - share, "reward/informative_groups": 0.5, "completion/length": 12 - 5 * share,
        "completion/truncated": 0.1, "kl/behaviour": 1e-4 * (1 + share), "kl/update": 0.0, "kl/reference": None,
        "entropy": 1.5 - share, "grad/norm": 0.3, "lr": 5e-4, "staleness": 0.0, "ratio/truncated": 0.0,
        "engine/busy": 0.6, "learner/busy": 0.3, "engine/kv": 0.2, "rollout/tokens_per_second": 400.0,
        "learner/tokens_per_second": 200.0, "time/step": 4.0, "time/wait": 2.4, "time/sampling": 2.3,
        "time/reward": 0.1, "time/stragglers": 0.3, "time/update": 1.2, "time/update/passes": 0.1,
        "time/update/gradient": 0.9, "time/update/adam": 0.05, "time/swap": 0.1, "time/save": 0.05, "time/queue": 0.0,
        "memory/driver": 4e8, "memory/learner": 1e9, "weights/norm": share, "weights/moved": 0.1,
        "weights/relative": share / 100, "weights/cosine_last": 0.8, "weights/cosine_update": None,
        "weights/rank_used": 1.0,
    } | ({"health/no_signal": 4} if step in (4, 5) else {})  # fmt: skip


def weights_line(step: int, matrices: int) -> dict[str, Any]:
    """A step's line of weights.jsonl."""
    norms = [round(0.01 * (step + 1) * (1 + index % 7), 4) for index in range(matrices)]
    return {
        "step": step, "norm": norms, "moved": [0.01] * matrices, "sigma": [[norm] for norm in norms],
        "cosine_last": [None if step == 0 else 0.5] * matrices, "cosine_update": [0.1 * (step % 3)] * matrices,
    }  # fmt: skip


def write_run(
    path: Path, steps: int = 6, first: int = 0, shift: float = 0.0, matrices: Sequence[str] = MATRIX_NAMES,
    groups: dict[int, list[Group]] | None = None, model: str = "missing/model", done: int | None = None,
    prompts: int = 2, size: int = 4, tokens: int = 6, **checkpoint: Any,
) -> UPath:  # fmt: skip
    """Write a run of `steps` steps, of which `done` are done. Its episodes are `step_groups`, or `groups` by step."""
    run = UPath(path)
    run.mkdir(parents=True)
    config = validate({
        "model": model, "env": "rlora.envs.arithmetic:Arithmetic", "reward": "rlora.rewards.integer:integer_answer",
        "steps": steps, "checkpoint": {"keep_last": 1000} | checkpoint,
    })  # fmt: skip
    origin = Provenance(run.name, "0123456789abcdef", "prompts", {"torch": "2"}, "a machine")
    provenance = {"id": origin.id, "packages": dict(origin.packages), "machine": origin.machine}
    plain = json.loads(json.dumps(asdict(config)))
    (run / CONFIG).write_text(tomli_w.dumps(_without_none(plain) | {"provenance": provenance}))
    (run / MATRICES).write_text(json.dumps(dict.fromkeys(matrices, 2.0)))
    (run / SUMMARY).write_text(json.dumps({"accuracy/before": 0.25, "accuracy/after": 0.75, "steps": done or steps}))
    with CheckpointWriter(run, config, origin, None) as writer:
        for step in range(first, done or steps):
            chosen = (groups or {}).get(step) or step_groups(step, prompts, size, tokens)
            collection = Collection(tuple(chosen), tuple(chosen), 0.0, 0, 0)
            adapter = Adapter(run.name, step + 1, b'{"base_model_name_or_path": "base"}', WEIGHTS + bytes([step % 256]))
            texts = (json.dumps(line(step, steps, shift)), json.dumps(weights_line(step, len(matrices))))
            writer.save(adapter, b"state", Cursor(step + 1), collection, *texts, trained=trained_on(chosen))
    return run


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return value


def with_text(group: Group, text: str) -> Group:
    """The group with the text in its prompt, its answer and each completion."""
    episodes = tuple(replace(episode, text=text, parts={text: 1.0}) for episode in group.episodes)
    return Group(replace(group.prompt, text=text, answer=text), episodes)
