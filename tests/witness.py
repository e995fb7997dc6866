"""Records updates of small runs, which later code must reproduce bit for bit.

    python tests/witness.py [NAME ...]

writes `tests/witnesses/<NAME>/<version>/`, a bundle for each version of a run over a two-layer model with random
weights. Only a change that is meant to alter an update may record its witness again, with a note in docs/dev/log.md.
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

from rlora.config import validate
from rlora.core.batch import microbatches, sample_of
from rlora.core.learner import Learner
from rlora.core.setup import Setup
from rlora.device import hardware
from rlora.records import Episode, Group, Prompt, Version
from rlora.rollout.cursor import Cursor
from rlora.run import episodes
from rlora.run.checkpoint import Bundle
from rlora.run.directory import Provenance
from rlora.settings import Config
from rlora.store import write_directory

# Recorded on Intel processors, by a release whose machine names lacked the vendor
RECORDED_ON = "x86_64 AVX512, 2 cores"


def is_home(recorded: str) -> bool:
    """Whether this machine reproduces results of the machine `recorded` bit for bit."""
    current = hardware()
    return recorded == current or (recorded == RECORDED_ON and current.startswith("x86_64 GenuineIntel AVX512"))


HOME = Path(__file__).with_name("witnesses")
UPDATES = 3
PROMPTS, COMPLETIONS = 4, 4
VOCABULARY = 97
_BASE = "base"  # relative, because each adapter contains the name

WITNESSES: dict[str, dict[str, Any]] = {
    "reinforce": {},
    "grpo-kl": {"algorithm": {"name": "grpo", "kl": 0.1, "entropy": 0.01, "epochs": 2, "minibatches": 2}},
    "ppo": {"algorithm": {"name": "ppo", "minibatches": 4}, "critic": {"rank": 2, "warmup": 1}},
    "ppo-kl": {"algorithm": {"name": "ppo", "kl": 0.1, "epochs": 2, "truncated": "bootstrap"}},
    "dapo": {"algorithm": {"name": "dapo", "truncated": "drop", "overlong_tokens": 2, "overlong_penalty": 0.5}},
    "gspo": {"algorithm": {"name": "gspo", "minibatches": 2}},
    "cispo": {"algorithm": {"name": "cispo", "minibatches": 4, "correction": "episode-mask"}},
    "reinforce++": {"algorithm": {"name": "reinforce++", "kl": 0.1, "kl_estimator": "k1"}},
    "stale": {"max_staleness": 1},
    "agent": {"algorithm": {"name": "grpo"}},
    "mlp-8": {"learner": {"rank": 8, "targets": "mlp", "rslora": True, "init": "orthonormal", "checkpointing": True}},
    "head-bf16": {"dtype": "bfloat16", "learner": {"rank": 2, "head": True}},
}


def config_of(name: str) -> Config:
    settings = WITNESSES[name]
    learner = {"lr": 0.01, "rank": 1, "lr_schedule": "linear"} | settings.get("learner", {})
    table = {"model": _BASE, "env": "-", "reward": "-", "dtype": "float32", "steps": 4, "seed": 5}
    table |= {"sampling": {"max_tokens": 12, "max_prompt_tokens": 12}, "prompts_per_step": PROMPTS}
    return validate(table | settings | {"learner": learner})


@contextmanager
def base() -> Iterator[str]:
    """Write the base to a temporary directory, which is the working directory within the context."""
    previous = Path.cwd()
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
            os.chdir(previous)


def groups_of(name: str, learner: Learner) -> list[Group]:
    """Groups of random completions with logprobs close to the learner's; those of an agent contain tool tokens."""
    number = learner.states["witness"].number
    draw = random.Random(f"{name} {number}")

    def tokens(minimum: int, maximum: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCABULARY) for _ in range(draw.randint(minimum, maximum)))

    def episode() -> Episode:
        ids, finish = tokens(3, 12), draw.choice(["stop", "stop", "length"])
        sampled = (*(draw.random() < 0.7 for _ in ids[1:]), True) if name == "agent" else ()
        version = Version("witness", max(0, number - draw.randint(0, int(name == "stale"))))
        reward = draw.choice([0.0, 0.0, 0.5, 1.0])
        return Episode(ids, (-1.0,) * len(ids), finish, version, reward=reward, sampled_mask=sampled, status="wrong")

    groups = [
        Group(Prompt("?", token_ids=tokens(2, 9)), tuple(episode() for _ in range(COMPLETIONS))) for _ in range(PROMPTS)
    ]
    return [
        replace(group, episodes=tuple(_with_logprobs(learner, group, episode, draw) for episode in group.episodes))
        for group in groups
    ]


@torch.no_grad()
def _with_logprobs(learner: Learner, group: Group, episode: Episode, draw: random.Random) -> Episode:
    """Replace behaviour logprobs by the learner's with noise, rounded so that their text is exact."""
    sample = sample_of(group.prompt.token_ids, replace(episode, sampled_mask=()))
    (row,) = microbatches([[sample]], 1000, learner.policies.base.dtype, learner.device)
    logprobs = learner.policies.logprobs(row, "witness").tolist()
    return replace(episode, behaviour_logprobs=tuple(round(min(x + draw.gauss(0, 0.2), 0.0), 3) for x in logprobs))


def record(name: str) -> None:
    config = config_of(name)
    with base() as path:
        learner = Learner(config, path)
        adapter = learner.open("witness", Setup.of(config))
        origin = Provenance("witness", name, "", {"torch": torch.__version__}, hardware())
        bundle = Bundle(origin, adapter, learner.state("witness"), Cursor(), config)
        _write(name, bundle)
        for _ in range(UPDATES):
            groups = groups_of(name, learner)
            adapter, _ = learner.update("witness", groups)
            update, parent = episodes.encode(groups), bundle.adapter.digest
            bundle = Bundle(origin, adapter, learner.state("witness"), Cursor(), config, update, parent)
            _write(name, bundle)


def _write(name: str, bundle: Bundle) -> None:
    write_directory(UPath(HOME / name / str(bundle.version)), bundle.files)


if __name__ == "__main__":
    for name in sys.argv[1:] or WITNESSES:
        record(name)
