"""Every reason why a `model` can't be used raises an error, and nothing is read from the terminal."""

import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_words, tiny_model
from safetensors.torch import save_file

from rlora.model.base import encode_model, load_tokenizer, locate
from rlora.records import RloraError
from rlora.rollout.task import load_task
from rlora.settings import Config

Files = dict[str, Any]
AUTO_MAP = {"auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes reading from the terminal fail."""

    def fail(*_: object) -> str:
        raise AssertionError("the terminal was read")

    monkeypatch.setattr("builtins.input", fail)
    monkeypatch.setattr(sys.stdin, "readline", fail)


def saved(directory: Path, files: Files) -> str:
    directory.mkdir()
    save_file({"a": torch.zeros(1)}, directory / "model.safetensors")
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(directory)


LLAMA = {"model_type": "llama"}
INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": {"model_type": "qwen9"}}, r"has model type `qwen9` but Transformers does not recognize"),
        ({"config.json": {"model_type": "mine"} | AUTO_MAP},
         r"the model needs custom code \(auto_map .*\), which rlora does not run; use a model whose class"),
        ({"config.json": AUTO_MAP}, r"the model needs custom code|Should have a `model_type`"),
        ({"config.json": b"{nope"}, r"its config\.json is not a JSON object: .*line 1 column 2.*; save the model"),
        ({"config.json": b"\xff\xfe"}, r"its config\.json is not a JSON object"),
        ({"config.json": []}, r"its config\.json is not a JSON object: the content is not an object"),
        ({"config.json": {}}, r"Should have a `model_type` key in its config\.json"),
        ({"adapter_config.json": {"base_model_name_or_path": "org/base"}},
         r"this is an adapter for 'org/base', not a model; set model = 'org/base' and learner\.start_from = '.*/m'"),
        ({"adapter_config.json": {}}, r"adapter for an unnamed base, .* the base of the adapter and learner\.start"),
        ({"adapter_config.json": b"{"}, r"this is an adapter for an unnamed base"),
        ({"adapter_config.json": {"base_model_name_or_path": "org/base"}, "config.json": LLAMA,
          "model.safetensors": None, "adapter_model.safetensors": b""}, r"this is an adapter for 'org/base'"),
        ({}, r"neither a local directory with a model .*the directory has no config\.json; use a directory"),
        ({"model.safetensors": None, "q4.gguf": b"GGUF"}, r"rlora does not load GGUF \(q4\.gguf\); use a dir"),
        ({"snapshots/0a/config.json": LLAMA}, r"directory has no config\.json; did you mean .*/m/snapshots/0a\?"),
        ({"config.json": LLAMA, "model.safetensors": None}, r"directory has no weights \(\*\.safetensors\); save the"),
        ({"config.json": LLAMA, "model.safetensors": None, "q4.gguf": b"GGUF"}, r"no weights .* only q4\.gguf; save"),
        ({"config.json": LLAMA, "model.safetensors": None, "model-00001-of-00002.safetensors": b""},
         r"no weights .* only model-00001-of-00002\.safetensors"),
        ({"config.json": LLAMA, "model.safetensors": None, "model.safetensors.index.json": INDEX,
          "model-1.safetensors": b""}, r"1 of its 2 weight files are missing \(model-2\.safetensors\)"),
        ({"config.json": LLAMA, "model.safetensors": None, "model.safetensors.index.json": {}},
         r"its model\.safetensors\.index\.json can't be read"),
        ({"config.json": LLAMA, "model.safetensors": None, "model.safetensors.index.json": b"{"},
         r"its model\.safetensors\.index\.json can't be read"),
        ({"config.json": LLAMA, "model.safetensors": b"cut"}, r"its model\.safetensors can't be read .*again"),
        ({"config.json": LLAMA, "model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:00"},
         r"its model\.safetensors is a Git LFS pointer: fetch the file"),
        ({"config.json": b"version https://git-lfs.github.com/spec/v1\noid sha256:00"},
         r"its config\.json is a Git LFS pointer: fetch the file"),
        ({"config.json": {"model_type": "t5"}}, r"no causal language model of type 't5'"),
        ({"config.json": {"model_type": "vit"}}, r"no causal language model of type 'vit'"),
        ({"config.json": {"model_type": "clip"}}, r"no causal language model of type 'clip'"),
        ({"config.json": {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}},
         r"type 'bart' is an encoder-decoder"),
        ({"config.json": {"model_type": "bert", "architectures": ["BertForMaskedLM"]}},
         r"not a causal language model: the model was saved as BertForMaskedLM"),
        ({"config.json": LLAMA | {"architectures": ["LlamaForSequenceClassification"]}},
         r"saved as LlamaForSequenceClassification, which has no language-modelling head"),
    ],
)  # fmt: skip
def test_a_directory_that_can_not_be_the_base_says_why(files: Files, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "m", files)
    with pytest.raises(RloraError, match=message) as refused:
        locate(path)
    assert str(refused.value).startswith(f"model = {path!r}: ")
    assert "\n" not in str(refused.value)
    assert "trust_remote_code" not in str(refused.value)


