"""Engines that fail on request: one serves something other than the adapter it was sent, one kills its own process."""

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
    """`fail(kind, checks)` corrupts the next load in that way; only the named checks run on it."""

    def __init__(self, *arguments: Any) -> None:
        self.kind, self.checks = "", ("file", "slots", "canary")
        self.previous: Adapter | None = None
        self.fails_in_batch, self.canaries_checked = False, 0
        super().__init__(*arguments)

    def fail(self, kind: str, checks: tuple[str, ...]) -> Future[None]:
        def set_up() -> None:
            self.kind, self.checks = kind, checks

        return self._post(set_up)

    def fail_canaries_in_batch(self, fails: bool) -> Future[int]:
        """Let canaries fail, or no longer, while other requests are in flight. Returns how many were checked so far."""

        def set_up() -> int:
            self.fails_in_batch = fails
            return self.canaries_checked

        return self._post(set_up)

    def _check_canary(self, *arguments: Any) -> None:
        self.canaries_checked += 1
        if self.fails_in_batch and self._running:
            raise DeliveryError("the canary differs in a batch")
        super()._check_canary(*arguments)

    def _load(self, adapter: Adapter, *arguments: Any) -> Any:
        differences, write = rlora.engine.slots.differences, rlora.engine.vllm_engine.write_adapter
        if "slots" not in self.checks:
            rlora.engine.slots.differences = lambda model, lora_id, adapter: []
        if self.kind and "file" in self.checks:  # the file is wrong
            rlora.engine.vllm_engine.write_adapter = lambda adapter, path: write(self._corrupted(adapter), path)
        try:
            receipt = super()._load(adapter, *arguments)
        finally:
            rlora.engine.slots.differences, rlora.engine.vllm_engine.write_adapter = differences, write
            self.kind, self.checks = "", ("file", "slots", "canary")
        self.previous = adapter
        return receipt

    def _load_adapter(self, adapter: Adapter, path: Path) -> Any:
        if not self.kind or "file" in self.checks:
            return super()._load_adapter(adapter, path)
        if self.kind == "no load at all":
            return LoRARequest(adapter.name, next(self._engine_ids), str(path))
        # the file is right, but vLLM reads a different one
        corrupted = write_adapter(self._corrupted(adapter), path.with_name("corrupted"))
        shutil.move(path, path.with_name("right"))
        shutil.move(corrupted, path)
        request = super()._load_adapter(adapter, path)
        shutil.rmtree(path)
        shutil.move(path.with_name("right"), path)
        return request

    def _corrupted(self, adapter: Adapter) -> Adapter:
        config, tensors = json.loads(adapter.config), safetensors.torch.load(adapter.weights)
        names = sorted(tensors)
        up, down = (next(n for n in names if f"layers.{layer}." in n and "up_proj.lora_B" in n) for layer in (0, 1))
        if self.kind == "a flipped byte":  # the smallest change in bf16
            bits = tensors[up].bfloat16().view(torch.int16)
            bits[0, 0] ^= 1
            tensors[up] = bits.view(torch.bfloat16).float()
        elif self.kind == "a missing module":
            del tensors[up], tensors[up.replace("lora_B", "lora_A")]
        elif self.kind == "two modules swapped":
            tensors[up], tensors[down] = tensors[down], tensors[up]
        elif self.kind == "a different alpha":
            # A canary detects 1e-3 nats; 1% of two updates moves it by about as much
            config["lora_alpha"] *= 1.1 if self.checks == ("canary",) else 1.01
        elif self.kind == "the same number trained again":  # from other episodes
            generator = torch.Generator().manual_seed(1)
            tensors = {n: t + 5e-4 * torch.randn(t.shape, generator=generator).sign() for n, t in tensors.items()}
        else:
            assert self.previous is not None
            return self.previous
        return Adapter(adapter.policy, adapter.number, json.dumps(config).encode(), safetensors.torch.save(tensors))


class MortalEngine(Engine):
    """`die(phase)` kills the process with SIGKILL once it is in that phase."""

    def __init__(self, *arguments: Any) -> None:
        self.phase = ""
        self.canaries_in_flight: set[Future[Any]] = set()
        super().__init__(*arguments)

    def die(self, phase: str) -> Future[None]:
        def set_up() -> None:
            self.phase = phase
            assert phase != "idle" or not self._running
            self._enter("idle")

        return self._post(set_up)

    def _load_adapter(self, adapter: Adapter, path: Path) -> Any:
        request = super()._load_adapter(adapter, path)
        self._enter("loading")
        return request

    def _submit_canary(self, canary: Canary, loaded: Any) -> Future[Any]:
        output = super()._submit_canary(canary, loaded)
        self.canaries_in_flight.add(output)
        output.add_done_callback(self.canaries_in_flight.discard)
        return output

    def _step(self) -> None:
        if self.canaries_in_flight:
            self._enter("canary")
        super()._step()
        if any(request.output not in self.canaries_in_flight for request in self._running.values()):
            self._enter("sampling")

    def _enter(self, phase: str) -> None:
        if phase == self.phase:
            os.kill(os.getpid(), signal.SIGKILL)
