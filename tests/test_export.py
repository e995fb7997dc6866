import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ORIGIN, save_words, stir, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from upath import UPath

from rlora import runs
from rlora.checkpoint import Bundle
from rlora.config import Config
from rlora.export import card, export
from rlora.lora import Bank, Spec
from rlora.peft_format import encode
from rlora.records import WHOLE_FILES, Adapter, RloraError

IDS = torch.tensor([[5, 6, 7]])


def metrics(run: UPath, rewards: Sequence[float]) -> None:
    run.mkdir(parents=True)
    lines = [{"step": step, "reward/mean": reward, "completion/length": 9.5} for step, reward in enumerate(rewards)]
    (run / runs.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')


def test_a_model_card_says_what_an_adapter_is_and_where_it_comes_from(
    tmp_path: Path, config: Callable[..., Config], bundle: Callable[..., Bundle]
) -> None:
    run = UPath(tmp_path) / "run"
    metrics(run, [0.0, 0.1, 0.2, 0.3])
    runs.summarise(run, {"steps": 4, "accuracy/before": 0.25, "accuracy/after": 0.75, "accuracy/prompts": 40})
    own = config(algorithm={"name": "grpo"}, env_args={"high": 7})
    fork = replace(ORIGIN, forked_from={"run": "other", "version": 2, "digest": "0123456789abcdef", "id": "1"})
    version = bundle(4, config=own, origin=fork)
    text = card(run, version)
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": own.model,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "reinforcement-learning", "rlora", "grpo"],
    }
    for said in (
        "# run, version 4",
        "rank-1 LoRA adapter (alpha 32, all)",
        '`rlora.envs.arithmetic:Arithmetic` {"high": 7}',
        "`rlora.rewards.integer:integer_answer`",
        "4 steps of 16 prompts x 8 completions",
        version.adapter.digest,
        "`other@2` (`0123456789ab`)",
        "0.250 before, 0.750 after, greedily on 40 held-out prompts",
        "▁▃▆█",
        "| 3 | 0.300 | 9.5 |",
        'name = "grpo"',
    ):
        assert said in body, said
    merged = card(run, version, "bfloat16")
    assert "merged in bfloat16" in merged
    assert yaml.safe_load(merged.split("---\n")[1])["library_name"] == "transformers"


@pytest.fixture
def base(tmp_path: Path) -> str:
    """The directory of a model and its tokenizer."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    save_words(str(tmp_path / "base"))
    return str(tmp_path / "base")


def test_an_adapter_is_exported_as_it_is_or_as_a_model_that_it_is_merged_into(
    tmp_path: Path, base: str, config: Callable[..., Config], bundle: Callable[..., Bundle]
) -> None:
    model = tiny_model("llama")
    bank = Bank(model, [Spec()])
    stir(bank)
    with torch.no_grad():
        logits = model(IDS).logits
    adapter = Adapter("run", 3, *encode(bank, 0, base))
    version = bundle(3, adapter=adapter, config=config(model=base))
    run = UPath(tmp_path) / "run"

    said = export(run, version, tmp_path / "adapter")
    assert said == f"version 3: {tmp_path}/adapter, over the base {base}"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter.weights
    assert "# run, version 3" in (tmp_path / "adapter" / "README.md").read_text()

    said = export(run, version, tmp_path / "merged", "float32")
    assert said.startswith(f"version 3 merged in float32: {tmp_path}/merged; its update is 0.00% off")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").decode([5]) == "w5"
    assert "merged in float32" in (tmp_path / "merged" / "README.md").read_text()

    with pytest.raises(RloraError, match=r"--to .*adapter: it is there already; name another directory"):
        export(run, version, tmp_path / "adapter")


def test_all_weights_are_exported_as_a_model(
    tmp_path: Path, base: str, config: Callable[..., Config], bundle: Callable[..., Bundle]
) -> None:
    parts = [(Path(base) / name).read_bytes() for name in WHOLE_FILES]
    whole = Adapter("run", 2, *parts, whole=True)
    version = bundle(2, adapter=whole, config=config(model=base, learner={"adapter": "none"}))
    with pytest.raises(RloraError, match="--merge: this run trained all weights"):
        export(UPath(tmp_path) / "run", version, tmp_path / "model", "bfloat16")
    assert not (tmp_path / "model").exists()
    assert export(UPath(tmp_path) / "run", version, tmp_path / "model") == f"version 2, all weights: {tmp_path}/model"
    loaded, model = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tiny_model("llama")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
