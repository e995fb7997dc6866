"""kill -9 of a whole run: nothing that was sampled or evaluated is lost or done twice."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import SMALL, TOML, metrics, processes, rlora
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from upath import UPath

from rlora.config import read
from rlora.rollout.stream import prompt_at
from rlora.rollout.task import load_task
from rlora.run import checkpoint

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("nothing_stays_behind")]


def sampled_ahead(run: Path) -> bool:
    """Whether the newest bundle has groups that are not learned from yet."""
    there = checkpoint.versions(UPath(run))
    newest = checkpoint.read(checkpoint.bundle_path(UPath(run), there[-1])) if there else None
    return bool(newest and any(each.group for each in newest.cursor.in_flight))


def test_what_was_sampled_before_a_kill_is_learned_from_after_it(tmp_path: Path) -> None:
    """kill -9 while the next step's prompts are in flight: each prompt is learned from once, in its turn."""
    run, there = tmp_path / "run", processes()
    toml = "--max-staleness", "1", "--sampling.max-tokens", "12", "--evaluate.prompts", "0"
    toml += "--algorithm.name", "grpo", "--algorithm.epochs", "4"  # that updates take longer than sampling does
    command = [sys.executable, "-m", "rlora", "train", TOML, "--resume", str(run), "--steps", "8", *SMALL, *toml]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while not sampled_ahead(run):
            process.send_signal(signal.SIGCONT)
            time.sleep(0.05)
            process.send_signal(signal.SIGSTOP)  # so that no other bundle comes before the kill
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
    finally:
        process.kill()
        process.wait()
    while processes().keys() - there.keys():  # Ray ends them
        assert time.monotonic() < deadline
        time.sleep(0.5)
    left = Path(f"/dev/shm/rlora-{process.pid}")  # as an engine leaves it that is killed too, or one of an earlier run
    (left / "run-v1").mkdir(parents=True)
    before = checkpoint.read_version(UPath(run))
    assert before.cursor.in_flight  # prompts of the step after, under the version that they were sent under
    assert {each.adapter.number for each in before.cursor.in_flight if each.adapter} <= {before.version - 1}
    played = [each.group for each in before.cursor.in_flight if each.group]
    assert played
    done = rlora("train", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert f"starting from version {before.version}" in done.stdout
    assert not left.exists()

    config = read(run / "config.toml")
    prompts, learned = load_task(config).prompts, []
    for version in range(1, 9):
        groups = checkpoint.read_version(UPath(run), version).groups
        assert groups
        learned += groups
        if version > 1:  # the resumed run samples ahead as the one before did
            assert {episode.version.number for group in groups for episode in group.episodes} == {version - 2}
    taken = [group.prompt.token_ids for group in learned]
    assert taken == [prompt_at(prompts, place, config.seed).token_ids for place in range(len(taken))]
    ids = [[episode.completion_ids for episode in group.episodes] for group in learned]
    assert all([episode.completion_ids for episode in group.episodes] in ids for group in played)


def test_an_evaluation_that_a_kill_ended_is_done_again_and_once(tmp_path: Path) -> None:
    """kill -9 after version 2 was saved, while it answers the held-out prompts beside step 3. A tracker goes on too."""
    run, there = tmp_path / "run", processes()
    evaluate = "--evaluate.every", "2", "--evaluate.samples", "4", "--evaluate.prompts", "42"
    evaluate += "--evaluate.sets.easy.env-args.high", "3", "--evaluate.sets.easy.prompts", "5"
    evaluate += "--trackers.use", "tensorboard"
    command = [sys.executable, "-m", "rlora", "train", TOML, "--run-dir", str(run), "--steps", "5", *SMALL, *evaluate]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while not (run / "bundles" / "2").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # some of the 168 completions are there
    process.kill()
    process.wait()
    while processes().keys() - there.keys():  # Ray ends them
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert [line["accuracy/version"] for line in metrics(run) if "accuracy/version" in line] == [0]
    done = rlora("train", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    evaluated = [line for line in metrics(run) if "accuracy/version" in line]
    assert [line["accuracy/version"] for line in evaluated] == [0, 2, 4]
    for line in evaluated:
        for name in ("held_out", "easy"):
            low, accuracy, high = (line[f"accuracy/{name}{end}"] for end in ("/low", "", "/high"))
            assert low <= accuracy <= high
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy/version"] == 4
    assert summary["accuracy/easy/after"] <= 1
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("reward/mean", "accuracy/held_out"):
        told = [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        assert told == [(line["step"], line[name]) for line in metrics(run) if name in line]
