"""Learner processes that share each update, with the interface of one learner. Dead processes are replaced."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from torch import Tensor

from rlora.cluster.actors import LostError, Remote, end_actors, report_starting, wait_for_results
from rlora.core.batch import shares
from rlora.core.learner import ForwardBackwardOutput, Groups
from rlora.core.objectives.objective import Loss
from rlora.core.optimizer import Adam, StepStats
from rlora.core.setup import Setup
from rlora.records import Adapter, Group, UpdateStats

_log = logging.getLogger(__name__)


@dataclass
class _Backup:
    """What restores a policy after a learner has died."""

    setup: Setup
    state: bytes | None  # after its last update or step, or the state that it was opened with; None: a new policy
    is_current_format: bool = False  # this release wrote `state`; older ones name tensors differently
    accumulated: list[list[tuple[Any, ...]]] = field(default_factory=list)  # `forward_backward` calls since `state`


class Ranks:
    """A group of data-parallel learner processes with the interface of `Learner`.

    Calls that change a policy go to every process, and the result of the first process is returned. Methods block,
    unless they say otherwise, and raise the exceptions of `Learner`.

    If a process dies, `create` starts a new group, each policy is restored from its last state, gradients accumulated
    since then are computed again, and the call is repeated. After `restarts` consecutive deaths the call raises the
    error instead. `remotes` is the first group.
    """

    def __init__(self, create: Callable[[], list[Remote]], remotes: list[Remote], restarts: int) -> None:
        self._create, self._remotes, self._restarts = create, remotes, restarts
        self._is_broken = False  # a process died, or an error in one may have left the others inside a call
        self._backups: dict[str, _Backup] = {}
        self._join()

    def open(self, policy: str, setup: Setup, saved: bytes | None = None) -> Adapter:
        """Call `Learner.open` on all learners."""
        adapter: Adapter = self._call(partial(self._on_all, "open", policy, ray.put(setup), ray.put(saved)))
        self._backups[policy] = _Backup(setup, saved)
        return adapter

    def close(self, policy: str) -> None:
        """Call `Learner.close` on all learners, without blocking. Calls that are made later run after this call."""
        self._backups.pop(policy, None)
        if not self._is_broken:  # else the next group is created without the policy
            self._on_all("close", policy)

    def rehearse(self) -> list[tuple[str, int]]:
        """Call `Learner.rehearse` on all learners, and return the GPU's UUID and the peak bytes of each."""
        sizes: list[tuple[str, int]] = self._call(partial(self._on_each, "rehearse", [()] * len(self._remotes)))
        return sizes

    def about(self) -> str:
        """Call `Learner.about` on the first learner."""
        text: str = self._call(partial(self._on_first, "about"))
        return text

    def base_norms(self, policy: str) -> dict[str, float]:
        """Call `Learner.base_norms` on all learners: with sharded weights each has a part."""
        norms: dict[str, float] = self._call(partial(self._on_all, "base_norms", policy))
        return norms

    def update(self, policy: str, groups: Sequence[Group]) -> tuple[Adapter, UpdateStats]:
        """Call `Learner.update` on all learners, and keep the policy's new state for the case that a learner dies."""
        return self.start_update(policy, groups)()

    def start_update(self, policy: str, groups: Sequence[Group]) -> Callable[[], tuple[Adapter, UpdateStats]]:
        """Start `Learner.update` on all learners without blocking. Returns a function that waits for the result.

        The function must be called before the policy's next call. It blocks until all learners have finished, keeps the
        policy's new state, and returns what `update` returns. It also raises the errors of the update, and replaces
        dead learners.
        """
        return self._change(policy, "update", ray.put(groups), merge=_merge_updates)

    def forward(self, policy: str, groups: Groups, reference: bool = False) -> list[list[Tensor]]:
        """Call `Learner.forward` on all learners, with the groups divided among them."""
        calls = [(policy, part, reference) for part in self._divide(groups)]
        return _merge(self._call(partial(self._on_each, "forward", calls)))

    def forward_backward(self, policy: str, groups: Groups, loss: Loss) -> ForwardBackwardOutput:
        """Call `Learner.forward_backward` on all learners, with the groups divided among them."""
        loss_ref = ray.put(loss)  # a copy, so that a repeated call uses the loss as it is now
        calls = [(policy, part, loss_ref) for part in self._divide(groups)]
        try:
            outputs = self._call(partial(self._on_each, "forward_backward", calls))
        except Exception:
            self._backups[policy].accumulated.clear()  # the learners drop their gradients too
            raise
        self._backups[policy].accumulated.append(calls)
        return ForwardBackwardOutput(outputs[0].sums, _merge([output.outputs for output in outputs]))

    def optim_step(self, policy: str, adam: Adam) -> StepStats:
        """Call `Learner.optim_step` on all learners, and keep the policy's new state."""
        stats: StepStats = self._change(policy, "optim_step", adam)()
        return stats

    def next_version(self, policy: str) -> Adapter:
        """Call `Learner.next_version` on all learners, and keep the policy's new state."""
        accumulated = self._backups[policy].accumulated
        adapter: Adapter = self._change(policy, "next_version")()
        self._backups[policy].accumulated = accumulated
        return adapter

    def adapter(self, policy: str) -> Adapter:
        """Call `Learner.adapter` on the first learner."""
        adapter: Adapter = self._call(partial(self._on_first, "adapter", policy))
        return adapter

    def state(self, policy: str) -> bytes:
        """Return the kept state of the policy, or `Learner.state` of the first learner if none is kept."""
        backup = self._backups[policy]
        if backup.state is None or not backup.is_current_format:
            backup.state, backup.is_current_format = self._call(partial(self._on_first, "state", policy)), True
        return backup.state

    def _change(
        self, policy: str, method: str, *arguments: Any, merge: Callable[[list[Any]], Any] = itemgetter(0)
    ) -> Callable[[], Any]:
        """Call a method that changes a policy, on all learners. The returned function waits for the results, keeps the
        new state, and returns `merge` of the results."""

        def send() -> Callable[[], tuple[Any, bytes]]:
            outputs = self._on_each(method, [(policy, *arguments)] * len(self._remotes))
            state = self._on_first("state", policy)
            return lambda: (merge(outputs()), state())

        wait = self._start(send)

        def result() -> Any:
            try:
                output, saved = wait()
            except Exception:
                self._is_broken = True  # the policy may have changed before the error
                raise
            self._backups[policy] = _Backup(self._backups[policy].setup, saved, is_current_format=True)
            return output

        return result

    def _divide(self, groups: Groups) -> list[Any]:
        """Return a Ray reference per learner, to the list of all groups with those of other learners made empty."""
        sizes = [sum(sample.length for sample in group) for group in groups]
        return [
            ray.put([group if index in indices else [] for index, group in enumerate(groups)])
            for indices in map(set, shares(sizes, len(self._remotes)))
        ]

    def _call(self, send: Callable[[], Callable[[], Any]]) -> Any:
        return self._start(send)()

    def _start(self, send: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
        """Send calls. The returned function waits for their results, and sends them again if a learner has died."""
        calls = None if self._is_broken else (self._remotes, send())

        def result() -> Any:
            nonlocal calls
            deaths = 0
            while True:
                try:
                    if self._is_broken:
                        self._restart()
                    if calls is None or calls[0] is not self._remotes:
                        calls = self._remotes, send()
                    return calls[1]()
                except Exception as error:
                    is_death = isinstance(error, LostError) or self._has_died()
                    self._is_broken |= is_death or len(self._remotes) > 1
                    deaths += is_death
                    if not is_death or deaths > self._restarts:
                        raise
                    _log.warning("%s\nThe learners are started again, and continue from their last state.", error)

        return result

    def _has_died(self) -> bool:
        """Return whether a learner has died: another learner may fail as a result, before Ray reports the death."""
        if len(self._remotes) == 1:
            return False
        for remote in self._remotes:
            with suppress(GetTimeoutError):  # it is alive, and waits for another one in a collective
                try:
                    ray.get(remote.actor.process.remote(), timeout=5)
                except RayActorError:
                    return True
        return False

    def _restart(self) -> None:
        end_actors(self._remotes)
        self._remotes = self._create()
        wait_for_results({remote.built: remote for remote in self._remotes}, report_starting)
        self._join()
        for policy, backup in self._backups.items():
            self._on_all("open", policy, ray.put(backup.setup), ray.put(backup.state))()
            for calls in backup.accumulated:
                self._on_each("forward_backward", calls)()
        self._is_broken = False

    def _join(self) -> None:
        if len(self._remotes) > 1:
            address = self._remotes[0].wait(self._remotes[0].actor.address.remote())
            self._on_each("join", [(address, rank, len(self._remotes)) for rank, _ in enumerate(self._remotes)])()

    def _on_first(self, method: str, *arguments: Any) -> Callable[[], Any]:
        first = self._remotes[0]
        return partial(first.wait, first.actor.call.remote(method, *arguments))

    def _on_all(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Call all learners with equal arguments. The returned function waits for all, and returns the first result."""
        results = self._on_each(method, [arguments] * len(self._remotes))
        return lambda: results()[0]

    def _on_each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        """Call each learner with its row of `arguments`. The returned function waits for the results.

        The function raises the first error immediately: the other learners would wait for the failed one forever.
        """
        calls = {
            remote.actor.call.remote(method, *row): remote for remote, row in zip(self._remotes, arguments, strict=True)
        }

        def wait() -> list[Any]:
            results = wait_for_results(calls)
            return [results[call] for call in calls]

        return wait


def _merge_updates(updates: list[tuple[Adapter, UpdateStats]]) -> tuple[Adapter, UpdateStats]:
    """Return the first learner's result, with the episodes that the other learners trained on."""
    adapter, stats = updates[0]
    trained = {episode: item for _, part in updates for episode, item in part.trained.items()}
    return adapter, replace(stats, trained=trained)


def _merge(parts: Sequence[list[list[Tensor]]]) -> list[list[Tensor]]:
    """Combine the learners' outputs, by group and sample: each group was computed by one of them."""
    return [next((outputs for outputs in group if outputs), []) for group in zip(*parts, strict=True)]
