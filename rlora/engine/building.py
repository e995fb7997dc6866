"""Makes vLLM's engine from the config, and has it read adapters."""

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

from rlora import cards, machine
from rlora.cards import MemoryPlan
from rlora.core.footprint import bytes_of
from rlora.core.lora import Spec, matrices
from rlora.model.base import kv_bytes_of_token, vocabulary_size, without_memory
from rlora.records import Adapter, DeliveryError, EngineInfo, RloraError
from rlora.settings import Config

_LARGEST_VOCABULARY = 258048  # that vLLM's LoRA takes over a head


def build(
    config: Config, base: str, seed: int, slots: int, whole: bool, experts: bool, beside: MemoryPlan
) -> LLMEngine:
    """vLLM as the config asks for it, with `slots` adapters, or none where it serves `whole` weights.

    On a GPU it takes what learners leave there, as `beside` says. Raises RloraError where that is too little.
    """
    settings, on_gpu = config.engine, machine.device().type == "cuda"
    ours = False  # the parts for vLLM's CPU build
    ranks_are_1 = config.learner.rank == 1 and not config.learner.start_from  # which may have a rank pattern
    options: dict[str, Any] = {}
    shape = without_memory(AutoConfig.from_pretrained(base, trust_remote_code=False), machine.DTYPES[config.dtype])
    if not whole:
        options |= {
            "enable_lora": True,
            "max_lora_rank": 1 if ranks_are_1 else 8,  # vLLM's buckets: rank 1, and 2..8 in one of 8
            "lora_target_modules": adapted(shape, config),  # else vLLM wraps the output head too (vllm#51594)
            "max_loras": slots,
            "max_cpu_loras": slots,
        }
        if experts:
            options["enable_mixed_moe_lora_format"] = True  # PEFT's: experts fused, as transformers has them
    if on_gpu:
        _check_shapes(config, base)
        options["enforce_eager"] = settings.eager
        options["gpu_memory_utilization"] = _share(config, shape, beside)
        if kv_cache := settings.kv_cache_gib * cards.GIB or beside.kv_cache:
            options["kv_cache_memory_bytes"] = kv_cache
    else:
        if experts:
            raise RloraError(
                f"model = {config.model!r}: vLLM's CPU build can't serve adapters over experts (its only backend "
                "for them has none), nor is it sure to reload their weights; use a dense model here, or a GPU"
            )
        if torch.version.cuda:
            raise RloraError(
                "vLLM: it is built for GPUs, and Ray gave this process none; see that Ray sees the cards, or install "
                "rlora with the extra cpu in an environment of its own"
            )
        from rlora.engine.cpu import patches

        options["gpu_memory_utilization"] = 0.5  # of RAM, which vLLM looks at before it starts
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


def seed_of(*identity: int) -> int:
    """A seed for vLLM; two replicas, or two starts of one, never sample alike."""
    return int.from_bytes(hashlib.sha256(repr(identity).encode()).digest()[:4])


def about(llm: LLMEngine, config: Config) -> EngineInfo:
    """What the engine runs on and with."""
    on_gpu = machine.device().type == "cuda"
    cache = llm.vllm_config.cache_config
    tokens = (cache.num_gpu_blocks or 0) * (cache.block_size or 0)
    kv_cache = tokens * kv_bytes_of_token(llm.model_config.hf_config, config.engine.tensor_parallel_size)
    graphs = "eager" if llm.model_config.enforce_eager else "CUDA graphs"
    words = (
        f"engine on {machine.describe_device()}: vLLM {vllm.__version__}, {config.dtype}, attention "
        f"{', '.join(sorted(_attentions(llm)))}, {graphs}, KV cache of {kv_cache / cards.GIB:.1f} GiB ({tokens:,} "
        f"tokens), {config.engine.sequences(on_gpu)} completions at a time"
    )
    return EngineInfo(words, kv_cache)


def put(llm: LLMEngine, adapter: Adapter, path: Path, lora_id: int, experts: bool) -> LoRARequest | None:
    """Have vLLM read the adapter's files at `path`; returns how it is asked for, None where it is all weights.

    Raises RloraError where vLLM does not take them.
    """
    if adapter.full_weights:
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


def adapted(model: PreTrainedModel, config: Config) -> list[str]:
    """The names of the modules of the base that an adapter of this config may be over, without those that hold them."""
    learner = config.learner
    spec = Spec(targets=learner.targets, head=learner.head)
    return sorted(
        {
            matrix.place.rpartition(".")[2]
            for matrix in matrices(model)
            if learner.start_from or spec.rank_of(matrix)  # an adapter from elsewhere may be over any
        }
    )


def _check_shapes(config: Config, base: str) -> None:
    """Raise RloraError for what vLLM's kernels for adapters on a GPU do not take."""
    if config.learner.full_finetuning:
        return
    if config.dtype == "float32":
        raise RloraError(
            'dtype = "float32": on a GPU vLLM\'s kernels for adapters take 16 bits alone; use bfloat16 (the adapter, '
            "its gradients and Adam are in fp32 all the same)"
        )
    if (config.learner.head or config.learner.start_from) and (size := vocabulary_size(base)) > _LARGEST_VOCABULARY:
        raise RloraError(
            f"learner.head: the model has a vocabulary of {size:,}, and vLLM adapts a head of up to "
            f"{_LARGEST_VOCABULARY:,} on a GPU; leave learner.head off"
        )


def _share(config: Config, shape: PreTrainedModel, beside: MemoryPlan) -> float:
    """The share of the card's memory that vLLM may take. Raises RloraError where it can't be enough."""
    settings, (free, total), name = config.engine, torch.cuda.mem_get_info(), machine.describe_device()
    held, parts = beside.learners.get(cards.uuid(), cards.LearnerMemory()), settings.tensor_parallel_size
    gpus = 1.0 if settings.gpus == "auto" else settings.gpus
    asked = settings.gpu_memory_utilization
    budget = cards.budget_of_engine(free, total, gpus, held, settings.eager, name, asked)
    weights, of_token = sum(map(bytes_of, shape.parameters())) // parts, kv_bytes_of_token(shape.config, parts)
    cards.check_fits(budget, weights, of_token, config.max_model_len, name)
    return budget / total


def _attentions(llm: LLMEngine) -> set[str]:
    """The names of vLLM's attention backends that the model's layers take."""
    named = llm.apply_model(_backends_of)
    return set().union(*named)


def _backends_of(model: Any) -> set[str]:
    layers = (getattr(module, "attn_backend", None) for module in model.modules())
    return {backend.get_name() for backend in layers if backend is not None}


def _largest_rank(adapter: Adapter) -> int:
    """Of the ranks that it has over its matrices."""
    settings = json.loads(adapter.config)
    return int(max([settings["r"], *settings.get("rank_pattern", {}).values()]))


def _pack_head(model: Any) -> None:
    """A head that is tied to the embeddings is left out of a reload; its copy in a kernel's own layout is of before."""
    for head in model.modules():
        if isinstance(head, ParallelLMHead):
            head.quant_method.process_weights_after_loading(head)
