"""Makes vLLM's engine from the config, and has it read adapters."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import EngineArgs, LLMEngine
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.usage.usage_lib import UsageContext

from rlora import machine
from rlora.core.lora import Spec, matrices
from rlora.records import Adapter, DeliveryError, RloraError
from rlora.settings import Config


def build(config: Config, base: str, seed: int, slots: int, whole: bool, experts: bool) -> LLMEngine:
    """vLLM as the config asks for it, with `slots` adapters, or none where it serves `whole` weights."""
    settings, on_gpu = config.engine, machine.device().type == "cuda"
    ours = False  # the parts for vLLM's CPU build
    ranks_are_1 = config.learner.rank == 1 and not config.learner.start_from  # which may have a rank pattern
    options: dict[str, Any] = {}
    if not whole:
        options |= {
            "enable_lora": True,
            "max_lora_rank": 1 if ranks_are_1 else 8,  # vLLM's buckets: rank 1, and 2..8 in one of 8
            "lora_target_modules": adapted(base, config),  # else vLLM wraps the output head too (vllm#51594)
            "max_loras": slots,
            "max_cpu_loras": slots,
        }
        if experts:
            options["enable_mixed_moe_lora_format"] = True  # PEFT's: experts fused, as transformers has them
    if on_gpu:
        options["enforce_eager"] = settings.eager
        if settings.kv_cache_gib:
            options["kv_cache_memory_bytes"] = settings.kv_cache_gib << 30
    else:
        if experts:
            raise RloraError(
                f"model = {config.model!r}: vLLM's CPU build can't serve adapters over experts (its only backend "
                "for them has none), nor is it sure to reload their weights; use a dense model here, or a GPU"
            )
        from rlora.engine.cpu import patches

        ours = patches.install(config.learner.head or bool(config.learner.start_from))
        options["enforce_eager"] = True  # as vLLM does by itself with adapters; compiling takes minutes
        options["block_size"] = 32  # its smallest; with 128 the completions of a short prompt share nothing
    if settings.max_num_batched_tokens:
        options["max_num_batched_tokens"] = settings.max_num_batched_tokens
    if settings.tensor_parallel_size == 1:
        options["distributed_executor_backend"] = "uni"  # in this process; others spin beside the learner
    llm = LLMEngine.from_engine_args(
        EngineArgs(
            model=base,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=settings.sequences(on_gpu) + 1,  # the canary
            seed=seed,
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
            generation_config="vllm",  # the model's own sampling defaults stay out
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        ),
        # by which vLLM chooses how many tokens it computes at a time on a GPU
        usage_context=UsageContext.LLM_CLASS if on_gpu else UsageContext.ENGINE_CONTEXT,
    )
    if ours and not whole:
        llm.apply_model(patches.lay_out)
    return llm


def put(llm: LLMEngine, adapter: Adapter, path: Path, lora_id: int, experts: bool) -> LoRARequest | None:
    """Have vLLM read the adapter's files at `path`; returns how it is asked for, None where it is all weights.

    Raises RloraError where vLLM does not take them.
    """
    if adapter.whole:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        llm.apply_model(_pack_head)
        if not llm.reset_prefix_cache():  # its keys and values are of the weights before
            raise DeliveryError(f"version {adapter.name}: vLLM's prefix cache keeps what the weights before made")
        return None
    request = LoRARequest(adapter.name, lora_id, str(path), is_3d_lora_weight=experts)
    try:
        loaded = llm.add_lora(request)
    except ValueError as error:
        raise RloraError(f"adapter {adapter.name}: vLLM can't serve it: {error}") from error
    if not loaded:
        raise RloraError(f"adapter {adapter.name}: vLLM did not load it")
    if machine.device().type == "cpu":
        from rlora.engine.cpu import patches

        llm.apply_model(partial(patches.tell_rank, lora_id=lora_id, rank=_largest_rank(adapter)))
    return request


def adapted(base: str, config: Config) -> list[str]:
    """The names of the modules that an adapter of this config may be over, without those that hold them.

    Known from the base's config alone: a model without memory for its weights is asked, as the learner asks its own.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, trust_remote_code=False))
    learner = config.learner
    spec = Spec(targets=learner.targets, head=learner.head)
    return sorted(
        {
            matrix.place.rpartition(".")[2]
            for matrix in matrices(model)
            if learner.start_from or spec.rank_of(matrix)  # an adapter from elsewhere may be over any
        }
    )


def _largest_rank(adapter: Adapter) -> int:
    """Of the ranks that it has over its matrices."""
    settings = json.loads(adapter.config)
    return int(max([settings["r"], *settings.get("rank_pattern", {}).values()]))


def _pack_head(model: Any) -> None:
    """A head that is tied to the embeddings is left out of a reload; its copy in a kernel's own layout is of before."""
    for head in model.modules():
        if isinstance(head, ParallelLMHead):
            head.quant_method.process_weights_after_loading(head)
