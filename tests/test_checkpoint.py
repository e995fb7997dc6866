import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import episode, group

from rlora import checkpoint
from rlora.config import Config, read
from rlora.records import Adapter, RewardError, RloraError
from rlora.task import Task, load_task

OLD, NEW = Adapter("run", 1, b"{}", b"old" * 1000), Adapter("run", 2, b"{}", b"new" * 1000)


@contextmanager
def full_disk() -> Iterator[None]:
    """Files can't grow beyond 1,000 bytes: a write stops in its middle with an OSError, as on a full disk.

    That holds for every file of the process, pytest's redirected output too: print nothing within it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_of_all_weights_only_the_last_version_is_kept(tmp_path: Path) -> None:
    for version in (0, 1, 2):
        weights = Adapter("run", version, b"{}", bytes([version]) * 100, whole=True)
        checkpoint.save(tmp_path, weights, b"state")
        read = checkpoint.read_adapter(tmp_path)
        assert (read.version, read.weights, read.whole) == (version, weights.weights, True)
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["2"]
    assert {path.name for path in checkpoint.adapter_path(tmp_path, 2).iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_a_full_disk_leaves_the_last_version_whole(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, OLD, b"old state" * 1000)
    with pytest.raises(RloraError, match=r"version 2 could not be written \(.*too large\); make room"), full_disk():
        checkpoint.save(tmp_path, NEW, b"new state" * 1000)
    assert checkpoint.last_version(tmp_path) == 1
    assert checkpoint.read_adapter(tmp_path, 1).weights == OLD.weights
    assert (tmp_path / "state.safetensors").read_bytes() == b"old state" * 1000
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "1", "adapter_config.json", "adapter_model.safetensors", "adapters", "cursor.json", "state.safetensors",
    ]  # fmt: skip


def test_saving_a_version_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, OLD, b"")
    checkpoint.save(tmp_path, Adapter("run", 1, b"{}", b"again"), b"")
    assert checkpoint.read_adapter(tmp_path, 1).weights == b"again"
    with pytest.raises(RloraError, match="no adapter of version 9; the last one is 1"):
        checkpoint.read_adapter(tmp_path, 9)


@pytest.fixture
def task(config: Callable[..., Config]) -> Task:
    return load_task(config())


def test_a_run_says_what_made_it(tmp_path: Path, config: Callable[..., Config], task: Task) -> None:
    checkpoint.create(tmp_path / "run", config(), task)
    text = (tmp_path / "run" / "config.toml").read_text()
    assert read(tmp_path / "run" / "config.toml") == config()
    for expected in ("chat_template_sha256", "torch = ", "prompts_dropped = 0"):
        assert expected in text


def test_a_directory_that_holds_something_is_refused(tmp_path: Path, config: Callable[..., Config], task: Task) -> None:
    run = tmp_path / "run"
    checkpoint.create(run, config(), task)
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RloraError, match=r"--run-dir .*run: it is not empty; .*--resume.*--overwrite"):
        checkpoint.create(run, config(), task)
    checkpoint.create(run, config(), task, overwrite=True)
    assert not (run / "metrics.jsonl").exists()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RloraError, match="not empty"):  # not a run: --overwrite removes nothing
        checkpoint.create(tmp_path, config(), task, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_a_run_goes_on_from_its_own_copy_of_what_it_started_from(tmp_path: Path, config: Callable[..., Config]) -> None:
    given = config(learner={"start_from": "gone"})
    assert checkpoint.with_own_start(tmp_path, given) == given  # it died before version 0 was saved
    checkpoint.save(tmp_path, Adapter("run", 0, b"{}", b""), b"")
    assert checkpoint.with_own_start(tmp_path, given).learner.start_from == str(tmp_path / "adapters" / "0")
    assert checkpoint.with_own_start(tmp_path, config()) == config()


def test_what_was_sampled_is_kept_when_a_reward_fails(tmp_path: Path) -> None:
    failed = RewardError("reward: it raised", [group([1, 2], episode([3]), episode([4]))])
    with pytest.raises(RloraError, match=r"2 sampled episodes are kept in .*unscored\.jsonl"), \
         checkpoint.keeping_unscored(tmp_path):  # fmt: skip
        raise failed
    rows = [json.loads(line) for line in (tmp_path / "unscored.jsonl").read_text().splitlines()]
    assert [row["completion_ids"] for row in rows] == [[3], [4]]
    assert rows[0]["prompt"]["token_ids"] == [1, 2]
