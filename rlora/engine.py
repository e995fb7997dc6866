"""The rollout engine: vLLM, which samples under an exact adapter version. The only file that imports vllm."""

import hashlib
import itertools
import os
import shutil
from collections.abc import Sequence
from typing import Any, cast

from vllm import CompletionOutput, EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.sampling_params import RequestOutputKind

from rlora import machine, thin_products
from rlora.base import has_experts
from rlora.checkpoint import write_adapter
from rlora.config import Config
from rlora.records import Adapter, Episode, Group, Prompt, RloraError, Sampling


class Engine:
    """vLLM in this process, with its adapters in a RAM-backed directory of its own.

    `base` is where the base is loaded from; `version` the first one it will serve, so that a resumed run does
    not draw the samples of its beginning again. Start the process with `machine.engine_environment`.
    """

    def __init__(self, config: Config, base: str, stop_token_ids: tuple[int, ...], replica: int, version: int) -> None:
        settings = config.engine
        self.stop_token_ids = list(stop_token_ids)
        self.directory = machine.adapter_directory(os.getpid())
        self.requests: dict[int, LoRARequest | None] = {}  # by version; None where it is all weights
        self.serving = ""  # the name of the version that is all weights
        self._engine_ids = itertools.count(1)  # never reused: vLLM's prefix cache and slots go by name and id
        self._request_ids = itertools.count()
        self.whole = config.learner.adapter == "none"
        self.experts = has_experts(base)
        ranks_are_1 = config.learner.rank == 1 and not config.learner.start_from  # which may have a rank pattern
        options: dict[str, Any] = {}
        if not self.whole:
            options |= {
                "enable_lora": True,
                "max_lora_rank": 1 if ranks_are_1 else 8,  # vLLM's buckets: rank 1, and 2..8 in one of 8
                "enable_mixed_moe_lora_format": self.experts,  # PEFT's: experts fused, as transformers has them
                "max_loras": config.max_staleness + 2,  # those that may be asked for, and the next one as it comes
            }
        if machine.device().type == "cpu":
            if self.experts:
                raise RloraError(
                    f"model = {config.model!r}: vLLM's CPU build can't serve adapters over experts (its only backend "
                    "for them has none), nor is it sure to reload their weights; use a dense model here, or a GPU"
                )
            thin_products.install()
            options["enforce_eager"] = True  # as vLLM does by itself with adapters; compiling takes minutes
            options["block_size"] = 32  # its smallest; with 128 the completions of a short prompt share nothing
        if settings.tensor_parallel_size == 1:
            options["distributed_executor_backend"] = "uni"  # in this process; others spin beside the learner
        self.llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=base,
                dtype=config.dtype,
                max_model_len=config.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                seed=seed_of(config.seed, replica, version),
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
                generation_config="vllm",  # the model's own sampling defaults stay out
                tensor_parallel_size=settings.tensor_parallel_size,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **options,
            )
        )

    def load(self, adapter: Adapter) -> None:
        """Make `adapter.version` servable. Raises RloraError where vLLM does not take it."""
        if self.whole:
            if self.serving != adapter.name:
                self._reload(adapter)
            return
        held = self.requests.get(adapter.version)
        if held and held.lora_name == adapter.name:
            return
        path = write_adapter(adapter, self.directory / adapter.name)
        request = LoRARequest(adapter.name, next(self._engine_ids), str(path), is_3d_lora_weight=self.experts)
        try:
            loaded = self.llm.add_lora(request)
        except ValueError as error:
            raise RloraError(f"adapter {adapter.name}: vLLM can't serve it: {error}") from error
        if not loaded:
            raise RloraError(f"adapter {adapter.name}: vLLM did not load it")
        if held:
            self.retire(adapter.version)  # the same version of an earlier life
        self.requests[adapter.version] = request

    def _reload(self, adapter: Adapter) -> None:
        """Put a version that is all weights in the place of the one before it. No request may be in flight."""
        path = write_adapter(adapter, self.directory / adapter.name)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        self.llm.apply_model(_pack_head)
        self.llm.reset_prefix_cache()  # its keys and values are of the weights before
        shutil.rmtree(path)
        self.requests, self.serving = {adapter.version: None}, adapter.name

    def retire(self, version: int) -> None:
        """Forget a version and its file. No request may still use it."""
        if request := self.requests.pop(version):
            self.llm.remove_lora(request.lora_int_id)
            shutil.rmtree(request.lora_path)

    def versions(self) -> list[int]:
        return sorted(self.requests)

    def loaded(self) -> list[int]:
        """The ids of the adapters that vLLM holds, which are those of `versions` where nothing was lost."""
        return sorted(self.llm.list_loras())

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> list[Group]:
        """Sample `sampling.group_size` completions of each prompt under `version`; groups in the prompts' order.

        Behaviour logprobs are natural logs of the sampled tokens' probability at the temperature used. Raises
        RloraError for a version that is not loaded.
        """
        if version not in self.requests:
            raise RloraError(f"version = {version}: not loaded here (loaded: {self.versions()}); load it first")
        params = SamplingParams(
            n=sampling.group_size,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self.stop_token_ids,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        ids = [str(next(self._request_ids)) for _ in prompts]
        for request_id, prompt in zip(ids, prompts, strict=True):
            tokens = TokensPrompt(prompt_token_ids=list(prompt.token_ids))
            self.llm.add_request(request_id, tokens, params, lora_request=self.requests[version])
        finished: dict[str, RequestOutput] = {}
        while self.llm.has_unfinished_requests():
            finished |= {
                out.request_id: out for out in self.llm.step() if isinstance(out, RequestOutput) and out.finished
            }
        return [
            Group(prompt, tuple(_episode(completion, version) for completion in finished[request_id].outputs))
            for request_id, prompt in zip(ids, prompts, strict=True)
        ]

    def close(self) -> None:
        """Remove the adapters' files."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _pack_head(model: Any) -> None:
    """A head that is tied to the embeddings is left out of a reload; its copy in a kernel's own layout is of before."""
    for head in model.modules():
        if isinstance(head, ParallelLMHead):
            head.quant_method.process_weights_after_loading(head)


def _episode(completion: CompletionOutput, version: int) -> Episode:
    entries = cast(list[dict[int, Logprob]], completion.logprobs)
    logprobs = tuple(entry[token].logprob for token, entry in zip(completion.token_ids, entries, strict=True))
    return Episode(tuple(completion.token_ids), logprobs, str(completion.finish_reason), version)


def seed_of(*identity: int) -> int:
    """A seed for vLLM; two replicas, or two starts of one, never sample alike."""
    return int.from_bytes(hashlib.sha256(repr(identity).encode()).digest()[:4])
