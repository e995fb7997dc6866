"""Builds vLLM's engine from the config, and loads adapters into it."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vllm
from transformers import AutoConfig, PreTrainedModel
from vllm import EngineArgs, LLMEngine
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.usage.usage_lib import UsageContext

from rlora import cards
from rlora.cards import MemoryPlan
from rlora.core.footprint import bytes_of
from rlora.core.lora import Spec, matrices
from rlora.device import DTYPES, card_uuid, current_device, describe_device
from rlora.model.base import kv_bytes_per_token, meta_model, vocabulary_size
from rlora.records import Adapter, DeliveryError, EngineInfo, RloraError
from rlora.settings import Config

_CPU_OPTIONS = {
    "gpu_memory_utilization": 0.5,  # of RAM; vLLM requires that much to be free when it starts
    "enforce_eager": True,  # vLLM's default with adapters; compiling takes minutes
    "block_size": 32,  # the smallest; with 128 the completions of a short prompt share no prefix blocks
}
_LARGEST_VOCABULARY = 258048  # of an output head that vLLM's LoRA kernels support


def build(
    config: Config, base: str, seed: int, slots: int, full_weights: bool, experts: bool, memory_plan: MemoryPlan
) -> LLMEngine:
    """Build vLLM's engine for the base model in the directory `base`. Blocks until vLLM is ready to sample.

    The engine has `slots` adapter slots, or none if it serves `full_weights`. `seed` seeds sampling, and `experts` says
    whether the base is a mixture of experts. On a GPU the engine takes the memory that learners leave according to
    `memory_plan`. Raises RloraError if vLLM's build or kernels do not support the config, or if the memory is too
    little.
    """
    settings, on_gpu = config.engine, current_device().type == "cuda"
    shape = meta_model(AutoConfig.from_pretrained(base, trust_remote_code=False), DTYPES[config.dtype])
    is_patched = False  # with the parts for vLLM's CPU build
    options = {} if full_weights else _lora_options(config, shape, slots, experts)
    if on_gpu:
        _check_kernels(config, base)
        options |= _gpu_options(config, shape, memory_plan)
    else:
        _check_cpu_build(config, experts)
        from rlora.engine.cpu import patches
        from rlora.engine.cpu.sampling import record_masks

        options |= _CPU_OPTIONS
        is_patched = patches.install(config.learner.head or bool(config.learner.start_from))
        if config.sampling.truncates and not is_patched:
            raise RloraError(
                f"sampling.top_k, top_p, min_p: vLLM {vllm.__version__} does not return the tokens that were kept on a "
                "CPU; install the version of vLLM that rlora was tested with, or unset the three"
            )
    if settings.max_num_batched_tokens:
        options["max_num_batched_tokens"] = settings.max_num_batched_tokens
    if settings.tensor_parallel_size == 1:
        options["distributed_executor_backend"] = "uni"  # in this process; others would busy-wait beside the learner
    llm = LLMEngine.from_engine_args(
        EngineArgs(
            model=base,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=settings.sequences(on_gpu) + 1,  # the canary
            seed=seed,
            logprobs_mode="processed_logprobs",  # of the distribution that tokens are sampled from
            generation_config="vllm",  # ignore the model's own sampling defaults
            tensor_parallel_size=settings.tensor_parallel_size,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        ),
        # On a GPU vLLM derives the number of tokens per step from it.
        usage_context=UsageContext.LLM_CLASS if on_gpu else UsageContext.ENGINE_CONTEXT,
    )
    if is_patched and not full_weights:
        llm.apply_model(patches.fuse_slots)
    if is_patched and config.sampling.truncates:
        record_masks(llm)
    return llm


def _lora_options(config: Config, shape: PreTrainedModel, slots: int, experts: bool) -> dict[str, Any]:
    is_rank_1 = config.learner.rank == 1 and not config.learner.start_from  # which may have a rank pattern
    options = {
        "enable_lora": True,
        "max_lora_rank": 1 if is_rank_1 else 8,  # the two smallest that vLLM supports
        "lora_target_modules": lora_target_modules(shape, config),  # else vLLM wraps the head too (vllm#51594)
        "max_loras": slots,
        "max_cpu_loras": slots,
    }
    # PEFT's format: experts fused, as in transformers
    return options | ({"enable_mixed_moe_lora_format": True} if experts else {})


def _gpu_options(config: Config, shape: PreTrainedModel, memory_plan: MemoryPlan) -> dict[str, Any]:
    options = {
        "enforce_eager": config.engine.eager,
        "gpu_memory_utilization": _memory_share(config, shape, memory_plan),
    }
    if config.sampling.truncates:
        options["return_sampling_mask"] = True
    kv_cache = config.engine.kv_cache_gib * cards.GIB or memory_plan.kv_cache
    return options | ({"kv_cache_memory_bytes": kv_cache} if kv_cache else {})


def _check_cpu_build(config: Config, experts: bool) -> None:
    if experts:
        raise RloraError(
            f"model = {config.model!r}: vLLM's CPU build can't serve adapters over experts, because its only backend "
            "for experts has no LoRA support. Full finetuning of experts is not supported there either; use a dense "
            "model, or a GPU"
        )
    if torch.version.cuda:
        raise RloraError(
            "vLLM: this build needs a GPU, and Ray gave this process none; use a machine on which Ray sees a GPU, with "
            "engine.gpus above 0, or install rlora[cpu] in a separate environment to sample on the CPU"
        )


def sampling_seed(*identity: int) -> int:
    """Return a seed for vLLM: a 32-bit hash of the numbers in `identity`, so that engine starts sample differently."""
    return int.from_bytes(hashlib.sha256(repr(identity).encode()).digest()[:4])


def engine_info(llm: LLMEngine, config: Config) -> EngineInfo:
    """Describe the device and the settings that `llm` runs with."""
    on_gpu = current_device().type == "cuda"
    cache = llm.vllm_config.cache_config
    tokens = (cache.num_gpu_blocks or 0) * (cache.block_size or 0)
    kv_cache = tokens * kv_bytes_per_token(llm.model_config.hf_config, config.engine.tensor_parallel_size)
    graphs = "eager" if llm.model_config.enforce_eager else "CUDA graphs"
    words = (
        f"engine on {describe_device()}: vLLM {vllm.__version__}, {config.dtype}, attention "
        f"{', '.join(sorted(_attention_backends(llm)))}, {graphs}, KV cache of {kv_cache / cards.GIB:.1f} GiB "
        f"({tokens:,} tokens), {config.engine.sequences(on_gpu)} completions at a time"
    )
    return EngineInfo(words, kv_cache)


def load_adapter(llm: LLMEngine, adapter: Adapter, path: Path, lora_id: int, experts: bool) -> LoRARequest | None:
    """Load the adapter's files in the directory `path` into vLLM. Blocks until the adapter is loaded.

    Returns the LoRARequest by which requests select the adapter, or None for full weights, which replace the previous
    ones. `lora_id` must not have been used before, and `experts` says whether the base is a mixture of experts. Raises
    RloraError if vLLM rejects the files, and DeliveryError if vLLM keeps cached keys of previous full weights.
    """
    if adapter.full_weights:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        llm.apply_model(_repack_head)
        if not llm.reset_prefix_cache():  # it has keys and values of the previous weights
            raise DeliveryError(
                f"adapter version {adapter.name}: vLLM did not reset its prefix cache, so completions could reuse keys "
                "and values of the previous weights; resume the run"
            )
        return None
    request = LoRARequest(adapter.name, lora_id, str(path), is_3d_lora_weight=experts)
    try:
        is_loaded = llm.add_lora(request)
    except ValueError as error:
        raise RloraError(
            f"adapter {adapter.name}: vLLM rejected the adapter: {error}; adapt other matrices (learner.targets, "
            "learner.head), or start from a different adapter (learner.start_from)"
        ) from error
    if not is_loaded:
        raise RloraError(
            f"adapter {adapter.name}: vLLM's add_lora returned False for the new id {lora_id}; report this as a bug"
        )
    if current_device().type == "cpu":
        from rlora.engine.cpu import patches

        llm.apply_model(partial(patches.set_rank, lora_id=lora_id, rank=_largest_rank(adapter)))
    return request


def lora_target_modules(model: PreTrainedModel, config: Config) -> list[str]:
    """Return the last name components, such as `q_proj`, of the modules in `model` that an adapter may adapt."""
    learner = config.learner
    spec = Spec(targets=learner.targets, head=learner.head)
    return sorted(
        {
            matrix.module_name.rpartition(".")[2]
            for matrix in matrices(model)
            if learner.start_from or spec.rank_of(matrix)  # an adapter from elsewhere may adapt any module
        }
    )


def _check_kernels(config: Config, base: str) -> None:
    """Raise RloraError if vLLM's LoRA kernels for GPUs do not support the config."""
    if config.learner.full_finetuning:
        return
    if config.dtype == "float32":
        raise RloraError(
            'dtype = "float32": on a GPU vLLM\'s LoRA kernels support 16-bit types only; set dtype = "bfloat16" '
            "(the adapter, its gradients and Adam's moments stay in fp32)"
        )
    if (config.learner.head or config.learner.start_from) and (size := vocabulary_size(base)) > _LARGEST_VOCABULARY:
        raise RloraError(
            f"learner.head: the model's vocabulary has {size:,} tokens. With learner.head = true, or with "
            "learner.start_from, vLLM adapts the output head, and its GPU kernels support a vocabulary of at most "
            f"{_LARGEST_VOCABULARY:,} tokens there; set learner.head = false, and unset learner.start_from"
        )