def test_a_model_that_is_not_a_directory_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(RloraError, match=r"a\.gguf': this path is a file; use a model's directory"):
        locate(str(tmp_path / "a.gguf"))
    for name in ("./no/such/model", "/no/such", "no/such/model", "~/model"):
        with pytest.raises(RloraError, match=rf"model = '{name}': there is no such directory"):
            locate(name)
    for name, reason in (("org/name", "connect"), ("", "")):
        with pytest.raises(RloraError, match=rf"model = '{name}': neither a local directory with a model .*{reason}"):
            locate(name)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral"])
def test_a_model_without_a_tokenizer_is_refused(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "m", {"config.json": {"model_type": kind}})
    with pytest.raises(
        RloraError, match=r"model = '.*/m': (its tokenizer can't be loaded: |there is no tokenizer)"
    ) as refused:
        load_tokenizer(path)
    assert "\n" not in str(refused.value)
    save_words(path)
    assert len(load_tokenizer(path)) == 97


def test_custom_code_of_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    tokenizer = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    path = saved(tmp_path / "m", {"config.json": {"model_type": "mine"}, "tokenizer_config.json": tokenizer})
    (tmp_path / "m" / "mine.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(RloraError, match="its tokenizer can't be loaded: "):
        load_tokenizer(path)


def test_custom_code_that_is_not_needed_is_ignored(demo: str, tmp_path: Path, config: Callable[..., Config]) -> None:
    """A model whose class is part of transformers loads although its config names custom code, which does not run."""
    shutil.copytree(demo, tmp_path / "m")
    maps = {"config.json": AUTO_MAP["auto_map"], "tokenizer_config.json": {"AutoTokenizer": ["mine.T", None]}}
    for name, auto_map in maps.items():
        settings = json.loads((tmp_path / "m" / name).read_text()) | {"auto_map": auto_map}
        (tmp_path / "m" / name).write_text(json.dumps(settings))
    (tmp_path / "m" / "mine.py").write_text("raise SystemExit('it ran')\n")
    assert load_task(config(model=str(tmp_path / "m"))).prompts


def test_a_task_without_a_tokenizer_is_refused(demo: str, tmp_path: Path, config: Callable[..., Config]) -> None:
    for file in Path(demo).iterdir():
        if "token" not in file.name:
            shutil.copy(file, tmp_path)
    with pytest.raises(RloraError, match=r"^model = .*tokenizer"):
        load_task(config(model=str(tmp_path)))


def test_weights_that_find_no_room_are_told_with_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = tiny_model("llama")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # as a disk on which 10 kB are left
    try:
        with pytest.raises(RloraError, match=f"could not be written to {tmp_path} .*set TMPDIR"):
            encode_model(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(encode_model(model)[1]) > 10_000
