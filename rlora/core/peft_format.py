"""PEFT's format of one adapter, both ways, as bytes: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Iterable
from typing import Any

import safetensors
import safetensors.numpy
import safetensors.torch
from torch import Tensor, nn

from rlora.core.lora import Bank, Matrix, Spec
from rlora.model.plain_lora import check_supported
from rlora.records import RloraError

PREFIX = "base_model.model."  # of the names of saved tensors
_FUSED = ("gate_up_proj", "down_proj")  # of experts, in the order PEFT wraps them


def encode(bank: Bank, adapter: str, base: str) -> tuple[bytes, bytes]:
    """Adapter `adapter` of `bank` over the base at `base`: its config and its weights, in fp32."""
    spec = bank.specs[adapter]
    experts = [matrix for matrix in bank.over(adapter) if len(matrix.shape) == 3]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _modules(bank, adapter),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "inference_mode": True,
    }
    if experts:
        config["target_parameters"] = sorted({_ending(matrix) for matrix in experts})
        if spec.shares_rank and (rank := spec.rank_of(experts[0])) != spec.rank:
            config["rank_pattern"] = {_ending(matrix): rank for matrix in experts}
    arrays = {name: master.detach().cpu().contiguous().numpy() for name, master in masters(bank, adapter).items()}
    return json.dumps(config, indent=2).encode(), safetensors.numpy.save(arrays, metadata={"format": "pt"})


def masters(bank: Bank, adapter: str) -> dict[str, nn.Parameter]:
    """The adapter's masters by the names that PEFT saves them under."""
    found: dict[str, nn.Parameter] = {}
    pairs = bank.over(adapter)
    for (name_a, name_b), matrix in by_names(pairs).items():
        found |= {name_a: pairs[matrix].a, name_b: pairs[matrix].b}
    return found


def by_names(over: Iterable[Matrix]) -> dict[tuple[str, str], Matrix]:
    """An adapter's matrices by the names that PEFT saves their A and B under.

    Around fused experts it puts a wrapper for each parameter that is adapted, the first parameter's innermost.
    """
    wrapped: dict[str, Matrix] = {}
    for matrix in over:
        if matrix.place in wrapped:
            wrapped[f"{matrix.place}.base_layer"] = wrapped.pop(matrix.place)
        wrapped[matrix.place] = matrix
    return {
        (f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"): matrix
        for module, matrix in wrapped.items()
    }


def _modules(bank: Bank, adapter: str) -> list[str]:
    """The linear layers it is over: by the last part of their names where that says no more than it should."""
    over = {matrix.key for matrix in bank.over(adapter)}
    linear = {matrix.key for matrix in bank.factors if len(matrix.shape) == 2}
    beyond = {key.rpartition(".")[2] for key in linear - over}
    return sorted({ending if (ending := key.rpartition(".")[2]) not in beyond else key for key in linear & over})


def _ending(expert: Matrix) -> str:
    return ".".join(expert.key.split(".")[-2:])


def decode(config: bytes, weights: bytes) -> tuple[Spec, dict[str, Tensor]]:
    """What PEFT saved: the adapter's spec, and its tensors by PEFT's names.

    Raises RloraError, naming the setting, for what is not plain LoRA of rank 1 to 8.
    """
    try:
        settings: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}} | json.loads(config)
        rank, alpha = settings["r"], settings["lora_alpha"]
        tensors = safetensors.torch.load(weights)
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise RloraError(
            f"adapter: its files are not whole ({type(error).__name__}: {error}); save it again"
        ) from error
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".base_layer.weight")}  # a copy
    check_supported(settings, {name: parse(name)[1] for name in tensors})
    spec = Spec(
        rank=rank,
        alpha=alpha,
        rslora=bool(settings.get("use_rslora")),
        targets=_keys({parse(name)[0] for name in tensors}, settings.get("target_parameters") or []),
        rank_pattern=settings["rank_pattern"],
        alpha_pattern=settings["alpha_pattern"],
        shares_rank=False,
    )
    return spec, tensors


def _keys(modules: set[str], parameters: list[str]) -> frozenset[str]:
    """The keys of the matrices that PEFT has wrapped in `modules`, where it was told to adapt `parameters` too."""
    keys = set()
    for module in modules:
        place = module.removesuffix(".base_layer")
        of_module = _FUSED if place.endswith(".experts") else ()
        fused = [part for part in of_module if any(f".{place}.{part}".endswith(f".{end}") for end in parameters)]
        keys.add(f"{place}.{fused[0 if module != place else -1]}" if fused else module)
    return frozenset(keys)


def parse(name: str) -> tuple[str, str]:
    """The module that a saved tensor is over, and which factor it is: lora_A or lora_B."""
    module, _, factor = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    return module, factor


def fill(bank: Bank, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Put an adapter's tensors in its place in the bank. Raises RloraError where they do not fit, changing nothing."""
    ours = masters(bank, adapter)
    for name in sorted(ours.keys() | tensors.keys()):
        want, got = (list(t[name].shape) if name in t else "nothing" for t in (ours, tensors))
        if want != got:
            raise RloraError(f"adapter: {name} is {got} where this model and rank have {want}; it is another model's")
    for name, master in ours.items():
        master.data.copy_(tensors[name])