def _memory_share(config: Config, shape: PreTrainedModel, memory_plan: MemoryPlan) -> float:
    """Return the fraction of the GPU's memory that vLLM may take. Raises RloraError if that is too little."""
    settings, (free, total), name = config.engine, torch.cuda.mem_get_info(), describe_device()
    learners = memory_plan.learners.get(card_uuid(), cards.LearnerMemory())
    gpus, parts = 1.0 if settings.gpus == "auto" else settings.gpus, settings.tensor_parallel_size
    utilization = settings.gpu_memory_utilization
    budget = cards.budget_of_engine(free, total, gpus, learners, settings.eager, name, utilization)
    weights, kv_bytes = sum(map(bytes_of, shape.parameters())) // parts, kv_bytes_per_token(shape.config, parts)
    cards.check_fits(budget, weights, kv_bytes, config.max_model_len, name)
    return budget / total


def _attention_backends(llm: LLMEngine) -> set[str]:
    """Return the names of the attention backends of the model's layers."""
    names = llm.apply_model(_backend_names)
    return set().union(*names)


def _backend_names(model: Any) -> set[str]:
    layers = (getattr(module, "attn_backend", None) for module in model.modules())
    return {backend.get_name() for backend in layers if backend is not None}


def _largest_rank(adapter: Adapter) -> int:
    settings = json.loads(adapter.config)
    return int(max([settings["r"], *settings.get("rank_pattern", {}).values()]))


def _repack_head(model: Any) -> None:
    """Update the kernel's packed copy of a tied head: a reload skips a head that is tied to the embeddings."""
    for head in model.modules():
        if isinstance(head, ParallelLMHead):
            head.quant_method.process_weights_after_loading(head)


def kv_use(llm: LLMEngine) -> float:
    """Return the share of the KV cache that is in use, 0 to 1."""
    client: Any = llm.engine_core  # in this process
    return float(client.engine_core.scheduler.kv_cache_manager.usage)
