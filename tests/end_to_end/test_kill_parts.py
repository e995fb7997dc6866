"""kill -9 of engines, learners, reward workers and a node: the run continues."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray
from commands import TOML, metrics, own
from conftest import ROOT, ray_head, ray_node

from rlora import cluster
from rlora.cluster import processes
from rlora.core.setup import Setup
from rlora.records import EngineLostError, Group
from rlora.rollout.cursor import Cursor
from rlora.rollout.stream import Rollouts, prompt_at
from rlora.rollout.task import ServedPolicy, load_task
from rlora.settings import Config

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("nothing_stays_behind")]


def test_a_run_on_two_nodes_goes_on_where_one_dies(tmp_path: Path, small: tuple[str, ...]) -> None:
    """Each node has one engine. The raylet that started a process identifies the node of the process."""
    home, run = Path(tempfile.mkdtemp(prefix="ray-")), tmp_path / "run"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with ray_head(home, environment) as address, ExitStack() as second:
        second.enter_context(ray_node(tmp_path / "node.log", environment, f"--address={address}", "--num-cpus=1"))
        before = raylets()
        line = [sys.executable, "-m", "rlora", "train", TOML, "--steps", "12", "--run-dir", str(run), *small,
                "--engine.replicas", "2", "--engine.kv-cache-gib", "1", "--restarts", "1"]  # fmt: skip
        with (tmp_path / "out.txt").open("w") as out:
            training = subprocess.Popen(
                line, cwd=ROOT, env=environment | {"RAY_ADDRESS": address}, stdout=out, stderr=out
            )
        told = (tmp_path / "out.txt").read_text
        try:
            while "step 2/12" not in told():
                assert training.poll() is None, told()
                time.sleep(0.2)
            over = engines_by_raylet()
            assert sorted(len(pids) for pids in over.values()) == [1, 1], over
            head = min(before, key=lambda raylet: raylet)  # the first that was started
            (other,) = over.keys() - {head}
            os.kill(other, signal.SIGKILL)
            assert training.wait(timeout=400) == 0, told()
        finally:
            training.kill()
    assert "step 12/12" in told()
    assert len(metrics(run)) == 12


def raylets() -> set[int]:
    """Those of this test."""
    found = (path for path in Path("/proc").glob("[0-9]*") if own(path))
    return {int(path.name) for path in found if b"raylet/raylet" in (path / "cmdline").read_bytes()}


def engines_by_raylet() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for raylet in raylets():
        children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
        titles = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        engines = [pid for pid, title in titles.items() if b"_EngineActor" in title]
        if engines:
            found[raylet] = engines
    return found


PHASES = ("idle", "loading", "canary", "sampling", "learning", "scoring")


@pytest.mark.parametrize("count", [6, pytest.param(24, marks=pytest.mark.slow)])
def test_a_run_outlives_its_engines_its_learners_and_its_scorers(
    config: Callable[..., Config], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9, once a step, of an engine in each of its phases, of a learner of two or of what scores.

    No prompt is lost or doubled.
    """
    small = config(
        prompts_per_step=4, group_size=4, steps=count + 1, max_staleness=1, learner={"lr": 5e-4, "replicas": 2},
        sampling={"max_tokens": 24, "max_prompt_tokens": 48},
        engine={"replicas": 2, "kv_cache_gib": 1, "straggler_seconds": 300.0},
    )  # fmt: skip
    task = load_task(small)
    monkeypatch.setattr(processes, "ENGINE", f"{ROOT / 'tests' / 'faulty_engine.py'}:MortalEngine")
    killed: set[int] = set()

    def kill_learner(remote: Any) -> None:
        _, pid = ray.get(remote.process)
        timer = threading.Timer(0.3, lambda: (os.kill(pid, signal.SIGKILL), killed.add(pid)))  # in its update
        timer.daemon = True
        timer.start()

    trained: list[Group] = []
    with cluster.start([ServedPolicy("run", small, task)]) as job:
        learners, fleet, loops = job.learners, job.fleet, job.loops
        learner, loop = learners["run"], loops["run"]
        ranks: Any = learner
        adapter = learner.open("run", Setup.of(small))
        rollouts = Rollouts(small, task.prompts, fleet, loop, Cursor())
        for step in range(small.steps):
            phase = PHASES[step % len(PHASES)] if step < count else None
            while not fleet.engines:  # one that replaces another is on its way
                time.sleep(0.1)
            engine: Any = fleet.engines[0]
            if phase == "idle":
                wait([each.flight.request.group for each in rollouts._sent])
                with pytest.raises(EngineLostError):
                    engine.die(phase).result()
            if phase == "loading":
                engine.die(phase).result()
            fleet.swap(adapter, oldest=adapter.number - small.max_staleness)
            if phase in ("canary", "sampling"):  # the canary goes with a version's first prompts
                engine.die(phase).result()
            if phase == "scoring":
                pool: Any = loop.scoring.pools[0]
                _, pid = ray.get(pool.actor.process.remote())
                os.kill(pid, signal.SIGKILL)
            collection = rollouts.take(adapter.number)
            if phase == "learning":
                kill_learner(ranks._remotes[step % 2])
            adapter, update = learner.update("run", collection.groups)
            assert (adapter.number, update.skipped_in_a_row) == (step + 1, 0)
            trained += collection.groups
        stats = fleet.stats()
    assert len(killed) == count // 6
    assert stats.lost == count * 4 // 6
    assert stats.replayed > 0
    places = [prompt_at(task.prompts, place, small.seed) for place in range(4 * small.steps)]
    assert [group.prompt for group in trained] == places
    assert all(len(group.episodes) == len(group.rewards) == 4 for group in trained)
    for place, group in enumerate(trained):
        (version,) = {episode.version for episode in group.episodes}
        assert place // 4 - 1 <= version.number <= place // 4
