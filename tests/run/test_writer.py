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

from rlora.records import Cursor, Group, Prompt, RloraError, Version
from rlora.rollout.stream import Collection
from rlora.run import checkpoint, writer
from rlora.run.writer import CheckpointWriter
from rlora.settings import Config


@contextmanager
def full_disk() -> Iterator[None]:
    """Files can't grow beyond 20 bytes: a write stops in its middle with an OSError, as on a full disk.

    That holds for every file of the process, pytest's redirected output too: print nothing within it.
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


def saver(
    run: UPath, config: Callable[..., Config], start: checkpoint.Bundle | None = None, **settings: Any
) -> CheckpointWriter:
    run.mkdir(parents=True, exist_ok=True)
    return CheckpointWriter(run, config(checkpoint=settings), ORIGIN, start)


def collection(version: int, reward: float, groups: list[Group]) -> Collection:
    sampled = (group([1], replace(episode([2], reward), version=Version("run", version))),)
    return Collection(tuple(groups), sampled, 0.0, 0, 0)


def save(saver: CheckpointWriter, version: int, groups: list[Group] | None = None, reward: float = 0.0) -> None:
    """What a step does that made `version`."""
    of = collection(version - 1, reward, groups or [])
    saver.save(adapter(version), b"state" * 100, Cursor(version), of, json.dumps({"step": version - 1}))


def steps(run: UPath) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_each_step_leaves_a_bundle_and_a_line(run: UPath, config: Callable[..., Config], groups: list[Group]) -> None:
    with saver(run, config) as keeping:
        for version in (1, 2, 3):
            save(keeping, version, groups)
    bundles = [checkpoint.read(checkpoint.bundle_path(run, version)) for version in (1, 2, 3)]
    assert [bundle.groups for bundle in bundles] == [groups] * 3
    assert [bundle.parent for bundle in bundles] == [None, adapter(1).digest, adapter(2).digest]
    rewards = [dict(bundle.rewards) for bundle in bundles]
    assert rewards == [{0: (0.0, 1)}, {1: (0.0, 1)}, {1: (0.0, 1), 2: (0.0, 1)}]  # of versions that have a bundle
    assert steps(run) == [0, 1, 2]
    assert keeping.saved
    assert keeping.saved.bytes == sum(path.stat().st_size for path in checkpoint.bundle_path(run, 3).iterdir())
    assert keeping.saved.seconds > 0


def test_a_resumed_run_does_its_steps_again(run: UPath, config: Callable[..., Config]) -> None:
    with saver(run, config) as keeping:
        for version in (1, 2, 3):
            save(keeping, version)
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "rew')  # it died in the middle of a line
    start = checkpoint.read(checkpoint.bundle_path(run, 2))
    with saver(run, config, start) as keeping:
        save(keeping, 3)
    assert steps(run) == [0, 1, 2]
    assert checkpoint.read(checkpoint.bundle_path(run, 3)).parent == adapter(2).digest


def kept(run: UPath) -> list[int]:
    return checkpoint.versions(run)


def test_what_is_kept(run: UPath, config: Callable[..., Config]) -> None:
    with saver(run, config, keep_last=2, keep_every=4, keep_best=1) as keeping:
        for version in range(1, 12):
            save(keeping, version, reward=1.0 if version == 7 else version / 100)
    assert kept(run) == [4, 6, 8, 10, 11]  # what version 6 sampled had the reward of 1
    start = checkpoint.read(checkpoint.bundle_path(run, 11))
    with saver(run, config, start, keep_last=1, keep_every=0, keep_best=1) as keeping:
        save(keeping, 12)
    assert kept(run) == [6, 12]  # also by what an earlier process learned of it


def test_of_all_weights_two_versions_are_kept(local: UPath, config: Callable[..., Config]) -> None:
    local.mkdir()
    whole = config(learner={"adapter": "none"})
    with CheckpointWriter(local, whole, ORIGIN, None) as keeping:
        for version in (0, 1, 2):
            save(keeping, version)
    assert kept(local) == [1, 2]


def test_a_version_s_episodes_may_come_in_several_steps(local: UPath, config: Callable[..., Config]) -> None:
    with saver(local, config, keep_last=3) as keeping:
        save(keeping, 1, reward=0.5)
        save(keeping, 2, reward=0.25)
        keeping.save(adapter(3), b"", Cursor(), collection(1, 0.75, []))
    assert checkpoint.read(checkpoint.bundle_path(local, 3)).rewards == {1: (1.0, 2)}


def test_what_lies_above_the_newest_version_is_neither_counted_nor_removed(
    local: UPath, config: Callable[..., Config]
) -> None:
    """A damaged bundle that was passed over, or a stranger."""
    (local / "bundles" / "50").mkdir(parents=True)
    with saver(local, config, keep_last=1, keep_best=0) as keeping:
        for version in (1, 2, 3):
            save(keeping, version)
    assert kept(local) == [3, 50]


def test_a_step_that_learned_from_no_group_has_its_episodes_too(local: UPath, config: Callable[..., Config]) -> None:
    with saver(local, config) as keeping:
        keeping.save(adapter(0), b"", Cursor())
        save(keeping, 1, [])
    assert checkpoint.read(checkpoint.bundle_path(local, 0)).groups is None
    assert checkpoint.read(checkpoint.bundle_path(local, 1)).groups == []


def test_answers_of_any_kind_are_kept_as_far_as_they_go(local: UPath, config: Callable[..., Config]) -> None:
    circle: list[Any] = []
    circle.append(circle)
    odd = [replace(groups_of_one(), prompt=Prompt("?", answer)) for answer in ({(1, 2): 3}, circle, object())]
    with saver(local, config) as keeping:
        save(keeping, 1, odd)
    read = checkpoint.read(checkpoint.bundle_path(local, 1)).groups
    assert read
    assert read[0].prompt.answer == "{(1, 2): 3}"


def groups_of_one() -> Group:
    return group([1], episode([2], 1.0))


def test_a_thousand_steps_take_no_more_disk_than_a_hundred(local: UPath, config: Callable[..., Config]) -> None:
    sizes = []
    with saver(local, config, keep_last=5) as keeping:
        for version in range(1, 1001):
            save(keeping, version)
            if version % 100 == 0:
                keeping._wait()
                sizes.append(sum(path.stat().st_size for path in (local / "bundles").rglob("*") if path.is_file()))
    assert len(kept(local)) <= 6
    assert max(sizes) < 1.05 * min(sizes)  # numbers grow longer


def test_episodes_can_be_left_out_and_are_bounded(
    local: UPath, config: Callable[..., Config], groups: list[Group], capsys: pytest.CaptureFixture[str]
) -> None:
    with saver(local, config, episodes_mib=0) as keeping:
        save(keeping, 1, groups)
    assert checkpoint.read(checkpoint.bundle_path(local, 1)).groups is None
    noise = Random(0)
    large = [group([1], episode([2] * 200_000, logprobs=[-noise.random() for _ in range(200_000)]))]
    with saver(local, config, episodes_mib=1) as keeping:
        save(keeping, 2, large)
        save(keeping, 3, groups)
    assert checkpoint.read(checkpoint.bundle_path(local, 2)).groups is None
    assert checkpoint.read(checkpoint.bundle_path(local, 3)).groups == groups
    assert "checkpoint.episodes_mib = 1: the episodes of version 2 are not kept" in capsys.readouterr().err


def test_the_loop_waits_for_the_bundle_before_and_for_no_more(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, write = threading.Event(), writer.write_directory

    def stuck(*arguments: Any) -> None:
        slow.wait(10)
        write(*arguments)

    monkeypatch.setattr(writer, "write_directory", stuck)
    with saver(local, config) as keeping:
        save(keeping, 1)  # returns though nothing is written yet
        assert kept(local) == []
        waiting = threading.Thread(target=save, args=(keeping, 2))
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
    with saver(local, config) as keeping:
        save(keeping, 1)
        keeping._wait()
        with full_disk():
            for version in (2, 3):
                save(keeping, version)
            keeping._wait()
        assert kept(local) == [1]
        assert checkpoint.newest(local, ORIGIN)  # the last one is whole
        save(keeping, 4)
    assert kept(local) == [1, 4]
    assert steps(local) == [0, 1, 2, 3]  # no line is lost
    said = capsys.readouterr().err
    assert "metrics.jsonl could not be written" in said
    assert "NOT SAVED: version 2 could not be written to" in said
    assert "File too large" in said
    assert "NOT SAVED: version 3" in said
    assert "takes bundles again: version 4 is saved" in said
    assert sorted(path.name for path in (local / "bundles").iterdir()) == ["1", "4"]


def test_a_disk_that_stays_full_ends_the_run_with_its_last_version_elsewhere(
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
        with saver(local, config, patience=0.3) as keeping:
            for version in range(1, 100):
                save(keeping, version)
                time.sleep(0.1)

    with pytest.raises(
        RloraError, match=r"could not be written there. It is kept in (.*): make room, move it"
    ) as ended:
        train()
    found = str(ended.value).partition("kept in ")[2].partition(": make")[0]
    bundle = checkpoint.read(UPath(found))
    assert 3 <= bundle.version < 20
    os.renames(found, checkpoint.bundle_path(local, bundle.version))
    assert checkpoint.newest(local, ORIGIN) == bundle  # as the message says


def test_a_disk_that_has_room_again_after_its_time_is_taken(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over at the next step, and that one is tried first: it may be a long one."""
    write, full = writer.write_directory, True

    def now_and_then(*arguments: Any) -> None:
        if full:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(writer, "write_directory", now_and_then)
    with saver(local, config) as keeping:
        save(keeping, 1)
        keeping._wait()
        assert keeping._failing_since
        keeping._failing_since -= 10_000
        full = False
        save(keeping, 2)
    assert kept(local) == [2]


