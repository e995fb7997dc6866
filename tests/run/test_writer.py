import json
import os
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import ORIGIN, adapter, episode, group
from upath import UPath

from rlora.records import Group, Prompt, RloraError, Version
from rlora.rollout.cursor import Cursor
from rlora.rollout.stream import Collection
from rlora.run import checkpoint, line_log, writer
from rlora.run.writer import CheckpointWriter
from rlora.settings import Config


@contextmanager
def full_disk() -> Iterator[None]:
    """Files can't grow beyond 20 bytes: a write fails halfway with an OSError, as on a full disk.

    This includes pytest's redirected output: print nothing within the context.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    return UPath(tmp_path / "run") if request.param == "local" else UPath(f"memory://{tmp_path}/run")


@pytest.fixture
def local(tmp_path: Path) -> UPath:
    return UPath(tmp_path / "run")


def open_writer(
    run: UPath, config: Callable[..., Config], start: checkpoint.Bundle | None = None, **settings: Any
) -> CheckpointWriter:
    run.mkdir(parents=True, exist_ok=True)
    return CheckpointWriter(run, config(checkpoint=settings), ORIGIN, start)


def collection(version: int, reward: float, groups: list[Group]) -> Collection:
    sampled = (group([1], replace(episode([2], reward), version=Version("run", version))),)
    return Collection(tuple(groups), sampled, 0.0, 0, 0)


def save(checkpoints: CheckpointWriter, version: int, groups: list[Group] | None = None, reward: float = 0.0) -> None:
    """Save as the step that made `version` does."""
    collected = collection(version - 1, reward, groups or [])
    line = json.dumps({"step": version - 1})
    checkpoints.save(adapter(version), b"state" * 100, Cursor(version), collected, line, line)


def steps(run: UPath) -> list[int]:
    """Steps in metrics.jsonl, which are those in weights.jsonl too."""
    metrics, weights = (
        [json.loads(line)["step"] for line in (run / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "weights.jsonl")
    )
    assert metrics == weights
    return metrics


def test_each_step_leaves_a_bundle_and_a_line(run: UPath, config: Callable[..., Config], groups: list[Group]) -> None:
    with open_writer(run, config) as checkpoints:
        for version in (1, 2, 3):
            save(checkpoints, version, groups)
    bundles = [checkpoint.read(checkpoint.bundle_path(run, version)) for version in (1, 2, 3)]
    assert [bundle.groups for bundle in bundles] == [groups] * 3
    assert [bundle.parent for bundle in bundles] == [None, adapter(1).digest, adapter(2).digest]
    rewards = [dict(bundle.rewards) for bundle in bundles]
    assert rewards == [{0: (0.0, 1)}, {1: (0.0, 1)}, {1: (0.0, 1), 2: (0.0, 1)}]  # only versions that have a bundle
    assert steps(run) == [0, 1, 2]
    assert checkpoints.saved
    assert checkpoints.saved.bytes == sum(path.stat().st_size for path in checkpoint.bundle_path(run, 3).iterdir())
    assert checkpoints.saved.seconds > 0


def test_a_resumed_run_repeats_steps_without_a_bundle(run: UPath, config: Callable[..., Config]) -> None:
    with open_writer(run, config) as checkpoints:
        for version in (1, 2, 3):
            save(checkpoints, version)
    for log in (run / "metrics.jsonl", run / "weights.jsonl"):
        log.write_text(log.read_text() + '{"step": 3, "rew')  # the process died while it wrote a line
    start = checkpoint.read(checkpoint.bundle_path(run, 2))
    with open_writer(run, config, start) as checkpoints:
        save(checkpoints, 3)
    assert steps(run) == [0, 1, 2]
    assert checkpoint.read(checkpoint.bundle_path(run, 3)).parent == adapter(2).digest


def kept(run: UPath) -> list[int]:
    return checkpoint.versions(run)


def test_what_is_kept(run: UPath, config: Callable[..., Config]) -> None:
    with open_writer(run, config, keep_last=2, keep_every=4, keep_best=1) as checkpoints:
        for version in range(1, 12):
            save(checkpoints, version, reward=1.0 if version == 7 else version / 100)
    assert kept(run) == [4, 6, 8, 10, 11]  # the episodes of version 6 had a reward of 1
    start = checkpoint.read(checkpoint.bundle_path(run, 11))
    with open_writer(run, config, start, keep_last=1, keep_every=0, keep_best=1) as checkpoints:
        save(checkpoints, 12)
    assert kept(run) == [6, 12]  # with the rewards that an earlier process saved


@pytest.mark.parametrize(("name", "figure", "best"), [("sft", "held_out/nll", 4), ("dpo", "held_out/accuracy", 6)])
def test_without_rewards_the_best_is_that_of_the_evaluations(
    name: str, figure: str, best: int, local: UPath, config: Callable[..., Config]
) -> None:
    local.mkdir()
    algorithm = {"name": name} | ({"kl": 0.1} if name == "dpo" else {})
    supervised = config(reward="", algorithm=algorithm, checkpoint={"keep_last": 1}, evaluate={"every": 2})
    with CheckpointWriter(local, supervised, ORIGIN, None) as checkpoints:
        for version in range(1, 10):
            evaluated = {"held_out/version": version - 1, figure: {2: 0.5, 4: 0.25, 6: 0.75, 8: 0.3}.get(version - 1)}
            line = json.dumps({"step": version - 1} | (evaluated if version % 2 else {}))
            checkpoints.save(adapter(version), b"state", Cursor(version), None, line, line)
    assert kept(local) == [best, 9]


def test_full_fine_tuning_keeps_two_versions(local: UPath, config: Callable[..., Config]) -> None:
    local.mkdir()
    full_finetuning = config(learner={"adapter": "none"})
    with CheckpointWriter(local, full_finetuning, ORIGIN, None) as checkpoints:
        for version in (0, 1, 2):
            save(checkpoints, version)
    assert kept(local) == [1, 2]


def test_a_version_s_episodes_may_arrive_in_several_steps(local: UPath, config: Callable[..., Config]) -> None:
    with open_writer(local, config, keep_last=3) as checkpoints:
        save(checkpoints, 1, reward=0.5)
        save(checkpoints, 2, reward=0.25)
        checkpoints.save(adapter(3), b"", Cursor(), collection(1, 0.75, []))
    assert checkpoint.read(checkpoint.bundle_path(local, 3)).rewards == {1: (1.0, 2)}


def test_bundles_above_the_newest_version_are_neither_counted_nor_removed(
    local: UPath, config: Callable[..., Config]
) -> None:
    """A damaged bundle that was skipped, or a foreign one."""
    (local / "bundles" / "50").mkdir(parents=True)
    with open_writer(local, config, keep_last=1, keep_best=0) as checkpoints:
        for version in (1, 2, 3):
            save(checkpoints, version)
    assert kept(local) == [3, 50]


def test_a_step_without_groups_has_an_empty_list_of_episodes(local: UPath, config: Callable[..., Config]) -> None:
    with open_writer(local, config) as checkpoints:
        checkpoints.save(adapter(0), b"", Cursor())
        save(checkpoints, 1, [])
    assert checkpoint.read(checkpoint.bundle_path(local, 0)).groups is None
    assert checkpoint.read(checkpoint.bundle_path(local, 1)).groups == []


def test_answers_without_a_json_form_become_text(local: UPath, config: Callable[..., Config]) -> None:
    circular: list[Any] = []
    circular.append(circular)
    odd = [replace(single_group(), prompt=Prompt("?", answer)) for answer in ({(1, 2): 3}, circular, object())]
    with open_writer(local, config) as checkpoints:
        save(checkpoints, 1, odd)
    read = checkpoint.read(checkpoint.bundle_path(local, 1)).groups
    assert read
    assert read[0].prompt.answer == "{(1, 2): 3}"


def single_group() -> Group:
    return group([1], episode([2], 1.0))


def test_a_thousand_steps_take_no_more_disk_than_a_hundred(local: UPath, config: Callable[..., Config]) -> None:
    sizes = []
    with open_writer(local, config, keep_last=5) as checkpoints:
        for version in range(1, 1001):
            save(checkpoints, version)
            if version % 100 == 0:
                checkpoints._wait()
                sizes.append(sum(path.stat().st_size for path in (local / "bundles").rglob("*") if path.is_file()))
    assert len(kept(local)) <= 6
    assert max(sizes) < 1.05 * min(sizes)  # version numbers get longer


def test_episodes_can_be_omitted_and_are_bounded(
    local: UPath, config: Callable[..., Config], groups: list[Group], capsys: pytest.CaptureFixture[str]
) -> None:
    with open_writer(local, config, episodes_mib=0) as checkpoints:
        save(checkpoints, 1, groups)
    assert checkpoint.read(checkpoint.bundle_path(local, 1)).groups is None
    noise = Random(0)
    large = [group([1], episode([2] * 200_000, logprobs=[-noise.random() for _ in range(200_000)]))]
    with open_writer(local, config, episodes_mib=1) as checkpoints:
        save(checkpoints, 2, large)
        save(checkpoints, 3, groups)
    assert checkpoint.read(checkpoint.bundle_path(local, 2)).groups is None
    assert checkpoint.read(checkpoint.bundle_path(local, 3)).groups == groups
    assert "checkpoint.episodes_mib = 1: the episodes of version 2 are not stored" in capsys.readouterr().err


def test_the_loop_waits_only_for_the_previous_bundle(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, write = threading.Event(), writer.write_directory

    def stuck(*arguments: Any) -> None:
        slow.wait(10)
        write(*arguments)

    monkeypatch.setattr(writer, "write_directory", stuck)
    with open_writer(local, config) as checkpoints:
        save(checkpoints, 1)  # returns though nothing is written yet
        assert kept(local) == []
        waiting = threading.Thread(target=save, args=(checkpoints, 2))
        waiting.start()
        time.sleep(0.2)
        assert waiting.is_alive()
        slow.set()
        waiting.join(10)
        assert not waiting.is_alive()
        assert kept(local)[0] == 1
    assert kept(local) == [1, 2]


def test_training_outlives_a_full_disk(
    local: UPath, config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    with open_writer(local, config) as checkpoints:
        save(checkpoints, 1)
        checkpoints._wait()
        with full_disk():
            for version in (2, 3):
                save(checkpoints, version)
            checkpoints._wait()
        assert kept(local) == [1]
        assert checkpoint.newest(local, ORIGIN)  # the last bundle is intact
        save(checkpoints, 4)
    assert kept(local) == [1, 4]
    assert steps(local) == [0, 1, 2, 3]  # no line is lost
    warnings = capsys.readouterr().err
    assert "metrics.jsonl could not be written" in warnings
    assert "NOT SAVED: version 2 could not be written to" in warnings
    assert "File too large" in warnings
    assert "NOT SAVED: version 3" in warnings
    assert "is writable again: version 4 is saved" in warnings
    assert sorted(path.name for path in (local / "bundles").iterdir()) == ["1", "4"]


def test_a_disk_that_stays_full_ends_the_run_with_its_last_version_saved_elsewhere(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(writer.tempfile, "tempdir", str(tmp_path))
    write = writer.write_directory

    def full(path: Path, files: Any) -> None:
        if path.is_relative_to(local):
            raise OSError(28, "No space left on device")
        write(path, files)

    monkeypatch.setattr(writer, "write_directory", full)

    def train() -> None:
        with open_writer(local, config, patience=0.3) as checkpoints:
            for version in range(1, 100):
                save(checkpoints, version)
                time.sleep(0.1)

    with pytest.raises(
        RloraError, match=r"could not be written there. It was saved to (.*): free disk space, move the"
    ) as ended:
        train()
    found = str(ended.value).partition("saved to ")[2].partition(": free")[0]
    bundle = checkpoint.read(UPath(found))
    assert 3 <= bundle.version < 20
    os.renames(found, checkpoint.bundle_path(local, bundle.version))
    assert checkpoint.newest(local, ORIGIN) == bundle  # as the message says


def test_a_disk_that_has_space_again_after_the_patience_is_used(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step tries to write before it gives up: a step may take longer than the patience."""
    write, full = writer.write_directory, True

    def now_and_then(*arguments: Any) -> None:
        if full:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(writer, "write_directory", now_and_then)
    with open_writer(local, config) as checkpoints:
        save(checkpoints, 1)
        checkpoints._wait()
        assert checkpoints._failing_since
        checkpoints._failing_since -= 10_000
        full = False
        save(checkpoints, 2)
    assert kept(local) == [2]


