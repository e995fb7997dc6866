"""Reads and checks the adapter in `learner.start_from`, before training starts."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel
from upath import UPath

from rlora.core.lora import Spec
from rlora.core.peft_format import PREFIX, decode
from rlora.device import DTYPES
from rlora.model.base import load_base, locate
from rlora.model.plain_lora import kind_of
from rlora.records import ADAPTER_FILES, RloraError
from rlora.settings import Config, LearnerConfig

Files = tuple[bytes, bytes]  # adapter_config.json and adapter_model.safetensors


def read_start(config: Config) -> Files | None:
    """Read and check the adapter in `learner.start_from`. None if the setting is empty. Raises as `checked_start`."""
    return checked_start(config.learner, partial(base_in_ram, config))


def checked_start(learner: LearnerConfig, base: Callable[[], PreTrainedModel]) -> Files | None:
    """Read and check the adapter in `learner.start_from`, and return its files; None if the setting is empty.

    `base` loads the model, and is called only if the files contain base weights, which must equal the model's. Raises
    RloraError if the files can't be read, if rank or scale differ from the config, or if the files contain more than a
    LoRA adapter.
    """
    if not learner.start_from:
        return None
    for name in ("targets", "head", "init"):
        if getattr(learner, name) != getattr(LearnerConfig(), name):
            raise RloraError(
                f"learner.{name} = {getattr(learner, name)!r}: the adapter in learner.start_from determines this "
                f"field; remove learner.{name}"
            )
    try:
        files = without_base_weights(*read(UPath(learner.start_from)), base)
        spec, _ = decode(*files)
    except RloraError as error:
        raise RloraError(f"learner.start_from = {learner.start_from!r}: {error}") from error
    check_same_adapter(f"learner.start_from = {learner.start_from!r}", spec, learner)
    return files


def check_same_adapter(source: str, spec: Spec, learner: LearnerConfig) -> None:
    """Raise RloraError if the rank or scale of a saved adapter differs from `learner`. `source` begins the message."""
    for name in ("rank", "alpha", "rslora"):
        configured, saved = getattr(learner, name), getattr(spec, name)
        if configured != saved:
            raise RloraError(
                f"{source}: its {name} is {saved}, learner.{name} is {configured}; set learner.{name} to {saved}"
            )


def base_in_ram(config: Config) -> PreTrainedModel:
    """Load the frozen base into RAM, to compare saved base weights with the base."""
    return load_base(locate(config.model), DTYPES[config.dtype], torch.device("cpu"))


def read(directory: Path | UPath) -> Files:
    """Read the two files of an adapter in PEFT's format. Raises RloraError if a file can't be read."""
    try:
        config, weights = (directory / name for name in ADAPTER_FILES)
        return config.read_bytes(), weights.read_bytes()
    except OSError as error:
        raise RloraError(
            f"{directory}: there is no adapter in PEFT's format ({error}); use a directory with "
            f"{' and '.join(ADAPTER_FILES)}"
        ) from None


def without_base_weights(config: bytes, weights: bytes, base: Callable[[], PreTrainedModel]) -> Files:
    """Return the files of an adapter without base weights, which PEFT saves too with `save_embedding_layers` or
    `modules_to_save`. Calls `base` to load the model only if there are such weights.

    Raises RloraError if a removed weight differs from the model's: it was trained, or the embeddings were resized.
    """
    try:
        settings, tensors = json.loads(config), safetensors.torch.load(weights)
    except (ValueError, safetensors.SafetensorError):
        return config, weights  # `decode` raises the error
    base_names = {name: base_name for name in tensors if (base_name := _base_name(name))}
    if not base_names:
        return config, weights
    model = base()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, base_name in base_names.items():
        if base_name in parameters:
            _check_equal(name, tensors.pop(name), parameters[base_name].detach().cpu())
    removed = {base_name.rpartition(".")[0] for name, base_name in base_names.items() if name not in tensors}
    modules = settings.get("modules_to_save") or []
    settings["modules_to_save"] = [end for end in modules if not any(f".{key}".endswith(f".{end}") for key in removed)]
    settings["modules_to_save"] = settings["modules_to_save"] or None
    return json.dumps(settings, indent=2).encode(), safetensors.torch.save(tensors, metadata={"format": "pt"})


def _base_name(name: str) -> str | None:
    """Return the name that a saved base weight has in the base model; None for a tensor of the adapter."""
    if not name.endswith((".weight", ".bias")) or any(part in name for part in (".lora_", ".token_adapter.")):
        return None
    for wrapper in (".base_layer", ".modules_to_save.default", ".modules_to_save", ".original_module"):
        name = name.replace(f"{wrapper}.", ".")
    return name.removeprefix(PREFIX)


def _check_equal(name: str, saved: Tensor, expected: Tensor) -> None:
    """Raise RloraError if a saved base weight differs from the model's, compared in the coarser of the two dtypes."""
    if saved.shape != expected.shape:
        reason = f"its shape {list(saved.shape)} differs from the model's {list(expected.shape)}, so it was resized"
    elif saved.to(expected.dtype).equal(expected) or saved.equal(expected.to(saved.dtype)):
        return
    else:
        difference = float((saved.double() - expected.double()).abs().max())
        reason = f"it differs by up to {difference:.2g} from the model's, so it was trained or is of a different model"
    raise RloraError(
        f"adapter_model.safetensors: {name} is {kind_of(name)}, and {reason}; only A and B can be loaded: merge the "
        "adapter into its model with PEFT (merge_and_unload), save the result, and set `model` to that directory"
    )
