"""Engines that a test can make go wrong: what one holds is not the adapter it was given, or its process dies."""

import json
import os
import shutil
import signal
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from vllm.lora.request import LoRARequest

import rlora.engine.vllm_engine
from rlora.engine.vllm_engine import Engine
from rlora.records import Adapter, Canary, DeliveryError
from rlora.store import write_adapter


class FaultyEngine(Engine):
    """`fail(kind, checks)`: the next load goes wrong so; of the proof's parts only the named ones look at it."""

    def __init__(self, *made_of: Any) -> None:
        self.kind, self.checks = "", ("file", "slots", "canary")
        self.before: Adapter | None = None
        self.is_shy, self.judged = False, 0
        super().__init__(*made_of)

    def fail(self, kind: str, checks: tuple[str, ...]) -> Future[None]:
        def set_up() -> None:
            self.kind, self.checks = kind, checks

        return self._post(set_up)

    def be_shy(self, shy: bool) -> Future[int]:
        """From now on canaries are off while others are in flight, or not; returns how many were judged before."""

        def set_up() -> int:
            self.is_shy = shy
            return self.judged

        return self._post(set_up)

    def _judge(self, *of: Any) -> None:
        self.judged += 1
        if self.is_shy and self._running:
            raise DeliveryError("the canary is off in company")
        super()._judge(*of)

    def _load(self, adapter: Adapter, *others: Any) -> Any:
        differences, write = rlora.engine.slots.differences, rlora.engine.vllm_engine.write_adapter
        if "slots" not in self.checks:
            rlora.engine.slots.differences = lambda model, lora_id, adapter: []
        if self.kind and "file" in self.checks:  # what lies there is wrong
            rlora.engine.vllm_engine.write_adapter = lambda adapter, path: write(self._spoilt(adapter), path)
        try:
            proof = super()._load(adapter, *others)
        finally:
            rlora.engine.slots.differences, rlora.engine.vllm_engine.write_adapter = differences, write
            self.kind, self.checks = "", ("file", "slots", "canary")
        self.before = adapter
        return proof

    def _put(self, adapter: Adapter, path: Path) -> Any:
        if not self.kind or "file" in self.checks:
            return super()._put(adapter, path)
        if self.kind == "no load at all":
            return LoRARequest(adapter.name, next(self._engine_ids), str(path))
        # what lies there is right, but vLLM takes another
        spoilt = write_adapter(self._spoilt(adapter), path.with_name("spoilt"))
        shutil.move(path, path.with_name("right"))
        shutil.move(spoilt, path)
        request = super()._put(adapter, path)
        shutil.rmtree(path)
        shutil.move(path.with_name("right"), path)
        return request

    def _spoilt(self, adapter: Adapter) -> Adapter:
        config, tensors = json.loads(adapter.config), safetensors.torch.load(adapter.weights)
        names = sorted(tensors)
        up, down = (next(n for n in names if f"layers.{layer}." in n and "up_proj.lora_B" in n) for layer in (0, 1))
        if self.kind == "a flipped byte":  # the least that bf16 can tell
            bits = tensors[up].bfloat16().view(torch.int16)
            bits[0, 0] ^= 1
            tensors[up] = bits.view(torch.bfloat16).float()
        elif self.kind == "a missing module":
            del tensors[up], tensors[up.replace("lora_B", "lora_A")]
        elif self.kind == "two modules swapped":
            tensors[up], tensors[down] = tensors[down], tensors[up]
        elif self.kind == "another alpha":
            # A canary tells 1e-3 nats apart; 1% of two updates moves it by about as much
            config["lora_alpha"] *= 1.1 if self.checks == ("canary",) else 1.01
        elif self.kind == "the same version of another life":  # trained again from other episodes
            generator = torch.Generator().manual_seed(1)
            tensors = {n: t + 5e-4 * torch.randn(t.shape, generator=generator).sign() for n, t in tensors.items()}
        else:
            assert self.before is not None
            return self.before
        return Adapter(adapter.policy, adapter.number, json.dumps(config).encode(), safetensors.torch.save(tensors))


class MortalEngine(Engine):
    """`die(phase)`: kill -9, once it is in that phase."""

    def __init__(self, *made_of: Any) -> None:
        self.phase = ""
        self.canaries_in_flight: set[Future[Any]] = set()
        super().__init__(*made_of)

    def die(self, phase: str) -> Future[None]:
        def set_up() -> None:
            self.phase = phase
            assert phase != "idle" or not self._running
            self._in("idle")

        return self._post(set_up)

    def _put(self, adapter: Adapter, path: Path) -> Any:
        request = super()._put(adapter, path)
        self._in("loading")
        return request

    def _send_canary(self, canary: Canary, held: Any) -> Future[Any]:
        answer = super()._send_canary(canary, held)
        self.canaries_in_flight.add(answer)
        answer.add_done_callback(self.canaries_in_flight.discard)
        return answer

    def _step(self) -> None:
        if self.canaries_in_flight:
            self._in("canary")
        super()._step()
        if any(asked.output not in self.canaries_in_flight for asked in self._running.values()):
            self._in("sampling")

    def _in(self, phase: str) -> None:
        if phase == self.phase:
            os.kill(os.getpid(), signal.SIGKILL)
