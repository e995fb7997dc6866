"""What makes of an adapter in PEFT's format something else than W + scale B A, which is all that can be loaded."""

from collections.abc import Mapping
from typing import Any

from rlora.records import MAX_RANK, RloraError

_LEAVE_THE_BASE = {"gaussian", "orthogonal", "eva"}  # PEFT's named initialisations that do not change the base
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
_MUST_BE = {  # settings, and the value that leaves them off
    "use_dora": False, "lora_bias": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None,
    "layer_replication": None, "trainable_token_indices": None, "alora_invocation_tokens": None, "use_qalora": False,
}  # fmt: skip


def check_supported(settings: Mapping[str, Any], factors: Mapping[str, str]) -> None:
    """Raise RloraError, naming the setting or the tensor, for what is not plain LoRA of rank 1 to 8.

    `factors` says of each tensor, by its name, which factor it would be.
    """
    if settings.get("peft_type") != "LORA":
        raise RloraError(f"adapter_config.json: peft_type = {settings.get('peft_type')!r}; only LORA can be loaded")
    for name, value in _MUST_BE.items():
        if settings.get(name, value) not in (value, None):
            raise RloraError(f"adapter_config.json: {name} = {settings[name]!r} can't be loaded; it must be {value!r}")
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _LEAVE_THE_BASE:
        raise RloraError(
            f"adapter_config.json: init_lora_weights = {init!r} started from a base that was changed too, so the "
            "adapter alone is not the policy; convert it by PEFT's path_initial_model_for_weight_conversion"
        )
    for name, factor in factors.items():
        if factor not in ("lora_A", "lora_B"):
            raise RloraError(
                f"adapter_model.safetensors: {name} is neither A nor B of a weight matrix: it is {kind_of(name)}; "
                "give an adapter that is LoRA over weight matrices alone"
            )
    for name, rank in ({"r": settings["r"]} | settings["rank_pattern"]).items():
        if not 1 <= rank <= MAX_RANK:
            raise RloraError(f"adapter_config.json: {name} has rank {rank}; ranks go from 1 to {MAX_RANK}")


def kind_of(name: str) -> str:
    """What a tensor is that is neither A nor B."""
    kinds = {
        "lora_magnitude_vector": "a magnitude vector of DoRA (use_dora)",
        "lora_embedding_": "LoRA over embeddings",
        "token_adapter": "trained embeddings of single tokens (trainable_token_indices)",
        "lora_B.bias": "a bias beside B (lora_bias)",
        ".bias": "a bias of the model (bias)",
        **dict.fromkeys(_EMBEDDINGS, "embeddings that were saved whole (save_embedding_layers, modules_to_save)"),
    }
    return next((kind for part, kind in kinds.items() if part in name), "a weight of the model (modules_to_save)")
