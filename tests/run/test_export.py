import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ORIGIN, ROOT, adapted, save_words, stir, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from upath import UPath

from rlora.cli import overrides
from rlora.config import read
from rlora.core.lora import Spec
from rlora.core.peft_format import encode, masters
from rlora.records import MODEL_FILES, Adapter, RloraError
from rlora.run import directory
from rlora.run.checkpoint import Bundle
from rlora.run.export import card, export
from rlora.run.prepare import begin, resume_run
from rlora.settings import Config

IDS = torch.tensor([[5, 6, 7]])


def metrics(run: UPath, rewards: Sequence[float]) -> None:
    run.mkdir(parents=True)
    lines = [{"step": step, "reward/mean": reward, "completion/length": 9.5} for step, reward in enumerate(rewards)]
    (run / directory.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')


def test_a_model_card_describes_an_adapter_and_its_provenance(
    tmp_path: Path, config: Callable[..., Config], bundle: Callable[..., Bundle]
) -> None:
    run = UPath(tmp_path) / "run"
    metrics(run, [0.0, 0.1, 0.2, 0.3])
    directory.summarise(run, {"steps": 4, "accuracy/before": 0.25, "accuracy/after": 0.75, "accuracy/prompts": 40})
    settings = config(algorithm={"name": "grpo"}, env_args={"high": 7})
    sources = [{"run": name, "version": 2, "digest": "0123456789abcdef", "id": "1"} for name in ("other", "sft")]
    fork = replace(ORIGIN, forked_from=sources[0], started_from=sources[1])
    version = bundle(4, config=settings, origin=fork)
    _, head, body = card(run, version).split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": settings.model,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "reinforcement-learning", "rlora", "grpo"],
    }
    for text in (
        "# run, version 4",
        "rank-1 LoRA adapter (alpha 32, all)",
        '`rlora.envs.arithmetic:Arithmetic` {"high": 7}',
        "`rlora.rewards.integer:integer_answer`",
        "4 steps of 16 prompts x 8 completions",
        version.adapter.digest,
        "forked from | `other@2` (`0123456789ab`)",
        "started from | `sft@2` (`0123456789ab`)",
        "0.250 before, 0.750 after, greedily on 40 held-out prompts",
        "▁▃▆█",
        "| 3 | 0.300 | 9.5 |",
        'name = "grpo"',
    ):
        assert text in body, text
    merged = card(run, version, "bfloat16")
    assert "merged in bfloat16" in merged
    assert yaml.safe_load(merged.split("---\n")[1])["library_name"] == "transformers"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (
            "sft",
            ["after supervised fine-tuning with", "16 prompts x 1 completions", "| 1 | -1.500 | 9.5 |", "log p per"],
        ),
        (
            "dpo",
            ["after preference learning with", "16 prompts x 2 completions", "| 1 | 0.750 | 9.5 |", "mean accuracy"],
        ),
    ],
)
def test_the_model_card_of_given_completions(
    name: str, shown: list[str], tmp_path: Path, config: Callable[..., Config], bundle: Callable[..., Bundle]
) -> None:
    run, kl = UPath(tmp_path) / "run", {"kl": 0.1} if name == "dpo" else {}
    figures = {"objective/nll": 1.5} if name == "sft" else {"objective/accuracy": 0.75}
    run.mkdir()
    lines = [{"step": step, "reward/mean": None, "completion/length": 9.5, **figures} for step in range(2)]
    (run / directory.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    directory.summarise(run, {"steps": 2, "held_out/nll/before": 1.75, "held_out/nll/after": 1.25})
    text = card(run, bundle(2, config=config(reward="", algorithm={"name": name, **kl})))
    for part in (*shown, "| reward | none |", "1.7500 before, 1.2500 after, on held-out examples"):
        assert part in text, part
    assert "reinforcement" not in text.partition("## Config")[0]


@pytest.fixture
def base(tmp_path: Path) -> str:
    """The directory of a model and its tokenizer."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    save_words(str(tmp_path / "base"))
    return str(tmp_path / "base")


def test_an_adapter_is_exported_unchanged_or_merged(
    tmp_path: Path, base: str, config: Callable[..., Config], bundle: Callable[..., Bundle]
) -> None:
    model = tiny_model("llama")
    bank = adapted(model, Spec())
    stir(bank)
    with torch.no_grad():
        logits = model(IDS).logits
    adapter = Adapter("run", 3, *encode(bank, "run", base))
    version = bundle(3, adapter=adapter, config=config(model=base))
    run = UPath(tmp_path) / "run"

    report = export(run, version, tmp_path / "adapter")
    assert report == f"version 3: {tmp_path}/adapter, for the base {base}"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter.weights
    assert "# run, version 3" in (tmp_path / "adapter" / "README.md").read_text()

    report = export(run, version, tmp_path / "merged", "float32")
    assert report.startswith(f"version 3 merged in float32: {tmp_path}/merged; the merged update is 0.00% off")
    assert "--dtype float32" not in report
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mode & 0o077 == (
        tmp_path / "merged" / "config.json"
    ).stat().st_mode & 0o077
    with torch.no_grad():
        for name, master in masters(bank, "run").items():
            master.mul_(1e-3 if "lora_B" in name else 1)
    version = bundle(3, adapter=Adapter("run", 3, *encode(bank, "run", base)), config=config(model=base))
    lossy = export(run, version, tmp_path / "rounded", "bfloat16")
    assert "Rounding to bfloat16 loses that part: export with --dtype float32, or serve the adapter itself" in lossy
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").decode([5]) == "w5"
    assert "merged in float32" in (tmp_path / "merged" / "README.md").read_text()

    with pytest.raises(RloraError, match=r"--to .*adapter: it exists already; use a different directory"):
        export(run, version, tmp_path / "adapter")


def test_all_weights_are_exported_as_a_model(
    tmp_path: Path, base: str, config: Callable[..., Config], bundle: Callable[..., Bundle]
) -> None:
    parts = [(Path(base) / name).read_bytes() for name in MODEL_FILES]
    adapter = Adapter("run", 2, *parts, full_weights=True)
    version = bundle(2, adapter=adapter, config=config(model=base, learner={"adapter": "none"}))
    with pytest.raises(RloraError, match="--merge: this run trained all weights"):
        export(UPath(tmp_path) / "run", version, tmp_path / "model", "bfloat16")
    assert not (tmp_path / "model").exists()
    assert export(UPath(tmp_path) / "run", version, tmp_path / "model") == f"version 2, all weights: {tmp_path}/model"
    loaded, model = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tiny_model("llama")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[policy]"


@pytest.fixture
def version(base: str, config: Callable[..., Config], bundle: Callable[..., Bundle]) -> Callable[..., Bundle]:
    """A bundle of an adapter over `base`, trained with `chat`."""
    files = encode(adapted(tiny_model("llama"), Spec()), "run", base)

    def make(**chat: object) -> Bundle:
        return bundle(3, adapter=Adapter("run", 3, *files), config=config(model=base, chat=chat))

    return make


@pytest.mark.parametrize("named", [False, True])
def test_an_export_has_the_chat_template_that_was_trained_with(
    named: bool, tmp_path: Path, base: str, version: Callable[..., Bundle]
) -> None:
    """The template is the user's, or one of several that the base's tokenizer has."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": TEMPLATE} if named else "{{ messages }}"
    tokenizer.save_pretrained(base)
    trained, run = version(template="tools" if named else TEMPLATE), UPath(tmp_path) / "run"
    export(run, trained, tmp_path / "merged", "float32")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE
    export(run, trained, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "chat_template.jinja").read_text() == TEMPLATE
    assert "--chat-template chat_template.jinja" in (tmp_path / "adapter" / "README.md").read_text()
    export(run, version(), tmp_path / "plain")
    assert not (tmp_path / "plain" / "chat_template.jinja").exists()  # the base's template applies
    export(run, version(), tmp_path / "merged-plain", "float32")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged-plain").chat_template == "{{ messages }}"


