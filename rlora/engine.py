"""The rollout engine: vLLM, which samples under an exact adapter version. The only file that imports vllm."""

import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from rlora import machine
from rlora.checkpoint import write_adapter
from rlora.records import Adapter, Episode, Group, Prompt, RloraError, Sampling


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is built; `config.py` says what each means."""

    model: str  # a local directory or a hub id
    dtype: str
    max_model_len: int
    stop_token_ids: tuple[int, ...]
    rank: int
    seed: int
    max_num_seqs: int
    max_versions: int = 2  # adapter versions that can be served at a time
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.5
    extra: dict[str, object] = field(default_factory=dict)


class Engine:
    """vLLM in this process, with its adapters in a RAM-backed directory of its own.

    Start the process with `machine.engine_environment`.
    """

    def __init__(self, settings: EngineSettings) -> None:
        on_cpu = machine.device().type == "cpu"
        self.settings = settings
        self.directory = machine.ram_directory() / f"rlora-{os.getpid()}"
        self.requests: dict[int, LoRARequest] = {}  # by version
        self._engine_ids = itertools.count(1)  # never reused: vLLM's prefix cache and slots go by name and id
        self._request_ids = itertools.count()
        self.llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings.model,
                dtype=settings.dtype,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                seed=settings.seed,
                enable_lora=True,
                # vLLM has a bucket for rank 1 and one for 2..8
                max_lora_rank=1 if settings.rank == 1 else 8,
                max_loras=settings.max_versions,
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
                generation_config="vllm",  # the model's own sampling defaults are not ours
                tensor_parallel_size=settings.tensor_parallel_size,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                # On CPU: 32 is the smallest block, so that short prompts are shared within their group
                **({"block_size": 32} if on_cpu else {}),
                **({"distributed_executor_backend": "uni"} if settings.tensor_parallel_size == 1 else {}),
            )
        )

    def load(self, adapter: Adapter) -> None:
        """Make `adapter.version` servable. Raises RloraError where vLLM does not take it."""
        path = write_adapter(adapter, self.directory / adapter.name)
        request = LoRARequest(adapter.name, next(self._engine_ids), str(path))
        if not self.llm.add_lora(request):
            raise RloraError(f"adapter {adapter.name}: vLLM did not load it")
        self.requests[adapter.version] = request

    def retire(self, version: int) -> None:
        """Forget a version and its file. No request may still use it."""
        request = self.requests.pop(version)
        self.llm.remove_lora(request.lora_int_id)
        shutil.rmtree(request.lora_path)

    def versions(self) -> list[int]:
        return sorted(self.requests)

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
            stop_token_ids=list(self.settings.stop_token_ids),
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        ids = [str(next(self._request_ids)) for _ in prompts]
        for request_id, prompt in zip(ids, prompts, strict=True):
            tokens = {"prompt_token_ids": list(prompt.token_ids)}
            self.llm.add_request(request_id, tokens, params, lora_request=self.requests[version])
        finished: dict[str, RequestOutput] = {}
        while self.llm.has_unfinished_requests():
            finished |= {output.request_id: output for output in self.llm.step() if output.finished}
        return [
            Group(prompt, tuple(_episode(completion, version) for completion in finished[request_id].outputs))
            for request_id, prompt in zip(ids, prompts, strict=True)
        ]

    def close(self) -> None:
        """Remove the adapters' files."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _episode(completion, version: int) -> Episode:
    logprobs = (
        entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    return Episode(tuple(completion.token_ids), tuple(logprobs), completion.finish_reason, version)
