"""The adapter that a run starts from, where its config names one: read and checked before anything is trained."""

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
from rlora.machine import DTYPES
from rlora.model.base import load_base, locate
from rlora.model.plain_lora import kind_of
from rlora.records import ADAPTER_FILES, RloraError
from rlora.settings import Config, LearnerConfig

Files = tuple[bytes, bytes]  # adapter_config.json and adapter_model.safetensors


def read_start(config: Config) -> Files | None:
    """The files that `learner.start_from` names, fit to start from; None where it names none. Raises RloraError."""
    return checked_start(config.learner, partial(base_in_ram, config))


def checked_start(learner: LearnerConfig, base: Callable[[], PreTrainedModel]) -> Files | None:
    """The same, over the model that `base` gives, which is compared with where weights of one were saved too.

    Raises RloraError where they can't be read, are of another rank or scale than the config says, or hold more than an
    adapter.
    """
    if not learner.start_from:
        return None
    for name in ("targets", "head", "init"):
        if getattr(learner, name) != getattr(LearnerConfig(), name):
            raise RloraError(
                f"learner.{name} = {getattr(learner, name)!r}: learner.start_from brings its own; leave it out"
            )
    try:
        files = plain(*read(UPath(learner.start_from)), base)
        spec, _ = decode(*files)
    except RloraError as error:
        raise RloraError(f"learner.start_from = {learner.start_from!r}: {error}") from error
    check_same_adapter(f"learner.start_from = {learner.start_from!r}", spec, learner)
    return files


def check_same_adapter(source: str, spec: Spec, learner: LearnerConfig) -> None:
    """Raise RloraError where a saved adapter has another rank or scale than the config says."""
    for name in ("rank", "alpha", "rslora"):
        ours, theirs = getattr(learner, name), getattr(spec, name)
        if ours != theirs:
            raise RloraError(
                f"{source}: its {name} is {theirs}, learner.{name} is {ours}; set learner.{name} to {theirs}"
            )


def base_in_ram(config: Config) -> PreTrainedModel:
    """The frozen base in RAM, to compare weights with."""
    return load_base(locate(config.model), DTYPES[config.dtype], torch.device("cpu"))


def read(directory: Path | UPath) -> Files:
    """The two files of an adapter. Raises RloraError where they are not there."""
    try:
        config, weights = (directory / name for name in ADAPTER_FILES)
        return config.read_bytes(), weights.read_bytes()
    except OSError as error:
        raise RloraError(f"{directory}: no adapter in PEFT's format is there ({error})") from None


def plain(config: bytes, weights: bytes, base: Callable[[], PreTrainedModel]) -> Files:
    """The files of an adapter without weights of its model, which PEFT saves too (`save_embedding_layers`,
    `modules_to_save`). `base` loads that model, where there are any.

    Raises RloraError where they are not the model's: they were trained, or the embeddings were resized.
    """
    try:
        settings, tensors = json.loads(config), safetensors.torch.load(weights)
    except (ValueError, safetensors.SafetensorError):
        return config, weights  # `decode` says so
    whole = {name: place for name in tensors if (place := _place_in_base(name))}
    if not whole:
        return config, weights
    model = base()
    owned = dict(model.named_parameters(remove_duplicate=False))
    for name, place in whole.items():
        if place in owned:
            _check_same(name, tensors.pop(name), owned[place].detach().cpu())
    saved = {place.rpartition(".")[0] for name, place in whole.items() if name not in tensors}
    modules = settings.get("modules_to_save") or []
    settings["modules_to_save"] = [end for end in modules if not any(f".{at}".endswith(f".{end}") for at in saved)]
    settings["modules_to_save"] = settings["modules_to_save"] or None
    return json.dumps(settings, indent=2).encode(), safetensors.torch.save(tensors, metadata={"format": "pt"})


def _place_in_base(name: str) -> str | None:
    """The model's own name of a weight that is saved whole; None for what belongs to the adapter."""
    if not name.endswith((".weight", ".bias")) or any(part in name for part in (".lora_", ".token_adapter.")):
        return None
    for wrapper in (".base_layer", ".modules_to_save.default", ".modules_to_save", ".original_module"):
        name = name.replace(f"{wrapper}.", ".")
    return name.removeprefix(PREFIX)


def _check_same(name: str, saved: Tensor, own: Tensor) -> None:
    if saved.shape != own.shape:
        what = f"it has the shape {list(saved.shape)} where the model has {list(own.shape)}, so it was resized"
    elif saved.to(own.dtype).equal(own) or saved.equal(own.to(saved.dtype)):  # the coarser of the two decides
        return
    else:
        off = float((saved.double() - own.double()).abs().max())
        what = f"it differs by up to {off:.2g} from the model's, so it was trained, or belongs to another model"
    raise RloraError(
        f"adapter_model.safetensors: {name} is {kind_of(name)}, and {what}; only A and B can be loaded: merge the "
        "adapter into its model with PEFT (merge_and_unload), and set `model` to what you save of that"
    )