def test_all_weights_are_exported_with_the_chat_template_too(
    tmp_path: Path, base: str, config: Callable[..., Config], bundle: Callable[..., Bundle]
) -> None:
    adapter = Adapter("run", 2, *((Path(base) / name).read_bytes() for name in MODEL_FILES), full_weights=True)
    settings = config(model=base, learner={"adapter": "none"}, chat={"template": TEMPLATE})
    export(UPath(tmp_path) / "run", bundle(2, adapter=adapter, config=settings), tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == TEMPLATE


def test_a_missing_template_is_an_error_before_anything_is_written(
    tmp_path: Path, version: Callable[..., Bundle]
) -> None:
    gone = version(template=str(tmp_path / "gone.jinja"))  # as runs of earlier releases stored it
    for merged in (None, "float32"):
        with pytest.raises(RloraError, match=r"chat\.template = '.*gone\.jinja': can't be read"):
            export(UPath(tmp_path) / "run", gone, tmp_path / "out", merged)
        assert not (tmp_path / "out").exists()


def test_a_card_describes_the_format_of_prompts(tmp_path: Path, version: Callable[..., Bundle]) -> None:
    run = UPath(tmp_path) / "run"
    chat = {"system": "Be\nbrief.", "prefill": "<think>\n", "stop": ["##"], "template_args": {"thinking": True}}
    text = card(run, version(**chat))
    section = text.partition("## Prompts")[2].partition("## Mean reward")[0]
    assert tomllib.loads(section.partition("```toml")[2].partition("```")[0]) == {"chat": chat}
    assert "chat template of the base's tokenizer" in section
    assert "toml" not in card(run, version()).partition("## Prompts")[2].partition("## Mean reward")[0]
    for merged in ("bfloat16", None):
        assert ("chat_template.jinja" in card(run, version(template=TEMPLATE), merged)) == (merged is None)


def test_a_run_keeps_the_text_of_its_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may be changed or deleted before the run is exported, evaluated or resumed."""
    monkeypatch.chdir(ROOT)
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    run = tmp_path / "run"
    arguments = ["launch/arithmetic.toml", "--run-dir", str(run), "--chat.template", str(file)]
    given = overrides.parse_train(arguments)
    config = begin(given.config, given.run_dir).config
    file.unlink()
    assert config.chat.template == TEMPLATE
    assert read(run / "config.toml").chat.template == TEMPLATE
    other = TEMPLATE.replace("policy", "answer")
    file.write_text(other)
    resumed = resume_run(overrides.parse_train(["--resume", str(run)]).config, UPath(run)).config
    assert resumed.chat.template == TEMPLATE
    changed = overrides.parse_train(["--resume", str(run), f"--chat.template={file}"])
    assert resume_run(changed.config, UPath(run)).config.chat.template == other
