"""Learners that share each update, seen as one that outlives their processes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from torch import Tensor

from rlora.cluster.actors import LostError, Remote, end_actors
from rlora.core.batch import shares
from rlora.core.learner import ForwardBackwardOutput, Groups
from rlora.core.objectives.objective import Loss
from rlora.core.optimizer import Adam, StepStats
from rlora.core.setup import Setup
from rlora.records import Adapter, Group, UpdateStats

_PATIENCE = 30.0  # seconds until we say that Ray has found no place for an actor


@dataclass
class _Held:
    """What a policy is made of again where a learner dies."""

    setup: Setup
    saved: bytes | None  # its last state, or what it was opened with; None while it is fresh
    is_own: bool = False  # the state is what the learner says today: another release may name its tensors otherwise
    added: list[list[tuple[Any, ...]]] = field(default_factory=list)  # the `forward_backward` calls since


class Ranks:
    """A group of data-parallel learner processes with the interface of `Learner`.

    Calls that change a policy go to every process, and the result of the first is returned. Where one dies, all are
    made anew by `make`, each policy goes on from its last state, gradients that were added up since are computed again,
    and the call is made again; after `restarts` times in a row its error is raised.
    """

    def __init__(self, make: Callable[[], list[Remote]], remotes: list[Remote], restarts: int) -> None:
        self._make, self._remotes, self._restarts = make, remotes, restarts
        self._out_of_step = False  # one has died, or an error of one may have left others in the midst of a call
        self._held: dict[str, _Held] = {}
        self._join()

    def open(self, policy: str, setup: Setup, saved: bytes | None = None) -> Adapter:
        adapter: Adapter = self._call(partial(self._on_all, "open", policy, ray.put(setup), ray.put(saved)))
        self._held[policy] = _Held(setup, saved)
        return adapter

    def close(self, policy: str) -> None:
        """`Learner.close` on all, which is not waited for: calls reach them in their order."""
        self._held.pop(policy, None)
        if not self._out_of_step:  # else they are made anew without it
            self._on_all("close", policy)

    def rehearse(self) -> list[tuple[str, int]]:
        """`Learner.rehearse` on each."""
        held: list[tuple[str, int]] = self._call(partial(self._on_each, "rehearse", [()] * len(self._remotes)))
        return held

    def about(self) -> str:
        """`Learner.about`, of the first."""
        words: str = self._call(partial(self._on_first, "about"))
        return words

    def update(self, policy: str, groups: Sequence[Group]) -> tuple[Adapter, UpdateStats]:
        """`Learner.update` on all; the state after it is kept too, so that what is returned is never lost."""
        return self.start_update(policy, groups)()

    def start_update(self, policy: str, groups: Sequence[Group]) -> Callable[[], tuple[Adapter, UpdateStats]]:
        """The same, which goes on meanwhile: call what is returned to wait for it."""
        return self._stepped(policy, "update", ray.put(groups))

    def forward(self, policy: str, groups: Groups, reference: bool = False) -> list[list[Tensor]]:
        """`Learner.forward`, the groups dealt out."""
        calls = [(policy, part, reference) for part in self._dealt(groups)]
        return _joined(self._call(partial(self._on_each, "forward", calls)))

    def forward_backward(self, policy: str, groups: Groups, loss: Loss) -> ForwardBackwardOutput:
        """`Learner.forward_backward`, the groups dealt out."""
        shared = ray.put(loss)  # as it is now, should it have to be sent once more
        calls = [(policy, part, shared) for part in self._dealt(groups)]
        try:
            computed = self._call(partial(self._on_each, "forward_backward", calls))
        except Exception:
            self._held[policy].added.clear()  # as the learners' own gradients
            raise
        self._held[policy].added.append(calls)
        return ForwardBackwardOutput(computed[0].sums, _joined([each.outputs for each in computed]))

    def optim_step(self, policy: str, adam: Adam) -> StepStats:
        """`Learner.optim_step` on all; the state after it is kept too."""
        stats: StepStats = self._stepped(policy, "optim_step", adam)()
        return stats

    def next_version(self, policy: str) -> Adapter:
        """`Learner.next_version` on all; the state after it is kept too."""
        added = self._held[policy].added
        adapter: Adapter = self._stepped(policy, "next_version")()
        self._held[policy].added = added
        return adapter

    def adapter(self, policy: str) -> Adapter:
        adapter: Adapter = self._call(partial(self._on_first, "adapter", policy))
        return adapter

    def state(self, policy: str) -> bytes:
        held = self._held[policy]
        if held.saved is None or not held.is_own:
            held.saved, held.is_own = self._call(partial(self._on_first, "state", policy)), True
        return held.saved

    def _stepped(self, policy: str, method: str, *arguments: Any) -> Callable[[], Any]:
        """The result of a call on all that changes a policy, whose state after it is kept."""

        def send() -> Callable[[], tuple[Any, bytes]]:
            changed, state = self._on_all(method, policy, *arguments), self._on_first("state", policy)
            return lambda: (changed(), state())

        waited = self._begin(send)

        def result() -> Any:
            try:
                made, saved = waited()
            except Exception:
                self._out_of_step = True  # it may have changed the policy before it failed
                raise
            self._held[policy] = _Held(self._held[policy].setup, saved, is_own=True)
            return made

        return result

    def _dealt(self, groups: Groups) -> list[Any]:
        """Each learner's part: all groups, without the samples of those that are another's."""
        sizes = [sum(sample.length for sample in group) for group in groups]
        return [
            ray.put([group if place in part else [] for place, group in enumerate(groups)])
            for part in map(set, shares(sizes, len(self._remotes)))
        ]

    def _call(self, send: Callable[[], Callable[[], Any]]) -> Any:
        return self._begin(send)()

    def _begin(self, send: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
        """Send calls; what is returned waits for their results, and sends them once more where a learner has died."""
        sent = None if self._out_of_step else (self._remotes, send())

        def result() -> Any:
            nonlocal sent
            deaths = 0
            while True:
                try:
                    if self._out_of_step:
                        self._make_anew()
                    if sent is None or sent[0] is not self._remotes:
                        sent = self._remotes, send()
                    return sent[1]()
                except Exception as error:
                    died = isinstance(error, LostError) or self._one_died()
                    self._out_of_step |= died or len(self._remotes) > 1
                    deaths += died
                    if not died or deaths > self._restarts:
                        raise
                    print(f"{error}\nIt is started again, and goes on from its last state.", flush=True)

        return result

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
        self._remotes = self._make()
        results_of({remote.built: remote for remote in self._remotes}, still_starting)
        self._join()
        for policy, held in self._held.items():
            self._on_all("open", policy, ray.put(held.setup), ray.put(held.saved))()
            for calls in held.added:
                self._on_each("forward_backward", calls)()
        self._out_of_step = False

    def _join(self) -> None:
        if len(self._remotes) > 1:
            address = self._remotes[0].wait(self._remotes[0].actor.address.remote())
            self._on_each("join", [(address, rank, len(self._remotes)) for rank, _ in enumerate(self._remotes)])()

    def _on_first(self, method: str, *arguments: Any) -> Callable[[], Any]:
        first = self._remotes[0]
        return partial(first.wait, first.actor.call.remote(method, *arguments))

    def _on_all(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """The first one's result, once it is waited for."""
        results = self._on_each(method, [arguments] * len(self._remotes))
        return lambda: results()[0]

    def _on_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        """Each one's result. An error of any is raised at once: the others would wait for it for ever."""
        calls = {
            remote.actor.call.remote(method, *own): remote for remote, own in zip(self._remotes, arguments, strict=True)
        }

        def wait() -> list[Any]:
            results = results_of(calls)
            return [results[call] for call in calls]

        return wait


def _joined(parts: Sequence[list[list[Tensor]]]) -> list[list[Tensor]]:
    """What learners give for the samples of each group, which one of them had."""
    return [next((each for each in of if each), []) for of in zip(*parts, strict=True)]


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
