"""Why a directory, or what is on a hub, can't be the base: looked at before anything is loaded from it."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoModelForCausalLM

from rlora.records import RloraError

_GENERATES = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")


def check_config_file(directory: Path) -> None:
    """Raise RloraError where a directory has no config.json with an object in it."""
    file = directory / "config.json"
    if file.is_file():
        try:
            if isinstance(json.loads(file.read_bytes()), dict):
                return
            reason = "it holds no object"
        except ValueError as error:
            _refuse_a_pointer(f"model = {str(directory)!r}", file)
            reason = str(error)
        raise RloraError(f"model = {str(directory)!r}: its config.json is not valid JSON: {reason}; save it again")
    _refuse_an_adapter(directory)
    ggufs = sorted(directory.glob("*.gguf"))
    inner = sorted([*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json")])
    found = f"it has {ggufs[0].name}, and GGUF is not read" if ggufs else "it has no config.json"
    fix = f"did you mean {inner[0].parent}?" if inner else "give a directory with config.json and safetensors"
    raise RloraError(
        f"model = {str(directory)!r}: neither a local directory with a model nor a hub id that can be reached: "
        f"{found}; {fix}"
    )


def _refuse_a_pointer(what: str, file: Path) -> None:
    """Raise RloraError where a file is what Git LFS leaves in place of one that was not fetched."""
    if is_pointer(file):
        raise RloraError(f"{what}: its {file.name} is a pointer of Git LFS: fetch it by `git lfs pull`")


def is_pointer(file: Path) -> bool:
    """Whether a file is a pointer of Git LFS."""
    with file.open("rb") as opened:
        return opened.read(40).startswith(b"version https://git-lfs")


def _refuse_an_adapter(directory: Path) -> None:
    """Raise RloraError where it holds an adapter in PEFT's format."""
    file = directory / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_bytes()).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    over = repr(base) if base else "a base that it does not name"
    raise RloraError(
        f"model = {str(directory)!r}: it is an adapter over {over}, and no model; set model = "
        f"{over if base else 'its base'} and learner.start_from = {str(directory)!r}"
    )


def check_kind(model: str, config: Any) -> None:
    """Raise RloraError where a config is of anything but a causal language model."""
    architectures = getattr(config, "architectures", None) or []
    reason = ""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        reason = f"transformers has no causal language model of type {config.model_type!r}"
    elif getattr(config, "is_encoder_decoder", False):
        reason = f"type {config.model_type!r} is an encoder-decoder"
    elif architectures and not any(map(_GENERATES.search, architectures)):
        reason = f"it was saved as {', '.join(architectures)}, which has no head that gives tokens"
    if reason:
        raise RloraError(f"model = {model!r}: no causal language model: {reason}; use one, such as SmolLM2 or Qwen3")


def check_weights(directory: Path) -> None:
    """Raise RloraError where a directory lacks weights, or some of them."""
    names = {path.name for path in directory.iterdir()}
    what = f"model = {str(directory)!r}"
    for name in ("model.safetensors", "pytorch_model.bin"):
        if name in names:
            _check_file(what, directory / name)
            return
        if f"{name}.index.json" in names:
            files = _shards(what, directory / f"{name}.index.json")
            if missing := sorted(set(files) - names):
                raise RloraError(
                    f"{what}: {len(missing)} of its {len(files)} weight files are missing ({', '.join(missing[:3])}); "
                    "download or save them too"
                )
            for file in files:
                _check_file(what, directory / file)
            return
    _refuse_an_adapter(directory)
    others = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".gguf", ".pt", ".pth")))
    raise RloraError(
        f"{what}: no weights are there (*.safetensors)"
        + (f" under the names that transformers reads, only {', '.join(others[:3])}" if others else "")
        + "; save the whole model in it by save_pretrained"
    )


def _shards(what: str, index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RloraError(f"{what}: its {index.name} can't be read ({error!r}); save the model again") from error


def _check_file(what: str, file: Path) -> None:
    """Raise RloraError for a safetensors file that is cut off, or a pointer to one."""
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, "pt"):
            pass
    except Exception as error:  # of Rust
        _refuse_a_pointer(what, file)
        raise RloraError(f"{what}: its {file.name} can't be read ({error}); download or save it again") from error


def reason_of(error: BaseException) -> str:
    """What an exception says, on one line: its first paragraph."""
    return " ".join(str(error).strip().split("\n\n")[0].split()).rstrip(".") or type(error).__name__
