"""A sweep on real Ray and vLLM: members pause, continue and fork, one fails, and each replays bit for bit."""

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
from commands import TOML, rlora
from conftest import ROOT, exit_status
from upath import UPath

from rlora.run import checkpoint
from rlora.sweeps.diary import Diary, ask, complete_lines

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("nothing_stays_behind")]
FAILING = """
def sums(completion, answer, step):
    if step == 2:
        raise ValueError("fails in the third step")
    return float(str(answer) in completion)
"""


def wait_for(holds: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_members_pause_continue_and_fork_and_a_failing_one_affects_no_other(
    tmp_path: Path, small: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    path, reward = tmp_path / "sweep", tmp_path / "mine.py"
    reward.write_text(FAILING)
    axes = ["--over", "learner.rank=1,2", "--member", f"failing:reward={reward}:sums,evaluate.prompts=0"]
    command = ["sweep", TOML, *axes, "--steps", "12", *small, "--check.prompts", "0", "--run-dir", str(path)]
    with subprocess.Popen(
        [sys.executable, "-m", "rlora", *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as sweep:

        def has(event: str, member: str) -> Callable[[], bool]:
            return lambda: any(
                (line["event"], line.get("member")) == (event, member) for line in complete_lines(path / "sweep.jsonl")
            )

        wait_for(lambda: len(complete_lines(path / "metrics.jsonl")) >= 1, sweep)
        assert rlora("pause", str(path / "rank-2")).returncode == 0
        wait_for(has("paused", "rank-2"), sweep)
        ask(path, "fork", "rank-1", version=1, name="hotter", changes={"learner.lr": 1e-3})
        ask(path, "go", "rank-2")
        output, errors = sweep.communicate(timeout=600)
    assert sweep.returncode == 1, errors
    assert "mine.py:4: sums raised ValueError: fails in the third step" in errors
    assert errors.strip().endswith(f"`rlora sweep --resume {path}` continues them")
    assert "adapter slots per engine: 6, " in output
    statuses = {name: state.status for name, state in Diary(path).states.items()}
    assert statuses == {"rank-1": "finished", "rank-2": "finished", "hotter": "finished", "failing": "failed"}
    for name, updates in (("rank-1", 12), ("rank-2", 12), ("hotter", 11)):
        assert exit_status("replay", str(path / name)) == 0
        assert capsys.readouterr().out.endswith(f"{updates} of {updates} updates bit for bit\n")
        assert json.loads((path / name / "summary.json").read_text())["accuracy/after"] >= 0
    assert exit_status("runs", str(path)) == 0
    assert re.search(r"^ *failing +failed ", capsys.readouterr().out, re.MULTILINE)
    reward.write_text(FAILING.replace("step == 2", "False"))
    assert exit_status("sweep", "--resume", str(path)) == 0
    assert Diary(path).states["failing"].status == "finished"
    assert "best configuration " in capsys.readouterr().out
    assert exit_status("runs", str(path), "--plot", str(tmp_path / "sweep.png")) == 0
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


@pytest.mark.slow
def test_kills_leave_every_chain_of_bundles_unbroken_and_every_member_replays(
    tmp_path: Path, small: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 of engines, the learner and scoring at random moments, and six times of the sweep itself."""
    path, draw = tmp_path / "sweep", random.Random(0)
    axes = ["--over", "learner.rank=1,2", "--over", "seed=0,1", "--steps", "12", *small]
    begin = ["sweep", TOML, *axes, "--check.prompts", "0", "--evaluate.prompts", "0", "--run-dir", str(path)]
    killed = []
    for _ in range(6):
        command = ["sweep", "--resume", str(path)] if (path / "sweep.toml").exists() else begin
        with subprocess.Popen(
            [sys.executable, "-m", "rlora", *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as sweep:  # fmt: skip
            for _ in range(2):  # an actor, which is repathd
                turns = len(complete_lines(path / "metrics.jsonl"))
                wait_for(lambda turns=turns: len(complete_lines(path / "metrics.jsonl")) > turns, sweep)
                time.sleep(draw.random() * 3)
                actors = [child for child in psutil.Process(sweep.pid).children(True) if "ray::" in child.name()]
                with suppress(psutil.NoSuchProcess):
                    killed.append((actor := draw.choice(actors)).name())
                    actor.kill()
            sweep.kill()
            sweep.communicate()
    assert len({*killed}) > 1, killed
    ended = rlora("sweep", "--resume", str(path))
    assert ended.returncode == 0, ended.stderr
    for name, state in Diary(path).states.items():
        assert state.status == "finished"
        run = UPath(path / name)
        bundles = [checkpoint.read(checkpoint.bundle_path(run, number)) for number in checkpoint.versions(run)]
        assert [bundle.version for bundle in bundles] == [*range(13)]
        assert all(second.parent == first.adapter.digest for first, second in pairwise(bundles))
        assert exit_status("replay", str(run)) == 0
        assert capsys.readouterr().out.endswith("12 of 12 updates bit for bit\n")
