"""The versions that an engine holds, and which of them may go."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlora.records import Adapter, Receipt, Version

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


@dataclass(eq=False)
class Loaded:
    """A version that vLLM holds. Each request has a lease on it, from its submission to its last token."""

    adapter: Adapter
    request: "LoRARequest | None"  # None where it is all weights
    proof: Receipt = field(init=False)
    leases: int = 0
    verdict: Future[None] | None = None  # of its canary, once that is sent; nothing it sampled is given out before

    @property
    def version(self) -> Version:
        return self.adapter.version


def unused(held: Sequence[Loaded], policy: str) -> list[Loaded]:
    """Those of a policy that nobody leases, but for its newest and its last.

    `held` is in the order in which versions were asked for. Of several with the newest number the last one counts: a
    number that is trained again after a crash takes the first one's place.
    """
    own = [each for each in reversed(held) if each.version.policy == policy]
    newest = max(own, key=lambda each: each.version.number, default=None)
    return [each for each in own[1:] if each is not newest and not each.leases]


def in_the_way(held: Sequence[Loaded], policy: str) -> Loaded | None:
    """Which one makes room for another version of `policy`; None where all are leased.

    Another policy's goes last, the one that was asked for longest ago: it is loaded again when it is asked for.
    """
    idle = [each for each in held if not each.leases]
    return min(idle, key=lambda each: each.version.policy != policy, default=None)
