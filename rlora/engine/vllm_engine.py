"""The rollout engine: vLLM, which samples under exact adapter versions. The only file that builds an engine of it."""

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

from rlora import cards, machine
from rlora.engine import slots
from rlora.engine.building import about, build, put, seed_of
from rlora.engine.canary import distance, judged
from rlora.engine.futures import errors_to, resolved
from rlora.engine.loaded import Loaded, in_the_way, unused
from rlora.engine.outputs import episode_of, prompt_logprobs
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
_ALONE = cards.MemoryPlan()
_COMPANY = 4  # canaries at a time, to see how far the base's own logprobs move


@dataclass(eq=False)
class _Asked:
    """A request in flight."""

    version: Version | None  # None for the base
    output: Future[RequestOutput] = field(default_factory=Future)


class Engine:
    """vLLM on a thread of its own, with its adapters in a directory of its own, in RAM where there is room.

    Each method posts to that thread and returns a future; what was posted is served between two steps of vLLM. So a
    version is loaded, and a request taken in, while others are in flight, and those go on under the version that they
    were submitted with. A version leaves when it is not the newest of its policy and no request has a lease on it.

    `base` is where the base is loaded from, `slots` how many versions fit at a time, and `beside` what learners hold of
    GPUs. No two engines draw the same samples: `number` counts all starts of engines in a job, and `version` is the
    number of the first version that is served. A completion ends with one of `stop_token_ids`, or of the strings
    `stop`. Start the process with `machine.engine_environment`.
    """

    def __init__(
        self, config: Config, base: str, stop_token_ids: Sequence[int], stop: Sequence[str], slots: int, number: int,
        version: int, beside: cards.MemoryPlan = _ALONE,
    ) -> None:  # fmt: skip
        self.config = config
        self.stop_token_ids, self.stop = list(stop_token_ids), list(stop)
        machine.check_ram_directory()  # of this node
        self.scratch = Scratch(os.getpid())
        self.full_weights, self.experts = config.learner.full_finetuning, has_experts(base)
        self.slots = 1 if self.full_weights else slots
        self.held: list[Loaded] = []  # in the order they were asked for
        self.noise: float | None = None  # of the base's canary, once it was asked
        self.canaries: dict[str, float] = {}  # by policy: nats from its last canary to the learner's, mean over tokens
        self.busy = 0.0  # seconds in vLLM's steps
        self._engine_ids = itertools.count(1)  # never reused: vLLM's prefix cache and slots go by name and id
        self._request_ids = itertools.count()
        self._running: dict[str, _Asked] = {}
        self._posted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: set[Future[Any]] = set()  # promised and not settled yet
        self._broken: EngineLostError | None = None
        made_of = (
            config,
            base,
            seed_of(config.seed, number, version),
            self.slots,
            self.full_weights,
            self.experts,
            beside,
        )
        built = self._post(lambda: build(*made_of))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self.llm: LLMEngine = built.result()

    def load(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> Future[Receipt]:
        """Serve `adapter.version` beside those that are served, and prove that it is.

        Requests for versions of its policy with numbers below `oldest`, other than `kept`, are given up. It waits where
        all slots are leased. The proof: the file that vLLM read has the adapter's digest, and the slot holds its very
        tensors. Third, the canary's logprobs have to be the learner's, as closely as the base's are: it is sampled with
        the version's first prompts, none of which gets out before. Raises DeliveryError where something else is served,
        RloraError where vLLM does not take it.
        """
        return self._post(lambda: self._load(adapter, oldest, kept))

    def generate(self, prompt: Prompt, sampling: Sampling, version: Version) -> Future[Group]:
        """Sample `sampling.group_size` completions under `version`; `records.BASE` is the base, without an adapter.

        Behaviour logprobs are natural logs of the sampled tokens' probability at the temperature used. Raises
        NotLoadedError for a version that is not here, DeliveryError where its canary is not as it should be, and
        StaleError where it is given up.
        """
        sampled: Future[Group] = self._promise()
        self._posted.put(lambda: self._generate(prompt, sampling, version, sampled))
        return sampled

    def stats(self) -> Future[EngineStats]:
        """Known at once, also in a step."""
        return resolved(EngineStats(self.busy, dict(self.canaries)))

    def about(self) -> Future[EngineInfo]:
        """What it runs on and with."""
        return self._post(lambda: about(self.llm, self.config))

    def leave(self, policy: str) -> Future[None]:
        """Give up the requests of `policy`, and serve none of its versions any more."""
        return self._post(lambda: self._leave(policy))

    def versions(self) -> Future[list[Version]]:
        """Those that are served, in the order in which they were asked for."""
        return self._post(lambda: [held.version for held in self.held])

    def loaded(self) -> Future[list[int]]:
        """The ids of the adapters that vLLM holds: one for each of `versions` where nothing was lost."""
        return self._post(lambda: sorted(self.llm.list_loras()))

    def close(self) -> Future[None]:
        """Remove the adapters' files, and end the thread after its step."""
        self._posted.put(None)
        self.scratch.close()
        return resolved(None)

    # --- what callers promise, and the thread that keeps it ---

    def _promise(self) -> Future[Any]:
        future: Future[Any] = Future()
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        if self._broken:
            future.set_exception(self._broken)
        return future

    def _post(self, job: Callable[[], _Result]) -> Future[_Result]:
        """Let the engine's thread do `job` between two steps."""
        future: Future[_Result] = self._promise()

        def run() -> None:
            with errors_to(future):
                future.set_result(job())

        self._posted.put(run)
        return future

    def _serve(self) -> None:
        while not self._broken:
            if self._running and self._posted.empty():
                with suppress(EngineLostError):
                    self._step()
            elif job := self._posted.get():
                job()
            else:
                return
        for future in list(self._open):
            if not future.done():
                future.set_exception(self._broken)

    def _step(self) -> None:
        """One step of vLLM: a token of each completion in flight. Raises EngineLostError, for good."""
        start = time.perf_counter()
        try:
            outputs = self.llm.step()
        except Exception as error:  # what state vLLM is in nobody knows
            self._broken = EngineLostError(f"vLLM failed in a step: {cards.error_text(error)}")
            raise self._broken from error
        self.busy += time.perf_counter() - start
        for output in outputs:
            assert isinstance(output, RequestOutput)
            asked = self._running.pop(output.request_id, None) if output.finished else None
            if asked:  # else it was given up
                asked.output.set_result(output)

    def _submit(self, tokens: Sequence[int], held: Loaded | None, **params: Any) -> Future[RequestOutput]:
        """Hand a prompt to vLLM; its output comes with a later step."""
        request_id = str(next(self._request_ids))
        settings = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **{"detokenize": False, **params})
        request, version = (held.request, held.version) if held else (None, None)
        self.llm.add_request(request_id, TokensPrompt(prompt_token_ids=list(tokens)), settings, lora_request=request)
        self._running[request_id] = asked = _Asked(version)
        return asked.output

    # --- sampling ---

    def _generate(self, prompt: Prompt, sampling: Sampling, version: Version, sampled: Future[Group]) -> None:
        with errors_to(sampled):
            held = self._serving(version)
            verdict = self._verdict(held) if held else resolved(None)
            output = self._submit(
                prompt.token_ids,
                held,
                n=sampling.group_size,
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                stop_token_ids=self.stop_token_ids,
                stop=self.stop,
                detokenize=bool(self.stop),  # to find them
                skip_special_tokens=False,  # one of them may be such
                logprobs=0,  # of the sampled token alone
            )

            def finish(output: Future[RequestOutput]) -> None:
                verdict.add_done_callback(partial(settle, output))
                if held:
                    self._release(held)

            def settle(output: Future[RequestOutput], verdict: Future[None]) -> None:
                with errors_to(sampled):
                    verdict.result()
                    episodes = tuple(episode_of(completion, version) for completion in output.result().outputs)
                    sampled.set_result(Group(prompt, episodes))

            if held:
                held.leases += 1
            output.add_done_callback(finish)

    def _verdict(self, held: Loaded) -> Future[None]:
        """Whether a version's canary came back right; it is sent along with the version's first prompt.

        It shares a step with the prompts: alone it would take as long as one for them all.
        """
        if held.verdict or not held.adapter.canary:
            return held.verdict or resolved(None)
        verdict: Future[None] = Future()
        held.verdict = verdict

        def judge(answer: Future[RequestOutput]) -> None:
            try:
                self._judge(held.adapter, prompt_logprobs(answer.result()))
            except DeliveryError:
                self._posted.put(partial(self._judge_alone, held, verdict))
                return
            except Exception as error:
                verdict.set_exception(error)
            else:
                verdict.set_result(None)
            self._release(held)

        held.leases += 1
        self._send_canary(held.adapter.canary, held).add_done_callback(judge)
        return verdict

    def _judge_alone(self, held: Loaded, verdict: Future[None]) -> None:
        """Ask a canary that failed once more when nothing else is in flight: in company roundings differ on a GPU."""
        with errors_to(verdict):
            while self._running:
                self._step()
            assert held.adapter.canary
            self._judge(held.adapter, self._ask(held.adapter.canary, held)[0])
            verdict.set_result(None)
        self._release(held)

    def _release(self, held: Loaded) -> None:
        held.leases -= 1
        self._retire(held.version.policy)

    def _serving(self, version: Version) -> Loaded | None:
        """The version as it is held here; None for the base."""
        if version.number == OFF:
            return None
        for held in self.held:
            if held.version == version:
                return held
        loaded = ", ".join(str(held.version) for held in self.held) or "none"
        raise NotLoadedError(f"version {version}: not loaded here (loaded: {loaded}); load it first")

    # --- delivery ---

    def _load(self, adapter: Adapter, oldest: int, kept: int | None) -> Receipt:
        policy = adapter.policy
        if adapter.number == OFF:
            return Receipt(adapter.digest, 0.0, 0.0)
        for held in self.held:
            if held.version == adapter.version:
                self.held.remove(held)
                self.held.append(held)
                self._retire(policy)
                return held.proof
        start = time.perf_counter()
        self._give_up(policy, oldest, kept)
        while len(self.held) >= self.slots:
            if idle := in_the_way(self.held, policy):
                self._drop(idle)
            else:
                self._step()
        canary = adapter.canary if self.noise is None else None  # the first is asked at once, after the base's own
        base = [*self._ask(canary, None), *self._ask(canary, None, _COMPANY)] if canary else []  # alone, and in company
        path = self.scratch.write(adapter, 1 if self.held else self.slots, write_adapter)
        held = Loaded(adapter, self._put(adapter, path))
        loaded = time.perf_counter()
        try:
            digest = self._compare(held, path)
            if canary:
                self.noise = max(distance(logprobs, canary.base_logprobs) for logprobs in base)
                self._judge(adapter, self._ask(canary, held)[0], base[0])
                held.verdict = resolved(None)
        except DeliveryError:
            self._drop(held)
            raise
        if self.full_weights:
            shutil.rmtree(path)
        held.proof = Receipt(digest, loaded - start, time.perf_counter() - loaded)
        self.held.append(held)
        self._retire(policy)
        return held.proof

    def _put(self, adapter: Adapter, path: Path) -> LoRARequest | None:
        return put(self.llm, adapter, path, next(self._engine_ids), self.experts)

    def _compare(self, held: Loaded, path: Path) -> str:
        """The digest of the file that vLLM has read. Raises DeliveryError where it or the slot is not the adapter's.

        Logprobs alone can't tell a version from the one before it in 16 bits: that is what the slots are read for.
        """
        adapter, found = held.adapter, []
        config, weights = ((path / name).read_bytes() for name in adapter.files)
        digest = replace(adapter, config=config, weights=weights).digest
        if digest != adapter.digest:
            found.append(f"the file that it read has the digest {digest[:12]}")
        if held.request:
            compare = partial(slots.differences, lora_id=held.request.lora_int_id, adapter=adapter)
            found += [line for lines in self.llm.apply_model(compare) for line in lines]
        if found:
            more = f", and {len(found) - 3} more" if len(found) > 3 else ""
            raise DeliveryError(f"adapter {adapter.name}: the engine does not serve it: {'; '.join(found[:3])}{more}")
        return digest

    def _judge(self, adapter: Adapter, logprobs: list[float], base: list[float] | None = None) -> None:
        """Raise DeliveryError where the canary's logprobs are not the learner's, or the base's where it is the base."""
        assert adapter.canary
        self.canaries[adapter.policy], error = judged(adapter.canary, logprobs, self.noise or 0.0, base)
        if error:
            raise DeliveryError(f"adapter {adapter.name}: the engine does not serve it: {error}")

    def _ask(self, canary: Canary, held: Loaded | None, times: int = 1) -> list[list[float]]:
        """What the canary gives, asked so often at once; whatever else is in flight goes on meanwhile."""
        answers = [self._send_canary(canary, held) for _ in range(times)]
        while not all(answer.done() for answer in answers):
            self._step()
        return [prompt_logprobs(answer.result()) for answer in answers]

    def _send_canary(self, canary: Canary, held: Loaded | None) -> Future[RequestOutput]:
        return self._submit(canary.token_ids, held, max_tokens=1, prompt_logprobs=0)

    def _give_up(self, policy: str, oldest: float, kept: int | None = None) -> None:
        """End the requests for versions of a policy with numbers below `oldest`, other than `kept`."""
        stale = {
            request_id: asked.version
            for request_id, asked in self._running.items()
            if asked.version and asked.version.policy == policy and asked.version.number < oldest
            if asked.version.number != kept
        }
        self.llm.abort_request(list(stale))
        why = "its policy has left" if oldest == math.inf else f"those of its policy are given up before {oldest}"
        for request_id, version in stale.items():
            self._running.pop(request_id).output.set_exception(StaleError(f"version {version}: {why}"))

    def _retire(self, policy: str) -> None:
        for held in unused(self.held, policy):
            self._drop(held)

    def _leave(self, policy: str) -> None:
        self._give_up(policy, math.inf)
        for held in [held for held in self.held if held.version.policy == policy]:
            self._drop(held)
        self.canaries.pop(policy, None)

    def _drop(self, held: Loaded) -> None:
        """Take a version out of vLLM, then its file."""
        if held in self.held:
            self.held.remove(held)
        if held.request:
            self.llm.remove_lora(held.request.lora_int_id)
            shutil.rmtree(held.request.lora_path, ignore_errors=True)
