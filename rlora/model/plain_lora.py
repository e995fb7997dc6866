"""Checks that an adapter in PEFT's format is plain LoRA, W + scale B A. Other kinds can't be loaded."""

from collections.abc import Mapping
from typing import Any

from rlora.records import MAX_RANK, RloraError

_INITS = {"gaussian", "orthogonal", "eva"}  # PEFT's initialisations that leave the base unchanged
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
_DISABLED = {  # PEFT's settings, with the value that disables them
    "use_dora": False, "lora_bias": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None,
    "layer_replication": None, "trainable_token_indices": None, "alora_invocation_tokens": None, "use_qalora": False,
}  # fmt: skip


def check_supported(settings: Mapping[str, Any], factors: Mapping[str, str]) -> None:
    """Raise RloraError that names the setting or the tensor unless an adapter is plain LoRA of rank 1 to 8.

    `settings` is the content of adapter_config.json; `factors` maps tensor names to factors, such as lora_A.
    """
    if settings.get("peft_type") != "LORA":
        raise RloraError(
            f"adapter_config.json: peft_type = {settings.get('peft_type')!r} can't be loaded; use an adapter with "
            "peft_type = 'LORA'"
        )
    for name, value in _DISABLED.items():
        if settings.get(name, value) not in (value, None):
            raise RloraError(
                f"adapter_config.json: {name} = {settings[name]!r} can't be loaded, because rlora applies only W + "
                f"scale B A; use an adapter with {name} = {value!r}"
            )
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS:
        raise RloraError(
            f"adapter_config.json: init_lora_weights = {init!r} also changed the base, so the adapter alone is not the "
            "policy; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    for name, factor in factors.items():
        if factor not in ("lora_A", "lora_B"):
            raise RloraError(
                f"adapter_model.safetensors: {name} is neither A nor B of a weight matrix: it is {kind_of(name)}; "
                "use an adapter that is LoRA over weight matrices only"
            )
    for name, rank in ({"r": settings["r"]} | settings["rank_pattern"]).items():
        if not 1 <= rank <= MAX_RANK:
            raise RloraError(f"adapter_config.json: {name} has rank {rank}; use an adapter of rank 1 to {MAX_RANK}")


def kind_of(name: str) -> str:
    """Describe the tensor `name` of an adapter, which is neither A nor B, and name the PEFT setting that adds it."""
    kinds = {
        "lora_magnitude_vector": "a magnitude vector of DoRA (use_dora)",
        "lora_embedding_": "LoRA over embeddings",
        "token_adapter": "trained embeddings of single tokens (trainable_token_indices)",
        "lora_B.bias": "a bias of B (lora_bias)",
        ".bias": "a bias of the model (bias)",
        **dict.fromkeys(_EMBEDDINGS, "embeddings (save_embedding_layers, modules_to_save)"),
    }
    return next((kind for part, kind in kinds.items() if part in name), "a weight of the model (modules_to_save)")
