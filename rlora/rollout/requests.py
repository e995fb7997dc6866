"""What a fleet is asked, whom it asks, and what it says of itself."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from rlora.records import Adapter, DeliveryError, Engine, Group, Prompt, Receipt, Sampling, StaleError, Version


@dataclass(eq=False)
class Request:
    """A prompt given to a fleet."""

    prompt: Prompt
    sampling: Sampling
    policy: str
    group: Future[Group] = field(default_factory=Future)  # with unscored episodes
    adapter: Adapter | None = None  # it is sampled under, wherever it has to be sent again; None while it waits
    attempts: int = 0
    cancelled: bool = False  # nobody waits for it any more: it is not sent again
    background: bool = False  # it goes after all that is not

    @property
    def version(self) -> Version | None:
        return None if self.adapter is None else self.adapter.version


@dataclass(eq=False)
class Member:
    engine: Engine
    number: int
    busy_seconds: float = 0.0  # when it was asked last
    flying: list[Request] = field(default_factory=list)
    leaving: bool = False

    @property
    def completions(self) -> int:
        """Those in flight."""
        return sum(request.sampling.group_size for request in self.flying)


@dataclass(frozen=True)
class FleetStats:
    """Figures of a fleet since it began."""

    engines: int  # now
    busy_seconds: float  # in which engines have computed, each step's divided by the engines there were
    canaries: Mapping[str, float]  # by policy: the farthest that an engine's was from the learner's, mean, nats
    lost: int  # engines that died
    replayed: int  # prompts sampled again because of it


def left(policy: str) -> StaleError:
    return StaleError(f"policy {policy}: it has left")


def checked(adapter: Adapter, proof: Receipt) -> Receipt:
    if proof.digest != adapter.digest:
        raise DeliveryError(
            f"adapter {adapter.name}: an engine says that it serves {proof.digest[:12]}, not {adapter.digest[:12]}"
        )
    return proof
