"""`rlora train` from the start of a run to its export, and what it leaves of a failed or interrupted run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import SMALL, TOML, metrics, rlora
from conftest import ROOT, SHARED, exit_status
from transformers import AutoConfig

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("nothing_stays_behind")]


def interrupted(run: Path, number: signal.Signals, *arguments: str) -> tuple[int, str, str]:
    """Train, and send a signal once version 1 is saved. Returns the exit status, stdout and stderr."""
    heeding = "env", "--default-signal=INT"  # what a shell starts in the background ignores Ctrl-C, tests or not
    command = [*heeding, sys.executable, "-m", "rlora", "train", *arguments, "--run-dir", str(run)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while not (run / "bundles" / "1").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal's Ctrl-C goes to all of them
        else:
            process.send_signal(number)
        output, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert f"rlora train --resume {run}" in error
    last = max(int(path.name) for path in (run / "bundles").iterdir() if path.name.isdigit())
    assert len(metrics(run)) == last  # the step that was being saved is saved whole, its line with it
    return process.returncode, output, error


def test_a_short_run_goes_on_after_ctrl_c_raises_the_reward_and_can_be_forked_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    recipe = TOML, "--steps", "3", "--learner.lr", "1e-3", "--group-size", "4", "--evaluate.prompts", "20"
    status, output, _ = interrupted(run, signal.SIGINT, *recipe)
    assert status == 130
    assert "before training: accuracy" in output
    assert exit_status("train", TOML, "--run-dir", str(run)) == 1
    assert "not empty" in capsys.readouterr().err
    done = rlora("train", "--resume", str(run), "--steps", "5")
    assert done.returncode == 0, done.stderr
    assert "steps: 3 -> 5" in done.stdout
    lines = metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    rewards = [line["reward/mean"] for line in lines]
    assert rewards[-1] > rewards[0] + 0.15, rewards
    assert all(line["kl/behaviour"] < 0.01 and line["staleness"] == 0 for line in lines)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy/after"] > summary["accuracy/before"]
    assert summary["accuracy/prompts"] == 20
    assert summary["adapter/parameters"] == 305_280
    assert sorted(int(path.name) for path in (run / "bundles").iterdir()) == [0, 1, 2, 3, 4, 5]
    assert "step 5/5" in done.stdout
    for shown in ("accuracy before", str(summary["adapter/path"]), f"rlora eval {run}", "PeftModel"):
        assert shown in done.stdout.replace("\n", "")

    assert exit_status("train", "--resume", str(run), "--learner.lr", "1.0") == 1
    changed = capsys.readouterr()
    assert "learner.lr: 0.001 -> 1.0" in changed.out
    assert "set --steps to a larger number" in changed.err
    fork = tmp_path / "fork"
    changes = "--steps", "4", "--learner.lr", "1e-4", *SMALL
    assert exit_status("train", "--fork", f"{run}@3", "--run-dir", str(fork), *changes) == 0
    assert [line["lr"] for line in metrics(fork)] == [pytest.approx(1e-4 / 4)]
    assert exit_status("runs", str(tmp_path)) == 0
    listed = capsys.readouterr().out
    assert re.search(r"fork +finished +4/4 .* run@3 *\n", listed), listed
    assert re.search(r"run +finished +5/5 ", listed), listed

    assert exit_status("replay", str(run)) == 0
    assert capsys.readouterr().out.count("bit for bit; loss") == 5  # the update after the resume too

    assert exit_status("export", str(run), "--to", str(tmp_path / "merged"), "--merge") == 0
    merged = capsys.readouterr().out
    assert "version 5 merged in bfloat16" in merged
    assert "Rounding to bfloat16 loses that part: export with --dtype float32" in merged
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    export = "export", f"{run}@2", "--to", str(tmp_path / "adapter")
    assert exit_status(*export) == 0
    assert f"# {run.name}, version 2" in (tmp_path / "adapter" / "README.md").read_text()
    exported = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert exported == (run / "bundles" / "2" / "adapter_model.safetensors").read_bytes()
    assert exit_status(*export) == 1
    assert "it exists already" in capsys.readouterr().err


def test_gsm8k_goes_on_after_sigterm(tmp_path: Path) -> None:
    """A scheduler's signal, to the recipe with real data where they are."""
    run, options = tmp_path / "run", ("--env-args.path", str(SHARED / "data" / "gsm8k"), "--sampling.max-tokens", "64")
    recipe = ("launch/gsm8k.toml", *options) if SHARED.is_dir() else (TOML,)
    status, *_ = interrupted(run, signal.SIGTERM, *recipe, "--steps", "3", *SMALL)
    assert status == 143
    assert exit_status("train", "--resume", str(run)) == 0
    assert len(metrics(run)) == 3
    assert all(0 <= line["reward/mean"] <= 1 for line in metrics(run))
