"""`rlora plan`: its memory against measurements, the budgets in recipes, and what it reports if a run does not fit."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

from rlora.cards import GIB
from rlora.cli.main import main
from rlora.config import read_table, validate
from rlora.device import multiplies_in_16_bits
from rlora.planning import KINDS, plan
from rlora.records import RloraError
from rlora.settings import Config

MakeConfig = Callable[..., Config]
VOCABULARY = {"vocab_size": 151936, "head_dim": 128}
MODELS = {
    "Qwen/Qwen3-8B": Qwen3Config(
        hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, intermediate_size=12288,
        tie_word_embeddings=False, **VOCABULARY,
    ),
    "Qwen/Qwen3-1.7B": Qwen3Config(
        hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, intermediate_size=6144,
        tie_word_embeddings=True, **VOCABULARY,
    ),
    "Qwen/Qwen2.5-Math-1.5B": Qwen2Config(
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
        tie_word_embeddings=True, vocab_size=151936,
    ),
    "Qwen/Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, intermediate_size=6144,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, tie_word_embeddings=False, **VOCABULARY,
    ),
}  # fmt: skip
RECIPES = {
    "qwen3-8b-gsm8k": ("h100-80", 1), "qwen3-8b-math": ("h100-80", 1), "qwen2.5-math-1.5b-rank1": ("h100-80", 1),
    "qwen3-1.7b-24gb": ("rtx4090-24", 1), "qwen3-30b-a3b": ("h100-80", 2),
}  # fmt: skip


def recipe(name: str, directory: Path) -> Config:
    """A recipe's config, with a saved model config in place of the hub id."""
    table = read_table(ROOT / "launch" / "gpu" / f"{name}.toml")
    MODELS[table["model"]].save_pretrained(directory)
    return validate(table | {"model": str(directory)})


@pytest.mark.parametrize(
    "learner",
    [{"microbatch_tokens": 2048}, {"microbatch_tokens": 700}, {"microbatch_tokens": 2048, "checkpointing": True}],
    ids=["rows of 2048", "rows of 700", "checkpointing"],
)
def test_memory_is_what_a_learner_takes(demo: str, learner: dict[str, Any]) -> None:
    table = {
        "model": demo, "env": "", "reward": "", "learner": learner,
        "sampling": {"max_tokens": 100, "max_prompt_tokens": 60},
    }  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # free blocks go back at once
    command = [sys.executable, str(ROOT / "tests" / "memory_probe.py"), json.dumps(table)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=300).stdout
    measured, planned = json.loads(out.splitlines()[-1]), plan(validate(table)).learner
    assert planned.base == pytest.approx(measured["base"], rel=0.01)
    # The plan is for GPUs. Without AVX-512 a row also holds the head's weights in fp32: 49,152 x 576.
    wide_head = 0 if multiplies_in_16_bits() else 49_152 * 576 * 4
    assert planned.per_row + wide_head == pytest.approx(measured["peak"], rel=0.15)


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_fits_on_its_card(tmp_path: Path, name: str) -> None:
    gpu, gpus = RECIPES[name]
    planned = plan(recipe(name, tmp_path), gpu, gpus)
    assert not planned.faults
    assert 0.5 * planned.total < planned.used <= planned.total
    assert planned.sequences >= 8
    text = (ROOT / "launch" / "gpu" / f"{name}.toml").read_text()
    assert "Not yet run." in text
    assert f"--gpu {gpu}" in text
    for who, what, size in planned.lines:  # the recipe has the budget in a comment
        assert f"# {size.removesuffix(' GiB'):>7}  {who}: {what.split(':')[0]}" in text


def test_what_does_not_fit_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe("qwen3-8b-math", tmp_path)
    small = plan(config, "rtx4090-24")
    assert any("the learner needs" in fault for fault in small.faults)
    assert any("engine" in fault for fault in small.faults)
    arguments = [str(ROOT / "launch/gpu/qwen3-8b-math.toml"), "--model", str(tmp_path), "--gpu", "l4-24"]
    monkeypatch.setattr(sys, "argv", ["rlora", "plan", *arguments])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr()
    assert "frozen base" in printed.out
    assert "the run does not fit" in printed.err


@pytest.mark.parametrize("gpu", [None, "a10g-24"])
def test_given_completions_need_no_engine(
    gpu: str | None, config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"reward": "", "dtype": "bfloat16"}
    sft, dpo = (config(**given, algorithm=algorithm) for algorithm in ({"name": "sft"}, {"name": "dpo", "kl": 0.1}))
    planned = plan(sft, gpu)
    assert {process for process, *_ in planned.lines} == {"learner"}
    assert not planned.faults
    assert planned.used == planned.learner.fixed + planned.learner.per_row + planned.slack
    assert [*planned.seconds] == ["update"]
    if gpu:  # the speed of a CPU is measured each time
        assert planned.seconds["update"] < plan(dpo, gpu).seconds["update"]
    arguments = [str(ROOT / "launch" / "sft.toml"), *(["--gpu", gpu] if gpu else [])]
    monkeypatch.setattr(sys, "argv", ["rlora", "plan", *arguments])
    main()
    assert f"The learner is {'on one GPU' if gpu else 'in RAM'};" in capsys.readouterr().out


def test_seconds_grow_with_the_work(tmp_path: Path) -> None:
    gsm8k, more = recipe("qwen3-8b-gsm8k", tmp_path), {"sampling": {"max_tokens": 2048, "max_prompt_tokens": 512}}
    table = read_table(ROOT / "launch" / "gpu" / "qwen3-8b-gsm8k.toml") | {"model": str(tmp_path)}
    usual, longer = plan(gsm8k, "h100-80"), plan(validate(table | more), "h100-80")
    slower = plan(gsm8k, "a100-80")
    for phase in ("sampling", "update"):
        assert 0 < usual.seconds[phase] < longer.seconds[phase]
        assert usual.seconds[phase] < slower.seconds[phase]


def test_an_unknown_card(config: MakeConfig) -> None:
    with pytest.raises(RloraError, match="--gpu h1000: unknown GPU; use one of b200-180, h200-141, h100-80"):
        plan(config(), "h1000")
    assert all(kind.memory * GIB > 20 * GIB for kind in KINDS.values())