def test_at_its_end_a_run_has_its_last_version_somewhere(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, files: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(writer, "write_directory", full)

    def train() -> None:
        with saver(local, config) as keeping:
            save(keeping, 1)

    with pytest.raises(RloraError, match=r"version 1 could not be written there, nor to a temporary directory"):
        train()


@contextmanager
def as_nobody(directory: Path) -> Iterator[None]:
    """Without root's right to write anywhere, in a directory of one's own."""
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
        with saver(run, config) as keeping:
            save(keeping, 1)
            keeping._wait()
            with as_nobody(Path(directory)):
                (run / "bundles").chmod(0o500)
                save(keeping, 2)
                keeping._wait()
                assert kept(run) == [1]
                (run / "bundles").chmod(0o700)
                save(keeping, 3)
                keeping._wait()
        assert kept(run) == [1, 3]
        assert "Permission denied" in capsys.readouterr().err


def test_a_bundle_that_can_not_be_removed_keeps_no_other_from_it(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remove = writer.remove

    def busy(path: Path) -> None:
        if path.name == "2":
            raise OSError(16, "Device or resource busy")
        remove(path)

    monkeypatch.setattr(writer, "remove", busy)
    with saver(local, config, keep_last=2, keep_best=0) as keeping:
        for version in range(1, 9):
            save(keeping, version)
    assert kept(local) == [2, 7, 8]
    assert capsys.readouterr().err.count("bundles/2 could not be removed ([Errno 16] Device or resource busy)") == 1


@pytest.fixture
def hanging(local: UPath, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[threading.Event]:
    """A disk that does not answer, until the event is set."""
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
def test_a_disk_that_does_not_answer_ends_the_run_with_its_last_version_elsewhere(
    last: int, local: UPath, config: Callable[..., Config], hanging: threading.Event, groups: list[Group],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """At the end, or in the step after."""

    def train() -> None:
        with saver(local, config, patience=3) as keeping:
            for version in range(1, last + 1):
                save(keeping, version, groups)

    start = time.monotonic()
    with pytest.raises(
        RloraError, match=rf"version {last} could not be written there in time \(.*. It is kept in "
    ) as ended:
        train()
    assert 3 < time.monotonic() - start < 5.5  # it is waited for once
    assert kept(local) == [1]
    found = Path(str(ended.value).partition("kept in ")[2].partition(": see")[0])
    assert checkpoint.read(UPath(found)).version == last
    assert checkpoint.read(UPath(found)).groups == groups
    assert capsys.readouterr().err.count("has not taken what is being written to it for ") == 10


@pytest.fixture
def heeding() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C, tests or not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding")
def test_an_interrupt_ends_the_wait_for_a_disk_once_that_is_told_of_and_loses_nothing(
    local: UPath, config: Callable[..., Config], hanging: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(after: float) -> None:
        with saver(local, config, patience=20) as keeping:
            save(keeping, 1)
            save(keeping, 2)
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
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
    said = capsys.readouterr().err
    assert "version 2 could not be written there in time (checkpoint.patience = 20 s). It is kept in" in said


def test_a_disk_that_hangs_at_a_line_costs_no_episodes(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, groups: list[Group]
) -> None:
    monkeypatch.setattr(writer.tempfile, "tempdir", str(tmp_path))
    answers = threading.Event()
    monkeypatch.setattr(writer.os, "fsync", lambda _: answers.wait())

    def train() -> None:
        with saver(local, config, patience=1) as keeping:
            save(keeping, 1, groups)

    monkeypatch.setattr(writer, "write_directory", unsynced)
    monkeypatch.setattr(writer, "write_file", lambda path, content: path.write_bytes(content))
    with pytest.raises(RloraError, match=r"version 1 could not be written there in time") as ended:
        train()
    answers.set()
    found = Path(str(ended.value).partition("kept in ")[2].partition(": see")[0])
    assert checkpoint.read(UPath(found)).groups == groups
    assert found.with_name("metrics.jsonl").read_text() == '{"step": 0}\n'


def unsynced(path: Path, files: dict[str, bytes]) -> None:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)


def test_the_lines_that_were_not_written_are_put_elsewhere_too(
    local: UPath, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(writer.tempfile, "tempdir", str(tmp_path))

    def train() -> None:
        with saver(local, config) as keeping:
            save(keeping, 1)
            keeping._wait()
            for name in ("bundles", "metrics.jsonl"):  # a disk that was taken away
                writer.remove(local / name)
            local.joinpath("bundles").write_text("no directory")
            save(keeping, 2)

    with pytest.raises(RloraError, match=r"First append its last lines, .*/metrics\.jsonl, to .*metrics\.jsonl"):
        train()
    (found,) = tmp_path.glob("rlora-run-*/metrics.jsonl")
    assert found.read_text() == '{"step": 1}\n'
