"""Records updates of small runs, which later code has to compute again bit for bit.

    python tests/witness.py [NAME ...]

writes `tests/witnesses/<NAME>/<version>/`, a bundle for each version of a run over a two-layer model with random
weights. Only a change that is meant to alter an update records its witness anew, and says so in docs/log.md.
"""

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from upath import UPath

from rlora import machine
from rlora.config import validate
from rlora.core.batch import microbatches, sample_of
from rlora.core.learner import Learner
from rlora.core.setup import Setup
from rlora.records import Cursor, Episode, Group, Prompt, Version
from rlora.run import episodes
from rlora.run.checkpoint import Bundle
from rlora.run.directory import Provenance
from rlora.settings import Config
from rlora.store import write_directory

# Recorded on Intel processors, by a release whose name of a machine was without the vendor
RECORDED_ON = "x86_64 AVX512, 2 cores"


def is_home(recorded: str) -> bool:
    """Whether results come out here bit for bit as on the machine of that name."""
    here = machine.name()
    return recorded == here or (recorded == RECORDED_ON and here.startswith("x86_64 GenuineIntel AVX512"))


HOME = Path(__file__).with_name("witnesses")
UPDATES = 3
PROMPTS, COMPLETIONS = 4, 4
VOCABULARY = 97
_BASE = "base"  # relative, for its name stands in each adapter

WITNESSES: dict[str, dict[str, Any]] = {
    "reinforce": {},
    "grpo-kl": {"algorithm": {"name": "grpo", "kl": 0.1, "entropy": 0.01, "epochs": 2, "minibatches": 2}},
    "ppo": {"algorithm": {"name": "ppo", "minibatches": 4}, "critic": {"rank": 2, "warmup": 1}},
    "ppo-kl": {"algorithm": {"name": "ppo", "kl": 0.1, "epochs": 2, "bootstrap_truncated": True}},
    "dapo": {"algorithm": {"name": "dapo", "drop_truncated": True, "overlong_tokens": 2, "overlong_penalty": 0.5}},
    "gspo": {"algorithm": {"name": "gspo", "minibatches": 2}},
    "cispo": {"algorithm": {"name": "cispo", "minibatches": 4, "correction": "episode-mask"}},
    "reinforce++": {"algorithm": {"name": "reinforce++", "kl": 0.1, "kl_in": "reward", "kl_estimator": "k1"}},
    "stale": {"max_staleness": 1},
    "agent": {"algorithm": {"name": "grpo"}},
    "mlp-8": {"learner": {"rank": 8, "targets": "mlp", "rslora": True, "init": "orthonormal", "checkpointing": True}},
    "head-bf16": {"dtype": "bfloat16", "learner": {"rank": 2, "head": True}},
}


def config_of(name: str) -> Config:
    settings = WITNESSES[name]
    learner = {"lr": 0.01, "rank": 1, "lr_schedule": "linear"} | settings.get("learner", {})
    own = {"model": _BASE, "env": "-", "reward": "-", "dtype": "float32", "steps": 4, "seed": 5}
    own |= {"sampling": {"max_tokens": 12, "max_prompt_tokens": 12}, "prompts_per_step": PROMPTS}
    return validate(own | settings | {"learner": learner})


@contextmanager
def base() -> Iterator[str]:
    """The directory of the base, in a directory of its own, which is the current one within."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        try:
            torch.manual_seed(0)
            shape = LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0,
                eos_token_id=1, initializer_range=0.3,
            )  # fmt: skip
            LlamaForCausalLM(shape).save_pretrained(_BASE)
            yield _BASE
        finally:
            os.chdir(before)


def groups_of(name: str, learner: Learner) -> list[Group]:
    """Groups of made-up completions, as the learner's version nearly says them; an agent's have a tool's tokens."""
    number = learner.held["witness"].number
    draw = random.Random(f"{name} {number}")

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCABULARY) for _ in range(draw.randint(least, most)))

    def episode() -> Episode:
        ids, finish = tokens(3, 12), draw.choice(["stop", "stop", "length"])
        own = (*(draw.random() < 0.7 for _ in ids[1:]), True) if name == "agent" else ()
        version = Version("witness", max(0, number - draw.randint(0, int(name == "stale"))))
        reward = draw.choice([0.0, 0.0, 0.5, 1.0])
        return Episode(ids, (-1.0,) * len(ids), finish, version, reward=reward, own=own, status="wrong")

    groups = [
        Group(Prompt("?", token_ids=tokens(2, 9)), tuple(episode() for _ in range(COMPLETIONS))) for _ in range(PROMPTS)
    ]
    return [
        replace(group, episodes=tuple(_sampled(learner, group, each, draw) for each in group.episodes))
        for group in groups
    ]


@torch.no_grad()
def _sampled(learner: Learner, group: Group, episode: Episode, draw: random.Random) -> Episode:
    """With the learner's logprobs, a little off, in place of the engine's; rounded, so that they are the same text."""
    sample = sample_of(group.prompt.token_ids, replace(episode, own=()))
    (row,) = microbatches([[sample]], 1000, learner.policies.base.dtype, learner.device)
    logprobs = learner.policies.logprobs(row, "witness").tolist()
    return replace(episode, behaviour_logprobs=tuple(round(min(x + draw.gauss(0, 0.2), 0.0), 3) for x in logprobs))


def record(name: str) -> None:
    config = config_of(name)
    with base() as path:
        learner = Learner(config, path)
        adapter = learner.open("witness", Setup.of(config))
        origin = Provenance("witness", name, "", {"torch": torch.__version__}, machine.name())
        bundle = Bundle(origin, adapter, learner.state("witness"), Cursor(), config)
        _write(name, bundle)
        for _ in range(UPDATES):
            groups = groups_of(name, learner)
            adapter, _ = learner.update("witness", groups)
            update, before = episodes.encode(groups), bundle.adapter.digest
            bundle = Bundle(origin, adapter, learner.state("witness"), Cursor(), config, update, before)
            _write(name, bundle)


def _write(name: str, bundle: Bundle) -> None:
    write_directory(UPath(HOME / name / str(bundle.version)), bundle.files)


if __name__ == "__main__":
    for name in sys.argv[1:] or WITNESSES:
        record(name)
