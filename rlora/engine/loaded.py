"""The versions that an engine has loaded, and which of them can be unloaded."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlora.records import Adapter, Receipt, Version

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter that vLLM has loaded. A request leases it from its submission to its last token."""

    adapter: Adapter
    lora_request: "LoRARequest | None"  # None for full weights
    receipt: Receipt = field(init=False)
    leases: int = 0
    verdict: Future[None] | None = None  # of its canary; None until that is submitted

    @property
    def version(self) -> Version:
        return self.adapter.version


def unused(adapters: Sequence[LoadedAdapter], policy: str) -> list[LoadedAdapter]:
    """A policy's adapters without a lease, except for its newest version and the one that was requested last.

    `adapters` is in the order of the last request for each. If a number was trained again after a crash, the adapter
    that was requested last is the newest of that number.
    """
    candidates = [loaded for loaded in reversed(adapters) if loaded.version.policy == policy]
    newest = max(candidates, key=lambda loaded: loaded.version.number, default=None)
    return [loaded for loaded in candidates[1:] if loaded is not newest and not loaded.leases]


def next_to_unload(adapters: Sequence[LoadedAdapter], policy: str) -> LoadedAdapter | None:
    """The adapter to unload when a version of `policy` needs a slot; None if all are leased.

    The policy's own adapters come first; among equals, the one that was requested longest ago. Another policy's
    adapter is loaded again on demand.
    """
    idle = [loaded for loaded in adapters if not loaded.leases]
    return min(idle, key=lambda loaded: loaded.version.policy != policy, default=None)
