"""The rollout engine: samples with vLLM under exact adapter versions."""

import itertools
import math
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vllm import LLMEngine, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from rlora import cards, device, machine
from rlora.engine import slots
from rlora.engine.building import build, engine_info, kv_use, load_adapter, sampling_seed
from rlora.engine.canary import compare_canary, distance
from rlora.engine.futures import errors_to, resolved
from rlora.engine.loaded import LoadedAdapter, next_to_unload, unused
from rlora.engine.outputs import params_of, prompt_logprobs, to_episode, with_top_k
from rlora.engine.scratch import Scratch
from rlora.model.base import has_experts
from rlora.records import (
    OFF,
    Adapter,
    Canary,
    DeliveryError,
    EngineInfo,
    EngineLostError,
    EngineStats,
    Group,
    NotLoadedError,
    Prompt,
    Receipt,
    Sampling,
    StaleError,
    Version,
)
from rlora.settings import Config
from rlora.store import write_adapter

_Result = TypeVar("_Result")
_NO_LEARNERS = cards.MemoryPlan()
_CANARY_BATCH = 4  # canaries submitted together to measure how batching changes the base's logprobs


@dataclass(eq=False)
class _Request:
    """A request in flight."""

    version: Version | None  # None for the base
    output: Future[RequestOutput] = field(default_factory=Future)


