"""The training loop without engines: a real learner in this process and generated episodes."""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import episode, group

import rlora.cluster.resources
import rlora.run.run
from rlora.core.learner import Learner
from rlora.records import Adapter, Group, Prompt, UpdateStats
from rlora.rollout.cursor import Cursor
from rlora.rollout.requests import FleetStats
from rlora.rollout.stream import Collection
from rlora.rollout.task import ServedPolicy
from rlora.settings import Config


def recorded(policy: str, step: int) -> tuple[Group, ...]:
    """Groups of a step, the same for each call."""
    draw = random.Random(f"{policy} {step}")

    def random_episode(reward: float) -> Any:
        tokens = [draw.randrange(2, 97) for _ in range(draw.randint(1, 6))]
        return episode(tokens, reward, [-4 * draw.random() for _ in tokens])

    return tuple(
        group([draw.randrange(2, 97) for _ in range(3)], *(random_episode(float(k % 2)) for k in range(4)))
        for _ in range(2)
    )


class Stage:
    """Stands in for the fleet: records calls, and runs actions or raises errors during chosen calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int]] = []  # name, policy, version
        self.errors: dict[tuple[str, str, int], Exception] = {}  # to raise, by call
        self.actions: dict[tuple[str, str, int], Callable[[], None]] = {}  # to run, by call
        self.learner: LocalLearner
        self.job: LocalJob

    def call(self, name: str, policy: str, number: int) -> None:
        self.calls.append((name, policy, number))
        if action := self.actions.get((name, policy, number)):
            action()
        if error := self.errors.get((name, policy, number)):
            raise error

    def swap(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> list[Any]:
        self.call("swap", adapter.policy, adapter.number)
        return []

    def leave(self, policy: str) -> None:
        self.calls.append(("leave", policy, 0))

    def resize(self, engines: int) -> None:
        pass

    def check(self) -> None:
        pass

    def stats(self) -> FleetStats:
        return FleetStats(0, 0.0, {}, 0, 0)


class Recorded:
    """Stands in for Rollouts."""

    def __init__(self, config: Config, prompts: Any, fleet: Stage, loop: str, cursor: Cursor) -> None:
        self.stage, self.policy, self.cursor, self.due = fleet, loop, cursor, False
        self.pending: list[Future[Any]] = []

    def send(self, version: int) -> None:
        self.stage.call("send", self.policy, version)
        self.due = True

    def take(self, version: int) -> Collection:
        self.stage.call("take", self.policy, version)
        self.due = False
        groups = recorded(self.policy, version)
        return Collection(groups, groups, 0.0, 0, 0)


class LocalLearner(Learner):
    """A learner in this process."""

    def start_update(self, policy: str, groups: Sequence[Group]) -> Callable[[], tuple[Adapter, UpdateStats]]:
        return partial(self.update, policy, groups)


class LocalJob:
    """Stands in for cluster.Job."""

    is_apart = False

    def __init__(self, stage: Stage, served: Sequence[ServedPolicy]) -> None:
        self.fleet, self.learners, self.loops = stage, dict[str, LocalLearner](), dict[str, str]()
        self.config = rlora.cluster.resources.shared_config(served)
        self.slots = sum(rlora.cluster.resources.slots_needed(policy.config) for policy in served)
        for policy in served:
            self.join(policy)

    def join(self, served: ServedPolicy) -> None:
        self.learners[served.policy], self.loops[served.policy] = self.fleet.learner, served.policy

    def leave(self, policy: str) -> None:
        self.fleet.leave(policy)
        self.fleet.learner.close(policy)


def task_of(base: str) -> Any:
    """A task whose prompts and rewards are never used."""
    prompts, chat = [Prompt("?", 0, (5,))], SimpleNamespace(template=None)
    return SimpleNamespace(
        base=base,
        prompts=prompts,
        held_out=[],
        sets={},
        stop=(),
        agent=False,
        chat=chat,
        dropped=0,
        checked="",
        examples=[],
    )


def set_stage(monkeypatch: pytest.MonkeyPatch, base: str) -> Stage:
    """Make the loop run without engines."""
    stage = Stage()

    @contextmanager
    def start(served: Sequence[ServedPolicy]) -> Iterator[LocalJob]:
        stage.learner = LocalLearner(served[0].config, base)
        stage.job = job = LocalJob(stage, served)
        yield job

    monkeypatch.setattr(rlora.run.run, "Rollouts", Recorded)
    monkeypatch.setattr(rlora.cluster, "start", start)
    monkeypatch.setattr(rlora.cluster, "starting", lambda *_: nullcontext())
    return stage