def test_at_its_end_a_run_reports_that_its_last_version_is_nowhere(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, files: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(writer, "write_directory", full)

    def train() -> None:
        with open_writer(local, config) as checkpoints:
            save(checkpoints, 1)

    with pytest.raises(RloraError, match=r"version 1 could not be written there, nor to a temporary directory"):
        train()


@contextmanager
def as_nobody(directory: Path) -> Iterator[None]:
    """Run without root's permissions, as owner of the directory."""
    if os.geteuid() != 0:
        yield
        return
    for path in (directory, *directory.rglob("*")):
        os.chown(path, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_training_outlives_a_read_only_directory(
    config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        run = UPath(directory) / "run"
        with open_writer(run, config) as checkpoints:
            save(checkpoints, 1)
            checkpoints._wait()
            with as_nobody(Path(directory)):
                (run / "bundles").chmod(0o500)
                save(checkpoints, 2)
                checkpoints._wait()
                assert kept(run) == [1]
                (run / "bundles").chmod(0o700)
                save(checkpoints, 3)
                checkpoints._wait()
        assert kept(run) == [1, 3]
        assert "Permission denied" in capsys.readouterr().err


def test_a_bundle_that_can_not_be_removed_does_not_keep_others(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remove = writer.remove

    def busy(path: Path) -> None:
        if path.name == "2":
            raise OSError(16, "Device or resource busy")
        remove(path)

    monkeypatch.setattr(writer, "remove", busy)
    with open_writer(local, config, keep_last=2, keep_best=0) as checkpoints:
        for version in range(1, 9):
            save(checkpoints, version)
    assert kept(local) == [2, 7, 8]
    assert capsys.readouterr().err.count("bundles/2 could not be removed ([Errno 16] Device or resource busy)") == 1


@pytest.fixture
def hanging(local: UPath, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[threading.Event]:
    """A disk that hangs until the event is set."""
    monkeypatch.setattr(writer.tempfile, "tempdir", str(tmp_path))
    write, answers = writer.write_directory, threading.Event()

    def hang(path: Path, files: Any) -> None:
        if path.is_relative_to(local) and path.name != "1":
            answers.wait()
        write(path, files)

    monkeypatch.setattr(writer, "write_directory", hang)
    yield answers
    answers.set()


@pytest.mark.parametrize("last", [2, 3])
def test_a_disk_that_hangs_ends_the_run_with_its_last_version_saved_elsewhere(
    last: int, local: UPath, config: Callable[..., Config], hanging: threading.Event, groups: list[Group],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """At the end of the run, or in the next step."""

    def train() -> None:
        with open_writer(local, config, patience=3) as checkpoints:
            for version in range(1, last + 1):
                save(checkpoints, version, groups)

    start = time.monotonic()
    with pytest.raises(
        RloraError, match=rf"version {last} could not be written there in time \(.*. It was saved to "
    ) as ended:
        train()
    assert 3 < time.monotonic() - start < 5.5  # the run waits once
    assert kept(local) == [1]
    found = Path(str(ended.value).partition("saved to ")[2].partition(": make")[0])
    assert checkpoint.read(UPath(found)).version == last
    assert checkpoint.read(UPath(found)).groups == groups
    assert capsys.readouterr().err.count("has not completed for ") == 10


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Handle Ctrl-C, which processes that a shell starts in the background ignore."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_wait_for_a_disk_after_the_first_warning_and_loses_nothing(
    local: UPath, config: Callable[..., Config], hanging: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(delay: float) -> None:
        with open_writer(local, config, patience=20) as checkpoints:
            save(checkpoints, 1)
            save(checkpoints, 2)
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
            raise KeyboardInterrupt

    start = time.monotonic()
    threading.Timer(1.0, hanging.set).start()
    with pytest.raises(KeyboardInterrupt):
        train(0.2)  # ignored: the disk may be slow
    assert kept(local) == [1, 2]
    assert "NOT SAVED" not in capsys.readouterr().err
    hanging.clear()
    with pytest.raises(KeyboardInterrupt):
        train(3.0)
    assert time.monotonic() - start < 15
    warnings = capsys.readouterr().err
    assert "version 2 could not be written there in time (checkpoint.patience = 20 s). It was saved to" in warnings


def test_a_disk_that_hangs_at_a_line_loses_no_episodes(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, groups: list[Group]
) -> None:
    monkeypatch.setattr(writer.tempfile, "tempdir", str(tmp_path))
    answers = threading.Event()
    monkeypatch.setattr(line_log.os, "fsync", lambda _: answers.wait())

    def train() -> None:
        with open_writer(local, config, patience=1) as checkpoints:
            save(checkpoints, 1, groups)

    monkeypatch.setattr(writer, "write_directory", unsynced)
    for module in (writer, line_log):
        monkeypatch.setattr(module, "write_file", lambda path, content: path.write_bytes(content))
    with pytest.raises(RloraError, match=r"version 1 could not be written there in time") as ended:
        train()
    answers.set()
    found = Path(str(ended.value).partition("saved to ")[2].partition(": make")[0])
    assert checkpoint.read(UPath(found)).groups == groups
    assert found.with_name("metrics.jsonl").read_text() == '{"step": 0}\n'


def unsynced(path: Path, files: dict[str, bytes]) -> None:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)


def test_unwritten_lines_are_saved_elsewhere_too(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(writer.tempfile, "tempdir", str(tmp_path))

    def train() -> None:
        with open_writer(local, config) as checkpoints:
            save(checkpoints, 1)
            checkpoints._wait()
            for name in ("bundles", "metrics.jsonl"):  # a disk that was removed
                writer.remove(local / name)
            local.joinpath("bundles").write_text("no directory")
            save(checkpoints, 2)

    with pytest.raises(RloraError, match=r"First append its last lines, .*/metrics\.jsonl, to .*metrics\.jsonl"):
        train()
    (found,) = tmp_path.glob("rlora-run-*/metrics.jsonl")
    assert found.read_text() == '{"step": 1}\n'
