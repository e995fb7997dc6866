"""The loop without engines: a real learner in this process, and episodes from a record."""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import episode, group

import rlora.cluster
import rlora.run.run
from rlora.core.learner import Learner
from rlora.records import Adapter, Cursor, Group, Prompt, UpdateStats
from rlora.rollout.requests import FleetStats
from rlora.rollout.stream import Collection
from rlora.rollout.task import ServedPolicy
from rlora.settings import Config


def recorded(policy: str, step: int) -> tuple[Group, ...]:
    draw = random.Random(f"{policy} {step}")

    def made(reward: float) -> Any:
        tokens = [draw.randrange(2, 97) for _ in range(draw.randint(1, 6))]
        return episode(tokens, reward, [-4 * draw.random() for _ in tokens])

    return tuple(
        group([draw.randrange(2, 97) for _ in range(3)], *(made(float(k % 2)) for k in range(4))) for _ in range(2)
    )


class Stage:
    """What happened, in its order; and what is to go wrong."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, int]] = []
        self.wrong: dict[tuple[str, str, int], Exception] = {}
        self.acts: dict[tuple[str, str, int], Callable[[], None]] = {}  # what is done meanwhile
        self.learner: Here
        self.job: HereJob

    def tell(self, what: str, policy: str, number: int) -> None:
        self.told.append((what, policy, number))
        if act := self.acts.get((what, policy, number)):
            act()
        if error := self.wrong.get((what, policy, number)):
            raise error

    def swap(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> list[Any]:
        self.tell("swap", adapter.policy, adapter.number)
        return []

    def leave(self, policy: str) -> None:
        self.told.append(("leave", policy, 0))

    def resize(self, engines: int) -> None:
        pass

    def check(self) -> None:
        pass

    def stats(self) -> FleetStats:
        return FleetStats(0, 0.0, {}, 0, 0)


class Recorded:
    """In place of Rollouts."""

    def __init__(self, config: Config, prompts: Any, fleet: Stage, loop: str, cursor: Cursor) -> None:
        self.stage, self.policy, self.cursor, self.due = fleet, loop, cursor, False
        self.coming: list[Future[Any]] = []

    def send(self, version: int) -> None:
        self.stage.tell("send", self.policy, version)
        self.due = True

    def take(self, version: int) -> Collection:
        self.stage.tell("take", self.policy, version)
        self.due = False
        groups = recorded(self.policy, version)
        return Collection(groups, groups, 0.0, 0, 0)


class Here(Learner):
    """A learner in this process."""

    def start_update(self, policy: str, groups: Sequence[Group]) -> Callable[[], tuple[Adapter, UpdateStats]]:
        return partial(self.update, policy, groups)


class HereJob:
    """In place of cluster.Job."""

    is_apart = False

    def __init__(self, stage: Stage, served: Sequence[ServedPolicy]) -> None:
        self.fleet, self.learners, self.loops = stage, dict[str, Here](), dict[str, str]()
        self.slots = sum(rlora.cluster.versions_of(each.config) for each in served)
        for each in served:
            self.join(each)

    def join(self, served: ServedPolicy) -> None:
        self.learners[served.policy], self.loops[served.policy] = self.fleet.learner, served.policy

    def leave(self, policy: str) -> None:
        self.fleet.leave(policy)
        self.fleet.learner.close(policy)


def task_of(base: str) -> Any:
    """What is trained on: nothing of it is looked at."""
    prompts, chat = [Prompt("?", 0, (5,))], SimpleNamespace(template=None)
    return SimpleNamespace(
        base=base, prompts=prompts, held_out=[], sets={}, stop=(), agent=False, chat=chat, dropped=0, checked=""
    )


def set_stage(monkeypatch: pytest.MonkeyPatch, base: str) -> Stage:
    """Have the loop run without engines."""
    made = Stage()

    @contextmanager
    def start(served: Sequence[ServedPolicy]) -> Iterator[HereJob]:
        made.learner = Here(served[0].config, base)
        made.job = job = HereJob(made, served)
        yield job

    monkeypatch.setattr(rlora.run.run, "Rollouts", Recorded)
    monkeypatch.setattr(rlora.cluster, "start", start)
    return made
