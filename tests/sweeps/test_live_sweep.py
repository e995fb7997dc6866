"""A sweep on real Ray and vLLM: members pause, go on and fork, one fails, and each replays bit for bit."""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from test_end_to_end import SMALL, TOML, _nothing_stays_behind, rlora
from upath import UPath

from rlora.run import checkpoint
from rlora.sweeps.diary import Diary, ask, whole_lines

pytestmark = pytest.mark.vllm
_fixtures = (_nothing_stays_behind,)  # which pytest finds here
ILL = """
def sums(completion, answer, step):
    if step == 2:
        raise ValueError("ill in the third step")
    return float(str(answer) in completion)
"""


def wait_for(holds: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_members_come_and_go_and_one_that_fails_harms_no_other(tmp_path: Path) -> None:
    place, reward = tmp_path / "sweep", tmp_path / "mine.py"
    reward.write_text(ILL)
    axes = ["--over", "learner.rank=1,2", "--member", f"ill:reward={reward}:sums,evaluate.prompts=0"]
    command = ["sweep", TOML, *axes, "--steps", "8", *SMALL, "--check.prompts", "0", "--run-dir", str(place)]
    with subprocess.Popen(
        [sys.executable, "-m", "rlora", *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as sweep:

        def has(event: str, member: str) -> Callable[[], bool]:
            return lambda: any(
                (line["event"], line.get("member")) == (event, member) for line in whole_lines(place / "sweep.jsonl")
            )

        wait_for(lambda: len(whole_lines(place / "metrics.jsonl")) >= 1, sweep)
        assert rlora("pause", str(place / "rank-2")).returncode == 0
        wait_for(has("paused", "rank-2"), sweep)
        ask(place, "fork", "rank-1", version=1, name="hotter", changes={"learner.lr": 1e-3})
        ask(place, "go", "rank-2")
        told, errors = sweep.communicate(timeout=600)
    assert sweep.returncode == 1, errors
    assert "mine.py:4: sums raised ValueError: ill in the third step" in errors
    assert errors.strip().endswith(f"`rlora sweep --resume {place}` continues them")
    assert "versions that engines hold: 6, " in told
    statuses = {name: fate.status for name, fate in Diary(place).fates.items()}
    assert statuses == {"rank-1": "finished", "rank-2": "finished", "hotter": "finished", "ill": "failed"}
    for name, updates in (("rank-1", 8), ("rank-2", 8), ("hotter", 7)):
        replayed = rlora("replay", str(place / name))
        assert replayed.returncode == 0, replayed.stderr
        assert replayed.stdout.endswith(f"{updates} of {updates} updates bit for bit\n")
        assert json.loads((place / name / "summary.json").read_text())["accuracy/after"] >= 0
    listed_before = rlora("runs", str(place)).stdout
    reward.write_text(ILL.replace("step == 2", "False"))
    resumed = rlora("sweep", "--resume", str(place))
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"^ *ill +failed ", listed_before, re.MULTILINE), listed_before
    assert Diary(place).fates["ill"].status == "finished"
    assert "take " in resumed.stdout
    listed = rlora("runs", str(place), "--plot", str(tmp_path / "sweep.png"))
    assert listed.returncode == 0, listed.stderr
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


@pytest.mark.slow
def test_kills_leave_every_chain_of_bundles_unbroken_and_every_member_replays(tmp_path: Path) -> None:
    """kill -9 of engines, the learner and scoring at random moments, and six times of the sweep itself."""
    place, draw = tmp_path / "sweep", random.Random(0)
    axes = ["--over", "learner.rank=1,2", "--over", "seed=0,1", "--steps", "12", *SMALL]
    begin = ["sweep", TOML, *axes, "--check.prompts", "0", "--evaluate.prompts", "0", "--run-dir", str(place)]
    killed = []
    for _ in range(6):
        command = ["sweep", "--resume", str(place)] if (place / "sweep.toml").exists() else begin
        with subprocess.Popen(
            [sys.executable, "-m", "rlora", *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as sweep:  # fmt: skip
            for _ in range(2):  # an actor, which is replaced
                turns = len(whole_lines(place / "metrics.jsonl"))
                wait_for(lambda turns=turns: len(whole_lines(place / "metrics.jsonl")) > turns, sweep)
                time.sleep(draw.random() * 3)
                actors = [child for child in psutil.Process(sweep.pid).children(True) if "ray::" in child.name()]
                with suppress(psutil.NoSuchProcess):
                    killed.append((actor := draw.choice(actors)).name())
                    actor.kill()
            sweep.kill()
            sweep.communicate()
    assert len({*killed}) > 1, killed
    ended = rlora("sweep", "--resume", str(place))
    assert ended.returncode == 0, ended.stderr
    for name, fate in Diary(place).fates.items():
        assert fate.status == "finished"
        run = UPath(place / name)
        bundles = [checkpoint.read(checkpoint.bundle_path(run, number)) for number in checkpoint.versions(run)]
        assert [bundle.version for bundle in bundles] == [*range(13)]
        assert all(second.parent == first.adapter.digest for first, second in pairwise(bundles))
        replayed = rlora("replay", str(run))
        assert replayed.returncode == 0, replayed.stderr
        assert replayed.stdout.endswith("12 of 12 updates bit for bit\n")
