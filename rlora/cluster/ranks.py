"""Learners that share each update, seen as one that outlives their processes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from rlora.cluster.actors import LostError, Remote, end_actors
from rlora.core.setup import Setup
from rlora.records import Adapter, Group

_PATIENCE = 30.0  # seconds until we say that Ray has found no place for an actor


class Ranks:
    """The first one answers, and what changes a policy is called on all.

    Where one dies, all are made anew by `make`, each policy goes on from its last state, and the call is made again;
    after `restarts` times in a row RloraError is raised.
    """

    def __init__(self, make: Callable[[], list[Remote]], remotes: list[Remote], restarts: int) -> None:
        self._make, self._remotes, self._restarts = make, remotes, restarts
        self._out_of_step = False  # an error of one learner may have left others in the midst of a call
        self._held: dict[str, tuple[Setup, bytes | None]] = {}  # each policy's last state; None while it is fresh
        self._join()

    def open(self, policy: str, setup: Setup, saved: bytes | None = None) -> Adapter:
        adapter: Adapter = self._despite_deaths(partial(self._opened, policy, setup, saved))
        self._held[policy] = setup, saved
        return adapter

    def close(self, policy: str) -> None:
        self._held.pop(policy, None)
        self._despite_deaths(partial(self._on_all, "close", [(policy,)] * len(self._remotes)))

    def update(self, policy: str, groups: Sequence[Group]) -> Any:
        """`Learner.update` on all; the state after it is kept too, so that what is returned is never lost."""

        def updated() -> tuple[Any, bytes]:
            arguments = [(policy, shared)] * len(self._remotes)
            return self._on_all("update", arguments), self._on_first("state", policy)

        shared = ray.put(groups)
        result, state = self._despite_deaths(updated)
        self._held[policy] = self._held[policy][0], state
        return result

    def adapter(self, policy: str) -> Adapter:
        adapter: Adapter = self._despite_deaths(partial(self._on_first, "adapter", policy))
        return adapter

    def state(self, policy: str) -> bytes:
        state: bytes = self._held[policy][1] or self._despite_deaths(partial(self._on_first, "state", policy))
        return state

    def _despite_deaths(self, call: Callable[[], Any]) -> Any:
        deaths = 0
        while True:
            try:
                if deaths or self._out_of_step:
                    self._make_anew()
                return call()
            except Exception as error:
                if not (isinstance(error, LostError) or self._one_died()):
                    self._out_of_step = len(self._remotes) > 1
                    raise
                deaths += 1
                if deaths > self._restarts:
                    raise
                print(f"{error}\nIt is started again, and goes on from its last state.", flush=True)

    def _one_died(self) -> bool:
        """Whether an error of one learner is that another is gone: it hears of that before Ray does."""
        if len(self._remotes) == 1:
            return False
        for remote in self._remotes:
            with suppress(GetTimeoutError):  # it waits for another
                try:
                    ray.get(remote.actor.place.remote(), timeout=5)
                except RayActorError:
                    return True
        return False

    def _make_anew(self) -> None:
        end_actors(self._remotes)
        self._remotes, self._out_of_step = self._make(), False
        results_of({remote.built: remote for remote in self._remotes}, still_starting)
        self._join()
        for policy, (setup, saved) in self._held.items():
            self._opened(policy, setup, saved)

    def _join(self) -> None:
        if len(self._remotes) > 1:
            address = self._remotes[0].wait(self._remotes[0].actor.address.remote())
            self._on_all("join", [(address, rank, len(self._remotes)) for rank, _ in enumerate(self._remotes)])

    def _opened(self, policy: str, setup: Setup, saved: bytes | None) -> Any:
        shared = ray.put(setup), ray.put(saved)
        return self._on_all("open", [(policy, *shared)] * len(self._remotes))

    def _on_first(self, method: str, *arguments: Any) -> Any:
        return self._remotes[0].wait(self._remotes[0].actor.call.remote(method, *arguments))

    def _on_all(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Any:
        """The first one's result. An error of any is raised at once: the others would wait for it for ever."""
        calls = {
            remote.actor.call.remote(method, *own): remote for remote, own in zip(self._remotes, arguments, strict=True)
        }
        return results_of(calls)[next(iter(calls))]


def results_of(calls: Mapping[Any, Remote], late: Callable[[list[Remote]], None] = lambda _: None) -> dict[Any, Any]:
    """Return the result of each call. The first error is raised immediately.

    After each `_PATIENCE` seconds without a result, `late` is called with the remotes that have not answered.
    """
    results: dict[Any, Any] = {}
    while waiting := [call for call in calls if call not in results]:
        ended, _ = ray.wait(waiting, timeout=_PATIENCE)
        for call in ended:
            results[call] = calls[call].wait(call)
        if not ended:
            late([calls[call] for call in waiting])
    return results


def still_starting(remotes: list[Remote]) -> None:
    waiting = ", ".join(remote.role for remote in remotes)
    print(f"still starting: {waiting}; Ray has {ray.available_resources()} free for them", flush=True)
