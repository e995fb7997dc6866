"""Records of a fleet: a request, an engine replica, and the fleet's statistics."""

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rlora.records import Adapter, DeliveryError, Engine, Group, Prompt, Receipt, Sampling, StaleError, Version


def running_future() -> Future[Any]:
    """Return a future that only its result or its exception completes. A coroutine that awaits it can't cancel it."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(eq=False)
class Request:
    """A prompt for a fleet to sample, as `Fleet.generate` returns it."""

    prompt: Prompt
    sampling: Sampling
    policy: str
    group: Future[Group] = field(default_factory=running_future)  # the result; its episodes are unscored
    adapter: Adapter | None = None  # samples the prompt, also on every retry; None while the request is queued
    attempts: int = 0
    queued: float = field(default_factory=time.monotonic)  # when it was queued last
    cancelled: bool = False  # no caller waits for the result, so the request is not retried
    background: bool = False  # has a lower priority than all other requests

    @property
    def version(self) -> Version | None:
        return None if self.adapter is None else self.adapter.version


@dataclass(eq=False)
class Replica:
    """An engine of a fleet and its requests."""

    engine: Engine
    number: int
    busy_seconds: float = 0.0  # as of the last `Fleet.stats`, like `kv_seconds`
    kv_seconds: float = 0.0
    in_flight: list[Request] = field(default_factory=list)
    draining: bool = False  # takes no more requests and is closed after its last

    @property
    def completions(self) -> int:
        """The number of completions in flight."""
        return sum(request.sampling.group_size for request in self.in_flight)


@dataclass(frozen=True)
class FleetStats:
    """Statistics of a fleet since it was created."""

    engines: int  # currently serving
    busy_seconds: float  # computing time of the engines; each increment is averaged over the engines at that time
    canaries: Mapping[str, float]  # by policy: largest mean |engine logprob - learner logprob| of any engine, in nats
    lost: int  # engines that died
    replayed: int  # prompts sampled again after their engine died
    kv_seconds: float = 0.0  # share of the KV cache in use, integrated over `busy_seconds`
    queued_seconds: float = 0.0  # waiting for room in an engine, summed over prompts


def policy_left(policy: str) -> StaleError:
    """Return the error for the requests of a policy that has left."""
    return StaleError(f"policy {policy}: the policy has left the fleet, so its requests are cancelled")


def check_receipt(adapter: Adapter, receipt: Receipt) -> Receipt:
    """Return `receipt`. Raises DeliveryError if the receipt is for a different adapter."""
    if receipt.digest != adapter.digest:
        raise DeliveryError(
            f"adapter {adapter.name}: an engine serves digest {receipt.digest[:12]} instead of {adapter.digest[:12]}; "
            "this is a bug, or a hardware fault"
        )
    return receipt
