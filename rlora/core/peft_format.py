"""Encode and decode an adapter in PEFT's format: the bytes of adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import safetensors
import safetensors.numpy
import safetensors.torch
from torch import Tensor, nn

from rlora.core.lora import Bank, Matrix, Spec
from rlora.model.plain_lora import check_supported
from rlora.records import RloraError

PREFIX = "base_model.model."  # prefix of the names of saved tensors
_FUSED = ("gate_up_proj", "down_proj")  # parameters of fused experts, in the order in which PEFT wraps them


def encode(bank: Bank, adapter: str, base: str) -> tuple[bytes, bytes]:
    """Return the config and the fp32 weights of an adapter in `bank`, as bytes. `base` is the base's path or id."""
    spec = bank.specs[adapter]
    experts = [matrix for matrix in bank.pairs_of(adapter) if len(matrix.shape) == 3]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _target_modules(bank, adapter),
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
        "inference_mode": True,
    }
    if experts:
        config["target_parameters"] = sorted({_suffix(matrix) for matrix in experts})
        if spec.shares_rank and (rank := spec.rank_of(experts[0])) != spec.rank:
            config["rank_pattern"] = {_suffix(matrix): rank for matrix in experts}
    arrays = {name: master.detach().cpu().contiguous().numpy() for name, master in masters(bank, adapter).items()}
    return json.dumps(config, indent=2).encode(), safetensors.numpy.save(arrays, metadata={"format": "pt"})


def masters(bank: Bank, adapter: str) -> dict[str, nn.Parameter]:
    """Return the adapter's fp32 master weights, keyed by PEFT's tensor names."""
    parameters: dict[str, nn.Parameter] = {}
    pairs = bank.pairs_of(adapter)
    for (name_a, name_b), matrix in matrices_by_name(pairs).items():
        parameters |= {name_a: pairs[matrix].a, name_b: pairs[matrix].b}
    return parameters


def matrices_by_name(matrices: Iterable[Matrix]) -> dict[tuple[str, str], Matrix]:
    """Return an adapter's matrices, keyed by PEFT's names of A and B.

    PEFT wraps fused experts once for each adapted parameter; the wrapper of the first parameter is innermost.
    """
    wrapped: dict[str, Matrix] = {}
    for matrix in matrices:
        if matrix.module_name in wrapped:
            wrapped[f"{matrix.module_name}.base_layer"] = wrapped.pop(matrix.module_name)
        wrapped[matrix.module_name] = matrix
    return {
        (f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"): matrix
        for module, matrix in wrapped.items()
    }


def _target_modules(bank: Bank, adapter: str) -> list[str]:
    """Return the adapted linear layers: the last part of a name, or the full name if the part matches other layers."""
    adapted = {matrix.key for matrix in bank.pairs_of(adapter)}
    linear = {matrix.key for matrix in bank.factors if len(matrix.shape) == 2}
    ambiguous = {key.rpartition(".")[2] for key in linear - adapted}
    return sorted({leaf if (leaf := key.rpartition(".")[2]) not in ambiguous else key for key in linear & adapted})


def _suffix(expert: Matrix) -> str:
    """Return the last two parts of the key, such as `experts.down_proj`."""
    return ".".join(expert.key.split(".")[-2:])


def decode(config: bytes, weights: bytes) -> tuple[Spec, dict[str, Tensor]]:
    """Parse the bytes of adapter_config.json and adapter_model.safetensors. Return the spec, and the tensors keyed
    by PEFT's names, without copies of base weights. Raises RloraError, naming the setting or tensor, unless this is
    plain LoRA: A and B of rank 1 to 8 over weight matrices, without DoRA, biases, embeddings or whole modules.
    """
    try:
        settings: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}} | json.loads(config)
        rank, alpha = settings["r"], settings["lora_alpha"]
        tensors = safetensors.torch.load(weights)
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise RloraError(f"adapter: its files are corrupt ({type(error).__name__}: {error}); save it again") from error
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".base_layer.weight")}  # copies
    check_supported(settings, {name: parse(name)[1] for name in tensors})
    spec = Spec(
        rank=rank,
        alpha=alpha,
        rslora=bool(settings.get("use_rslora")),
        targets=frozenset(keys(settings, {parse(name)[0] for name in tensors}).values()),
        rank_pattern=settings["rank_pattern"],
        alpha_pattern=settings["alpha_pattern"],
        shares_rank=False,
    )
    return spec, tensors


def keys(settings: Mapping[str, Any], modules: Iterable[str]) -> dict[str, str]:
    """Return the keys of the matrices that PEFT wrapped as `modules`. `settings` are those of adapter_config.json."""
    parameters = settings.get("target_parameters") or ()
    found = {}
    for module in modules:
        name = module.removesuffix(".base_layer")
        candidates = _FUSED if name.endswith(".experts") else ()
        fused = [part for part in candidates if any(f".{name}.{part}".endswith(f".{suffix}") for suffix in parameters)]
        found[module] = f"{name}.{fused[0 if module != name else -1]}" if fused else module
    return found


def parse(name: str) -> tuple[str, str]:
    """Split the name of a saved tensor into the name of the adapted module and the factor: lora_A or lora_B."""
    module, _, factor = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
    return module, factor


def fill(bank: Bank, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Copy saved tensors into an adapter. Raises RloraError, changing nothing, if a name or a shape differs."""
    parameters = masters(bank, adapter)
    for name in sorted(parameters.keys() | tensors.keys()):
        expected, shape = (list(t[name].shape) if name in t else "no tensor" for t in (parameters, tensors))
        if expected != shape:
            raise RloraError(
                f"adapter: {name}: found {shape}, expected {expected} for this model and rank; use the model that the "
                "adapter was trained on"
            )
    for name, master in parameters.items():
        master.data.copy_(tensors[name])
