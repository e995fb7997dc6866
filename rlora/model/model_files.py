"""Checks that a directory or a hub model can be the base, before anything is loaded from it."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoModelForCausalLM

from rlora.records import RloraError

_GENERATES = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")


def check_config_file(directory: Path) -> None:
    """Raise RloraError if a directory has no config.json that contains a JSON object."""
    file = directory / "config.json"
    if file.is_file():
        try:
            if isinstance(json.loads(file.read_bytes()), dict):
                return
            reason = "the content is not an object"
        except ValueError as error:
            _check_no_pointer(f"model = {str(directory)!r}", file)
            reason = str(error)
        raise RloraError(
            f"model = {str(directory)!r}: its config.json is not a JSON object: {reason}; save the model again"
        )
    _check_no_adapter(directory)
    ggufs = sorted(directory.glob("*.gguf"))
    inner = sorted([*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json")])
    reason = f"rlora does not load GGUF ({ggufs[0].name})" if ggufs else "the directory has no config.json"
    fix = f"did you mean {inner[0].parent}?" if inner else "use a directory with config.json and safetensors"
    raise RloraError(
        f"model = {str(directory)!r}: neither a local directory with a model nor a reachable hub id: {reason}; {fix}"
    )


def _check_no_pointer(field: str, file: Path) -> None:
    """Raise RloraError if a file is a Git LFS pointer, which stands for a file that was not fetched."""
    if is_pointer(file):
        raise RloraError(f"{field}: its {file.name} is a Git LFS pointer: fetch the file with `git lfs pull`")


def is_pointer(file: Path) -> bool:
    """Return whether a file is a Git LFS pointer."""
    with file.open("rb") as opened:
        return opened.read(40).startswith(b"version https://git-lfs")


def _check_no_adapter(directory: Path) -> None:
    """Raise RloraError if a directory contains an adapter in PEFT's format."""
    file = directory / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_bytes()).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    raise RloraError(
        f"model = {str(directory)!r}: this is an adapter for {repr(base) if base else 'an unnamed base'}, not a model; "
        f"set model = {repr(base) if base else 'the base of the adapter'} and learner.start_from = {str(directory)!r}"
    )


def check_kind(model: str, config: Any) -> None:
    """Raise RloraError if a config is not that of a causal language model."""
    architectures = getattr(config, "architectures", None) or []
    reason = ""
    if type(config) not in AutoModelForCausalLM._model_mapping:
        reason = f"transformers has no causal language model of type {config.model_type!r}"
    elif getattr(config, "is_encoder_decoder", False):
        reason = f"type {config.model_type!r} is an encoder-decoder"
    elif architectures and not any(map(_GENERATES.search, architectures)):
        reason = f"the model was saved as {', '.join(architectures)}, which has no language-modelling head"
    if reason:
        raise RloraError(
            f"model = {model!r}: not a causal language model: {reason}; use a causal language model, such as "
            "SmolLM2 or Qwen3"
        )


def check_weights(directory: Path) -> None:
    """Raise RloraError if files with weights are missing or unreadable in a directory."""
    names = {path.name for path in directory.iterdir()}
    field = f"model = {str(directory)!r}"
    for name in ("model.safetensors", "pytorch_model.bin"):
        if name in names:
            _check_file(field, directory / name)
            return
        if f"{name}.index.json" in names:
            files = _shards(field, directory / f"{name}.index.json")
            if missing := sorted(set(files) - names):
                raise RloraError(
                    f"{field}: {len(missing)} of its {len(files)} weight files are missing ({', '.join(missing[:3])}); "
                    "download them, or save the model again"
                )
            for file in files:
                _check_file(field, directory / file)
            return
    _check_no_adapter(directory)
    unread = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".gguf", ".pt", ".pth")))
    raise RloraError(
        f"{field}: the directory has no weights (*.safetensors)"
        + (f" with the names that transformers reads, only {', '.join(unread[:3])}" if unread else "")
        + "; save the complete model there with save_pretrained"
    )


def _shards(field: str, index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RloraError(f"{field}: its {index.name} can't be read ({error!r}); save the model again") from error


def _check_file(field: str, file: Path) -> None:
    """Raise RloraError if a safetensors file is truncated or a Git LFS pointer."""
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, "pt"):
            pass
    except Exception as error:  # raised by Rust
        _check_no_pointer(field, file)
        raise RloraError(
            f"{field}: its {file.name} can't be read ({error}); download or save the file again"
        ) from error


def error_summary(error: BaseException) -> str:
    """Return the first paragraph of an exception's message, on one line."""
    return " ".join(str(error).strip().split("\n\n")[0].split()).rstrip(".") or type(error).__name__
