import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import episode, group
from upath import UPath

from rlora.config import read
from rlora.records import Prompt, RewardError, RloraError
from rlora.rollout.task import Task, load_task
from rlora.run import directory
from rlora.settings import Config


@pytest.fixture
def task(config: Callable[..., Config]) -> Task:
    return load_task(config())


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    """A directory of this machine, and one behind a URL."""
    return UPath(tmp_path) if request.param == "local" else UPath(f"memory://{tmp_path}")


def test_a_run_says_what_made_it(place: UPath, config: Callable[..., Config], task: Task) -> None:
    directory.create(place / "run", config(), task, forked_from={"run": "other", "version": 3})
    text = (place / "run" / "config.toml").read_text()
    assert read(place / "run" / "config.toml") == config()
    for expected in ("chat_template_sha256", "torch = ", "prompts_dropped = 0", "cores"):
        assert expected in text
    origin = directory.Provenance.here(place / "run", task)
    assert origin == directory.Provenance.of(place / "run")
    assert origin.forked_from == {"run": "other", "version": 3}
    assert len(origin.id) == 16
    assert (origin.first, replace(origin, forked_from=None).first) == (3, 0)
    directory.keep_config(place / "run", config(steps=7, learner={"start_from": "its own copy"}))
    kept = read(place / "run" / "config.toml")
    assert (kept.steps, kept.learner.start_from) == (7, "")  # where the copy lies is no setting
    assert directory.Provenance.here(place / "run", task) == origin


def test_a_directory_that_holds_something_is_refused(place: UPath, config: Callable[..., Config], task: Task) -> None:
    run = place / "run"
    directory.create(run, config(), task)
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RloraError, match=r"--run-dir .*run: it is not empty; .*--resume.*--overwrite"):
        directory.create(run, config(), task)
    directory.create(run, config(), task, overwrite=True)
    assert not (run / "metrics.jsonl").exists()
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(RloraError, match="not empty"):  # not a run: --overwrite removes nothing
        directory.create(place, config(), task, overwrite=True)
    assert (place / "thesis.txt").exists()


def test_a_summary_grows(place: UPath) -> None:
    assert directory.summary(place) == {}
    directory.summarise(place, {"a": 1})
    directory.summarise(place, {"b": 2})
    assert directory.summary(place) == {"a": 1, "b": 2}


def test_engines_that_were_asked_for(tmp_path: Path) -> None:
    assert directory.wanted_engines(UPath(tmp_path)) is None
    directory.ask_for_engines(UPath(tmp_path), 3)
    assert directory.wanted_engines(UPath(tmp_path)) == 3
    with pytest.raises(RloraError, match="in a local directory only"):
        directory.ask_for_engines(UPath("memory://run"), 3)


HOLD = """
import sys, time
from upath import UPath
from rlora.run.directory import held
with held(UPath(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_trains_a_run_at_a_time_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    run = UPath(tmp_path)
    assert not directory.is_held(run)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert other.stdout
    with other:
        assert other.stdout.readline() == "held\n"
        assert directory.is_held(run)
        with (
            pytest.raises(RloraError, match=rf"process {other.pid} on .* trains it; end that one first"),
            directory.held(run),
        ):
            pass
        other.kill()
    assert not directory.is_held(run)
    with directory.held(run):
        assert f"process {os.getpid()}" in (run / "lock").read_text()


def test_a_run_that_is_being_trained_is_not_overwritten(
    tmp_path: Path, config: Callable[..., Config], task: Task
) -> None:
    run = UPath(tmp_path / "run")
    directory.create(run, config(), task)
    with (
        directory.held(run),
        pytest.raises(RloraError, match="a process trains the run that is there; end that one first"),
    ):
        directory.create(run, config(), task, overwrite=True)
    directory.create(run, config(), task, overwrite=True)


def test_a_directory_in_which_nothing_was_written_yet_is_empty(
    tmp_path: Path, config: Callable[..., Config], task: Task
) -> None:
    (tmp_path / ".config.toml.half").write_text("killed in its fi")
    directory.create(UPath(tmp_path), config(), task)


def test_the_data_is_known_by_prompts_answers_and_columns() -> None:
    prompt = Prompt("?", answer=4, token_ids=(1, 2), columns={"level": 1})
    changed = [replace(prompt, answer=5), replace(prompt, token_ids=(1,)), replace(prompt, columns={"level": 2})]
    digests = {directory.digest_of([each]) for each in (prompt, *changed)} | {directory.digest_of([prompt, prompt])}
    assert len(digests) == 5
    assert directory.digest_of([replace(prompt, answer=object())]) == directory.digest_of(
        [replace(prompt, answer=object())]
    )


def test_what_was_sampled_is_kept_when_a_reward_fails(place: UPath) -> None:
    failed = RewardError("reward: it raised", [group([1, 2], episode([3]), episode([4]))])
    with pytest.raises(RloraError, match=r"2 sampled episodes are kept in .*unscored\.jsonl"), \
         directory.keeping_unscored(place):  # fmt: skip
        raise failed
    rows = [json.loads(line) for line in (place / "unscored.jsonl").read_text().splitlines()]
    assert [row["completion_ids"] for row in rows] == [[3], [4]]
    assert rows[0]["prompt"]["token_ids"] == [1, 2]
