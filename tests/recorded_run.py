"""`rlora train` and `rlora sweep` with a real learner on real Ray, whose episodes come from a record.

    python recorded_run.py CONFIG RUN RECORD [FAULT]

trains RUN, or resumes it. If CONFIG is the file of a sweep, RUN is the directory of the sweep. RECORD is a run whose
bundles contain the episodes; with "-" they are generated, identically each time. FAULT is a number n: the process kills
itself during its n-th write or removal of a file or of a directory entry.
"""

import os
import random
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from upath import UPath

import rlora.run.run
from rlora import cluster, store
from rlora.cli import main
from rlora.cluster import resources
from rlora.records import Episode, Group, Prompt, Version
from rlora.rollout.cursor import Cursor
from rlora.rollout.requests import FleetStats
from rlora.rollout.stream import Collection
from rlora.rollout.task import ServedPolicy
from rlora.run import checkpoint
from rlora.settings import Config

RECORD: UPath | None = None
PROMPTS, COMPLETIONS = 2, 4


def generated(step: int) -> tuple[Group, ...]:
    """Groups of a step, the same for each call."""
    draw = random.Random(f"episodes of step {step}")

    def tokens(limit: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, 97) for _ in range(draw.randrange(1, limit)))

    def episode(reward: float) -> Episode:
        ids = tokens(8)
        return Episode(ids, tuple(-4 * draw.random() for _ in ids), "stop", Version("run", step), reward=reward)

    return tuple(
        Group(Prompt("?", step, tokens(8)), tuple(episode(float(number % 2)) for number in range(COMPLETIONS)))
        for _ in range(PROMPTS)
    )


class Recorded:
    """Stands in for Rollouts: each step returns the recorded episodes."""

    def __init__(self, config: Config, prompts: Any, fleet: Any, loop: Any, cursor: Cursor) -> None:
        self.cursor = cursor

    def send(self, version: int) -> None:
        pass

    def take(self, version: int) -> Collection:
        assert self.cursor.next == PROMPTS * version, (self.cursor, version)
        self.cursor = Cursor(self.cursor.next + PROMPTS)
        time.sleep(0.03)
        recorded = checkpoint.read(checkpoint.bundle_path(RECORD, version + 1)).groups if RECORD else generated(version)
        assert recorded
        return Collection(tuple(recorded), tuple(recorded), 0.0, 0, 0)


class NoFleet:
    def swap(self, adapter: Any, oldest: int = 0, kept: int | None = None) -> list[Any]:
        return []

    def resize(self, engines: int) -> None:
        pass

    def leave(self, policy: str) -> None:
        pass

    def stats(self) -> FleetStats:
        return FleetStats(0, 0.0, {}, 0, 0)


class Job:
    """Stands in for cluster.Job."""

    is_apart = False

    def __init__(self, learner: Any, served: Sequence[ServedPolicy]) -> None:
        self.learner, self.fleet, self.slots = learner, NoFleet(), 2 * len(served)
        self.learners, self.loops = dict[str, Any](), dict[str, None]()
        for policy in served:
            self.join(policy)

    def join(self, served: ServedPolicy) -> None:
        self.learners[served.policy], self.loops[served.policy] = self.learner, None

    def leave(self, policy: str) -> None:
        self.learner.close(policy)


@contextmanager
def start_learner(served: Sequence[ServedPolicy]) -> Iterator[Job]:
    with cluster.learning(resources.shared_config(served), served[0].task.base) as learner:
        yield Job(learner, served)


def die_at(count: int) -> None:
    """Kill this process during its `count`-th write."""
    write, settle, rmtree = store._write, store._settle, shutil.rmtree
    remaining = count

    def must_die() -> bool:
        nonlocal remaining
        remaining -= 1
        return remaining == 0

    def faulty_write(path: Path, content: bytes) -> None:
        if must_die():
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    def faulty_settle(directory: Path) -> None:
        if must_die():
            os.kill(os.getpid(), signal.SIGKILL)
        settle(directory)

    def faulty_rmtree(directory: Path) -> None:
        if must_die():
            next(directory.iterdir()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        rmtree(directory)

    store._write, store._settle = faulty_write, faulty_settle
    store.shutil = SimpleNamespace(rmtree=faulty_rmtree)  # type: ignore[attr-defined, assignment]


if __name__ == "__main__":
    config, run, record, *fault = sys.argv[1:]
    RECORD = None if record == "-" else UPath(record)
    rlora.run.run.Rollouts = Recorded  # type: ignore[attr-defined, misc, assignment]
    cluster.start = start_learner  # type: ignore[assignment]
    cluster.starting = lambda *_: nullcontext()  # type: ignore[assignment]  # no engines
    if fault:
        die_at(int(fault[0]))
    sys.argv = ["rlora", "train", config, "--resume", run]
    if "over" in tomllib.loads(Path(config).read_text()):
        exists = (Path(run) / "sweep.toml").exists()
        sys.argv = ["rlora", "sweep", *(["--resume", run] if exists else [config, "--run-dir", run])]
    main.main()
