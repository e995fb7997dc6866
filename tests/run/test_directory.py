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
def path(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    """A local directory, and one at a URL."""
    return UPath(tmp_path) if request.param == "local" else UPath(f"memory://{tmp_path}")


def test_a_run_stores_its_provenance(path: UPath, config: Callable[..., Config], task: Task) -> None:
    directory.create(path / "run", config(), task, forked_from={"run": "other", "version": 3})
    text = (path / "run" / "config.toml").read_text()
    assert read(path / "run" / "config.toml") == config()
    for expected in ("chat_template_sha256", "torch = ", "prompts_dropped = 0", "cores"):
        assert expected in text
    origin = directory.Provenance.current(path / "run", task)
    assert origin == directory.Provenance.of(path / "run")
    assert origin.forked_from == {"run": "other", "version": 3}
    assert len(origin.id) == 16
    assert (origin.first, replace(origin, forked_from=None).first) == (3, 0)
    directory.update_config(path / "run", config(steps=7, learner={"start_from": "copy"}))
    updated = read(path / "run" / "config.toml")
    assert (updated.steps, updated.learner.start_from) == (7, "")  # the copy's path is not stored
    assert directory.Provenance.current(path / "run", task) == origin


def test_a_directory_that_is_not_empty_is_refused(path: UPath, config: Callable[..., Config], task: Task) -> None:
    run = path / "run"
    directory.create(run, config(), task)
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RloraError, match=r"--run-dir .*run: the directory is not empty; .*--resume.*--overwrite"):
        directory.create(run, config(), task)
    directory.create(run, config(), task, overwrite=True)
    assert not (run / "metrics.jsonl").exists()
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(RloraError, match="not empty"):  # not a run: --overwrite removes nothing
        directory.create(path, config(), task, overwrite=True)
    assert (path / "thesis.txt").exists()


def test_a_summary_grows(path: UPath) -> None:
    assert directory.summary(path) == {}
    directory.summarise(path, {"a": 1})
    directory.summarise(path, {"b": 2})
    assert directory.summary(path) == {"a": 1, "b": 2}


def test_requested_engines(tmp_path: Path) -> None:
    assert directory.requested_engines(UPath(tmp_path)) is None
    directory.request_engines(UPath(tmp_path), 3)
    assert directory.requested_engines(UPath(tmp_path)) == 3
    with pytest.raises(RloraError, match="in a local directory only"):
        directory.request_engines(UPath("memory://run"), 3)


LOCK = """
import sys, time
from upath import UPath
from rlora.run.directory import locked
with locked(UPath(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_process_trains_a_run_at_a_time_and_a_dead_one_holds_no_lock(tmp_path: Path) -> None:
    run = UPath(tmp_path)
    assert not directory.is_locked(run)
    other = subprocess.Popen([sys.executable, "-c", LOCK, str(run)], stdout=subprocess.PIPE, text=True)
    assert other.stdout
    with other:
        assert other.stdout.readline() == "locked\n"
        assert directory.is_locked(run)
        with (
            pytest.raises(RloraError, match=rf"process {other.pid} on .* is training in this directory; stop that"),
            directory.locked(run),
        ):
            pass
        other.kill()
    assert not directory.is_locked(run)
    with directory.locked(run):
        assert f"process {os.getpid()}" in (run / "lock").read_text()


def test_a_run_that_is_being_trained_is_not_overwritten(
    tmp_path: Path, config: Callable[..., Config], task: Task
) -> None:
    run = UPath(tmp_path / "run")
    directory.create(run, config(), task)
    with (
        directory.locked(run),
        pytest.raises(RloraError, match="a process is training this run; stop that process first"),
    ):
        directory.create(run, config(), task, overwrite=True)
    directory.create(run, config(), task, overwrite=True)


def test_a_directory_with_only_incomplete_files_counts_as_empty(
    tmp_path: Path, config: Callable[..., Config], task: Task
) -> None:
    (tmp_path / ".config.toml.half").write_text("killed in its fi")
    directory.create(UPath(tmp_path), config(), task)


def test_the_data_is_identified_by_prompts_answers_and_columns() -> None:
    prompt = Prompt("?", answer=4, token_ids=(1, 2), columns={"level": 1})
    changed = [replace(prompt, answer=5), replace(prompt, token_ids=(1,)), replace(prompt, columns={"level": 2})]
    data = [[prompt], *([item] for item in changed), [prompt, prompt]]
    assert len({directory.prompts_digest(prompts) for prompts in data}) == 5
    first, second = ([replace(prompt, answer=object())] for _ in range(2))
    assert directory.prompts_digest(first) == directory.prompts_digest(second)


def test_sampled_episodes_are_saved_when_a_reward_fails(path: UPath) -> None:
    failed = RewardError("reward: it raised", [group([1, 2], episode([3]), episode([4]))])
    with pytest.raises(RloraError, match=r"2 sampled episodes were saved to .*unscored\.jsonl"), \
         directory.saving_unscored(path):  # fmt: skip
        raise failed
    rows = [json.loads(line) for line in (path / "unscored.jsonl").read_text().splitlines()]
    assert [row["completion_ids"] for row in rows] == [[3], [4]]
    assert rows[0]["prompt"]["token_ids"] == [1, 2]