class Engine:
    """vLLM on a thread of this process. The files of its adapters are in RAM if there is room.

    The constructor blocks until vLLM is ready. Each method posts a job to the thread and returns a future immediately.
    Jobs run between two steps of vLLM, while requests are in flight. A request continues under the version that it was
    submitted with. A version is unloaded when its policy has a newer one and no request leases it (`loaded.unused`).

    `base` is the path of the base model, `slots` the number of versions that fit at a time, `memory_plan` the memory
    that learners use on each GPU. `config.seed`, `number` (the count of engine starts in the job) and `version` (the
    number of the first version to serve) seed sampling, so that engine starts sample differently. The process
    needs the variables of `machine.engine_environment`.
    """

    def __init__(
        self, config: Config, base: str, slots: int, number: int, version: int,
        memory_plan: cards.MemoryPlan = _NO_LEARNERS,
    ) -> None:  # fmt: skip
        self.config = config
        machine.check_ram_directory()  # of this node
        self.scratch = Scratch(os.getpid())
        self.full_weights, self.experts = config.learner.full_finetuning, has_experts(base)
        self.slots = 1 if self.full_weights else slots
        self.adapters: list[LoadedAdapter] = []  # in the order of the last request for each
        self.noise: float | None = None  # distance of the base's canary from the learner's; None until it was measured
        self.canary_distances: dict[str, float] = {}  # by policy: its last canary from the learner's, nats per token
        self.busy_seconds = self.kv_seconds = 0.0  # in vLLM's steps; the share of the KV cache in use, integrated
        self._engine_ids = itertools.count(1)  # LoRA ids, never reused: vLLM's prefix cache and slots are keyed by them
        self._request_ids = itertools.count()
        self._running: dict[str, _Request] = {}
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pending: set[Future[Any]] = set()  # returned to callers, without a result yet
        self._failure: EngineLostError | None = None
        seed = sampling_seed(config.seed, number, version)
        arguments = config, base, seed, self.slots, self.full_weights, self.experts, memory_plan
        building = self._post(lambda: build(*arguments))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.llm: LLMEngine = building.result()

    def load(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> Future[Receipt]:
        """Load and verify `adapter.version`, beside the versions that are already loaded. Returns a future immediately.

        If requests lease all slots (see `LoadedAdapter`), the thread first steps until a slot is free. Requests for the
        policy's versions below `oldest`, except `kept`, are aborted. The future raises DeliveryError if the files that
        vLLM read, the tensors in the slot, or the canary's logprobs (`canary.py`) are not the adapter's, RloraError if
        the files find no room or vLLM rejects them, EngineLostError if vLLM fails. For the engine's first version the
        canary runs in this call. For others it runs with the first request: if it fails, `generate` raises the error.
        """
        return self._post(lambda: self._load(adapter, oldest, kept))

    def generate(self, prompt: Prompt, sampling: Sampling, version: Version) -> Future[Group]:
        """Sample `sampling.group_size` unscored episodes under `version`; `records.BASE.version` has no adapter.

        Behaviour logprobs are in nats, at the sampling temperature. The future raises NotLoadedError if the version is
        not loaded, DeliveryError if the version's canary fails, StaleError if the request is aborted.
        """
        group: Future[Group] = self._new_future()
        self._jobs.put(lambda: self._generate(prompt, sampling, version, group))
        return group

    def stats(self) -> Future[EngineStats]:
        """Return the metrics so far, in a resolved future, also during a step."""
        return resolved(EngineStats(self.busy_seconds, dict(self.canary_distances), self.kv_seconds))

    def about(self) -> Future[EngineInfo]:
        """Describe the device and the settings that vLLM runs with."""
        return self._post(lambda: engine_info(self.llm, self.config))

    def leave(self, policy: str) -> Future[None]:
        """Abort the requests of `policy` (StaleError), and unload the policy's versions."""
        return self._post(lambda: self._leave(policy))

    def versions(self) -> Future[list[Version]]:
        """Return the loaded versions, in the order of the last request for each."""
        return self._post(lambda: [loaded.version for loaded in self.adapters])

    def lora_ids(self) -> Future[list[int]]:
        """Return the ids of the adapters that vLLM itself lists: one for each of `versions`."""
        return self._post(lambda: sorted(self.llm.list_loras()))

    def close(self) -> Future[None]:
        """Remove the adapters' files, and end the thread after its current step. Pending futures stay pending."""
        self._jobs.put(None)
        self.scratch.close()
        return resolved(None)

    # --- the engine's thread, and the futures that it resolves ---

    def _new_future(self) -> Future[Any]:
        future: Future[Any] = Future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        if self._failure:
            future.set_exception(self._failure)
        return future

    def _post(self, job: Callable[[], _Result]) -> Future[_Result]:
        """Queue `job`, to run on the engine's thread between two steps, and return a future of its result."""
        future: Future[_Result] = self._new_future()

        def run() -> None:
            with errors_to(future):
                future.set_result(job())

        self._jobs.put(run)
        return future

    def _run(self) -> None:
        while not self._failure:
            if self._running and self._jobs.empty():
                with suppress(EngineLostError):
                    self._step()
            elif job := self._jobs.get():
                job()
            else:
                return
        for future in list(self._pending):
            if not future.done():
                future.set_exception(self._failure)

    def _step(self) -> None:
        """Run one step of vLLM: one token per completion in flight. Raises EngineLostError; then the thread ends."""
        start, used = time.perf_counter(), kv_use(self.llm)
        try:
            outputs = self.llm.step()
        except Exception as error:  # vLLM's state is undefined now
            self._failure = EngineLostError(f"vLLM failed in a step: {device.error_text(error)}")
            raise self._failure from error
        self.busy_seconds += (elapsed := time.perf_counter() - start)
        self.kv_seconds += elapsed * used
        for output in outputs:
            assert isinstance(output, RequestOutput)
            if output.finished and (request := self._running.pop(output.request_id, None)):  # else it was aborted
                request.output.set_result(output)

    def _submit(self, tokens: Sequence[int], loaded: LoadedAdapter | None, **params: Any) -> Future[RequestOutput]:
        """Submit a prompt to vLLM, without an adapter if `loaded` is None. A later step resolves the future."""
        request_id = str(next(self._request_ids))
        params = with_top_k(params) if self.llm.model_config.return_sampling_mask else params
        settings = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **{"detokenize": False, **params})
        lora, version = (loaded.lora_request, loaded.version) if loaded else (None, None)
        self.llm.add_request(request_id, TokensPrompt(prompt_token_ids=list(tokens)), settings, lora_request=lora)
        self._running[request_id] = request = _Request(version)
        return request.output

    # --- sampling ---

    def _generate(self, prompt: Prompt, sampling: Sampling, version: Version, group: Future[Group]) -> None:
        with errors_to(group):
            loaded = self._find(version)
            verdict = self._canary_verdict(loaded) if loaded else resolved(None)
            output = self._submit(
                prompt.token_ids,
                loaded,
                **params_of(sampling),
                logprobs=0,  # of the sampled token only
            )

            def finish(output: Future[RequestOutput]) -> None:
                verdict.add_done_callback(partial(settle, output))
                if loaded:
                    self._release(loaded)

            def settle(output: Future[RequestOutput], verdict: Future[None]) -> None:
                with errors_to(group):
                    verdict.result()
                    episodes = tuple(
                        to_episode(completion, version, sampling) for completion in output.result().outputs
                    )
                    group.set_result(Group(prompt, episodes))

            if loaded:
                loaded.leases += 1
            output.add_done_callback(finish)

    def _canary_verdict(self, loaded: LoadedAdapter) -> Future[None]:
        """Return a future that resolves once a version's canary has passed. The first call submits the canary.

        The canary shares a step with the version's first prompt: alone it would take as long as a step of all requests.
        """
        if loaded.verdict or not loaded.adapter.canary:
            return loaded.verdict or resolved(None)
        verdict: Future[None] = Future()
        loaded.verdict = verdict

        def check(output: Future[RequestOutput]) -> None:
            try:
                self._check_canary(loaded.adapter, prompt_logprobs(output.result()))
            except DeliveryError:
                self._jobs.put(partial(self._check_canary_alone, loaded, verdict))
                return
            except Exception as error:
                verdict.set_exception(error)
            else:
                verdict.set_result(None)
            self._release(loaded)

        loaded.leases += 1
        self._submit_canary(loaded.adapter.canary, loaded).add_done_callback(check)
        return verdict

    def _check_canary_alone(self, loaded: LoadedAdapter, verdict: Future[None]) -> None:
        """Repeat a failed canary while nothing else is in flight: on a GPU rounding depends on the batch."""
        with errors_to(verdict):
            while self._running:
                self._step()
            assert loaded.adapter.canary
            self._check_canary(loaded.adapter, self._run_canary(loaded.adapter.canary, loaded)[0])
            verdict.set_result(None)
        self._release(loaded)

    def _release(self, loaded: LoadedAdapter) -> None:
        loaded.leases -= 1
        self._retire(loaded.version.policy)

    def _find(self, version: Version) -> LoadedAdapter | None:
        """Return the loaded adapter of a version, or None for the base."""
        if version.number == OFF:
            return None
        for loaded in self.adapters:
            if loaded.version == version:
                return loaded
        names = ", ".join(str(loaded.version) for loaded in self.adapters) or "none"
        raise NotLoadedError(f"version {version}: not loaded in this engine (loaded: {names}); call `load` first")

    # --- delivery ---

    def _load(self, adapter: Adapter, oldest: int, kept: int | None) -> Receipt:
        policy = adapter.policy
        if adapter.number == OFF:
            return Receipt(adapter.digest, 0.0, 0.0)
        for loaded in self.adapters:
            if loaded.version == adapter.version:
                self.adapters.remove(loaded)
                self.adapters.append(loaded)
                self._retire(policy)
                return loaded.receipt
        start = time.perf_counter()
        self._abort(policy, oldest, kept)
        while len(self.adapters) >= self.slots:
            if idle := next_to_unload(self.adapters, policy):
                self._unload(idle)
            else:
                self._step()
        canary = adapter.canary if self.noise is None else None  # the engine's first: it runs now, after the base's
        base = [*self._run_canary(canary, None), *self._run_canary(canary, None, _CANARY_BATCH)] if canary else []
        path = self.scratch.write(adapter, 1 if self.adapters else self.slots, write_adapter)
        loaded = LoadedAdapter(adapter, self._load_adapter(adapter, path))
        end = time.perf_counter()
        try:
            digest = self._check_file_and_slot(loaded, path)
            if canary:
                self.noise = max(distance(logprobs, canary.base_logprobs) for logprobs in base)
                self._check_canary(adapter, self._run_canary(canary, loaded)[0], base[0])
                loaded.verdict = resolved(None)
        except DeliveryError:
            self._unload(loaded)
            raise
        if self.full_weights:
            shutil.rmtree(path)
        loaded.receipt = Receipt(digest, end - start, time.perf_counter() - end)
        self.adapters.append(loaded)
        self._retire(policy)
        return loaded.receipt

    def _load_adapter(self, adapter: Adapter, path: Path) -> LoRARequest | None:
        return load_adapter(self.llm, adapter, path, next(self._engine_ids), self.experts)

    def _check_file_and_slot(self, loaded: LoadedAdapter, path: Path) -> str:
        """Return the digest of the files that vLLM read. Raises DeliveryError if files or slot are not the adapter's.

        The slot has to be read because in 16 bits logprobs can't tell a version from the previous one.
        """
        adapter, errors = loaded.adapter, []
        config, weights = ((path / name).read_bytes() for name in adapter.files)
        digest = replace(adapter, config=config, weights=weights).digest
        if digest != adapter.digest:
            errors.append(f"the digest of the files that vLLM read is {digest[:12]}")
        if loaded.lora_request:
            compare = partial(slots.differences, lora_id=loaded.lora_request.lora_int_id, adapter=adapter)
            errors += [line for lines in self.llm.apply_model(compare) for line in lines]
        if errors:
            more = f", and {len(errors) - 3} more" if len(errors) > 3 else ""
            raise DeliveryError(f"adapter {adapter.name}: the engine does not serve it: {'; '.join(errors[:3])}{more}")
        return digest

    def _check_canary(self, adapter: Adapter, logprobs: list[float], base: list[float] | None = None) -> None:
        """Raise DeliveryError if a canary's logprobs are not the learner's, or not `base` for a version equal to it."""
        assert adapter.canary
        self.canary_distances[adapter.policy], error = compare_canary(adapter.canary, logprobs, self.noise or 0.0, base)
        if error:
            raise DeliveryError(f"adapter {adapter.name}: the engine does not serve it: {error}")

    def _run_canary(self, canary: Canary, loaded: LoadedAdapter | None, count: int = 1) -> list[list[float]]:
        """Return the logprobs of `count` canaries, submitted together. Blocks; other requests in flight continue."""
        outputs = [self._submit_canary(canary, loaded) for _ in range(count)]
        while not all(output.done() for output in outputs):
            self._step()
        return [prompt_logprobs(output.result()) for output in outputs]

    def _submit_canary(self, canary: Canary, loaded: LoadedAdapter | None) -> Future[RequestOutput]:
        return self._submit(canary.token_ids, loaded, max_tokens=1, prompt_logprobs=0)

    def _abort(self, policy: str, oldest: float, kept: int | None = None) -> None:
        """End the requests for versions of a policy with numbers below `oldest`, except `kept`."""
        stale = {
            request_id: request.version
            for request_id, request in self._running.items()
            if request.version and request.version.policy == policy and request.version.number < oldest
            if request.version.number != kept
        }
        self.llm.abort_request(list(stale))
        reason = f"policy {policy} has left" if oldest == math.inf else f"versions below {oldest} are too old"
        for request_id, version in stale.items():
            self._running.pop(request_id).output.set_exception(StaleError(f"version {version}: aborted, {reason}"))

    def _retire(self, policy: str) -> None:
        for loaded in unused(self.adapters, policy):
            self._unload(loaded)

    def _leave(self, policy: str) -> None:
        self._abort(policy, math.inf)
        for loaded in [loaded for loaded in self.adapters if loaded.version.policy == policy]:
            self._unload(loaded)
        self.canary_distances.pop(policy, None)

    def _unload(self, loaded: LoadedAdapter) -> None:
        """Remove a version from vLLM, then delete its files."""
        if loaded in self.adapters:
            self.adapters.remove(loaded)
        if loaded.lora_request:
            self.llm.remove_lora(loaded.lora_request.lora_int_id)
            shutil.rmtree(loaded.lora_request.lora_path, ignore_errors=True)
