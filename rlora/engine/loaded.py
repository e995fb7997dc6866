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
    """An adapter that vLLM has loaded, and its leases.

    A request holds a lease on the adapter from the request's submission to its last token, and so does the canary. An
    adapter with a lease is not unloaded.
    """

    adapter: Adapter
    lora_request: "LoRARequest | None"  # None for full weights
    receipt: Receipt = field(init=False)
    leases: int = 0
    verdict: Future[None] | None = None  # resolves when the canary has passed; None until the canary is submitted

    @property
    def version(self) -> Version:
        return self.adapter.version


def unused(adapters: Sequence[LoadedAdapter], policy: str) -> list[LoadedAdapter]:
    """Return the policy's adapters without a lease, except its newest version and the version that was requested last.

    `adapters` must be in the order of the last request for each. If a version number was trained again after a crash,
    the adapter of that number that was requested last counts as the newest.
    """
    candidates = [loaded for loaded in reversed(adapters) if loaded.version.policy == policy]
    newest = max(candidates, key=lambda loaded: loaded.version.number, default=None)
    return [loaded for loaded in candidates[1:] if loaded is not newest and not loaded.leases]


def next_to_unload(adapters: Sequence[LoadedAdapter], policy: str) -> LoadedAdapter | None:
    """Return the adapter to unload when a version of `policy` needs a slot, or None if all adapters are leased.

    The policy's own adapters come before those of other policies. Among them, the adapter whose last request is the
    oldest is returned; `adapters` must be in the order of the last request for each. An adapter of another policy is
    loaded again when a request names it.
    """
    idle = [loaded for loaded in adapters if not loaded.leases]
    return min(idle, key=lambda loaded: loaded.version.policy != policy, default=None)
