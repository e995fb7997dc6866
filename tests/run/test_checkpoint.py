import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ORIGIN, WEIGHTS, adapter, episode, group, write_provenance
from upath import UPath

from rlora.records import Adapter, Group, RloraError
from rlora.rollout.cursor import Cursor, InFlight
from rlora.run import checkpoint
from rlora.run.checkpoint import Bundle, BundleError, bundle_path
from rlora.store import write_directory


def write(run: UPath, bundle: Bundle) -> UPath:
    path = bundle_path(run, bundle.version)
    write_directory(path, bundle.files)
    return path


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> UPath:
    return UPath(tmp_path / "run") if request.param == "local" else UPath(f"memory://{tmp_path}/run")


def test_a_bundle_comes_back_as_it_was(run: UPath, bundle: Callable[..., Bundle], groups: list[Group]) -> None:
    played, scored = group([5], episode([6])), group([7], episode([8], 1.0))
    in_flight = (
        InFlight(9, 2, None),
        InFlight(10, 1, adapter(9), scored, True),
        InFlight(11, 2, adapter(10), played, False),
        InFlight(12, 2, adapter(10)),
    )
    written = bundle(11, cursor=Cursor(13, (3, 4), in_flight), parent="digest of version 10")
    read = checkpoint.read(write(run, written))
    assert read == written
    assert read.groups == groups
    assert json.loads((bundle_path(run, 11) / "bundle.json").read_text())["versions"] == {
        "9": adapter(9).digest,
        "10": adapter(10).digest,
    }


def test_what_is_not_kept_is_not_there(run: UPath, bundle: Callable[..., Bundle]) -> None:
    path = write(run, replace(bundle(1), update=None))
    assert checkpoint.read(path).groups is None
    assert {file.name for file in path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "state.safetensors", "bundle.json",
    }  # fmt: skip


def damage_by_truncation(path: UPath) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def damage_by_a_bit(path: UPath) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def damage_by_removal(path: UPath) -> None:
    path.unlink()


FILES = (
    "adapter_config.json", "adapter_model.safetensors", "state.safetensors", "update.parquet", "in_flight.parquet",
    "in_flight-1.safetensors", "bundle.json",
)  # fmt: skip


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_a_bit, damage_by_removal])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_bundle_is_skipped(
    damage: Callable[[UPath], None],
    name: str,
    run: UPath,
    bundle: Callable[..., Bundle],
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_flight = (InFlight(1, 1, adapter(1), group([7], episode([8], 1.0)), True),)
    write(run, bundle(1))
    path = write(run, bundle(2, cursor=Cursor(2, (), in_flight)))
    assert {file.name for file in path.iterdir()} == set(FILES)
    damage(path / name)
    with pytest.raises(BundleError, match=name):
        checkpoint.read(path)
    assert checkpoint.newest(run, ORIGIN) == bundle(1)
    warning = capsys.readouterr().err
    assert f"{path} is skipped" in warning
    assert name in warning


@pytest.mark.parametrize("flipped", [0xFF, 0x01, 0x10])
def test_every_byte_of_a_manifest_counts(flipped: int, run: UPath, bundle: Callable[..., Bundle]) -> None:
    path = write(run, bundle(1)) / "bundle.json"
    original = path.read_bytes()
    for index in range(0, len(original), 97):
        content = bytearray(original)
        content[index] ^= flipped
        path.write_bytes(bytes(content))
        if json_of(bytes(content)) != json_of(original):  # changes of white space are harmless
            with pytest.raises(BundleError):
                checkpoint.read(path.parent)


def json_of(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_incomplete_foreign_and_misnamed_bundles_are_skipped(
    run: UPath, bundle: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, bundle(1))
    write_directory(run / "bundles" / ".2.half", bundle(2).files)  # the machine died before the rename
    (run / "bundles" / "3").mkdir(parents=True)  # an incomplete upload to a store
    write_directory(bundle_path(run, 4), bundle(5).files)
    write(run, replace(bundle(6), origin=replace(ORIGIN, run="other", id="fedcba9876543210")))
    assert checkpoint.newest(run, ORIGIN) == bundle(1)
    warning = capsys.readouterr().err
    assert "belongs to a different run, other (fedcba9876543210)" in warning
    assert "from which `rlora train --fork` starts a new run" in warning
    assert "contains version 5, so its directory has the wrong name" in warning
    assert ".half" not in warning


def test_a_run_without_an_intact_bundle_does_not_silently_start_again(
    run: UPath, bundle: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint.newest(run, ORIGIN) is None  # nothing was saved yet
    damage_by_removal(write(run, bundle(1)) / "bundle.json")
    with pytest.raises(RloraError, match=r"none of its 1 bundles is intact.*restore a copy of a bundle, or start a"):
        checkpoint.newest(run, ORIGIN)


def test_a_run_whose_bundles_are_gone_does_not_silently_start_again(run: UPath) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    with pytest.raises(RloraError, match=r"metrics\.jsonl has 2 steps, but there is no bundle to resume from; restore"):
        checkpoint.newest(run, ORIGIN)


def test_a_store_that_does_not_answer_is_not_an_empty_one(
    run: UPath, bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, bundle(1))

    def failing(*_: object, **__: object) -> None:
        raise TimeoutError("the store does not answer")

    for owner, name in [(os, "listdir"), (type(run.fs), "ls"), (type(run.fs), "info")]:
        monkeypatch.setattr(owner, name, failing)
    with pytest.raises(TimeoutError):
        checkpoint.newest(run, ORIGIN)


def test_the_format_of_a_different_release_is_named(
    run: UPath, bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_FORMAT", 2)
    path = write(run, bundle(1))
    monkeypatch.undo()
    with pytest.raises(RloraError, match=r"format = 2; this release of rlora reads format 1"):
        checkpoint.newest(
            run, ORIGIN
        )  # a later release's bundle must not be skipped, because it would then be overwritten
    assert path.exists()


def test_a_bundle_that_can_not_be_read_now_is_not_skipped(
    run: UPath, bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run, bundle(1))
    path = write(run, bundle(2))
    read_bytes = type(path).read_bytes

    def failing(self: UPath) -> bytes:
        if self.name == "state.safetensors":
            raise TimeoutError("the store does not answer")
        content: bytes = read_bytes(self)
        return content

    monkeypatch.setattr(type(path), "read_bytes", failing)
    with pytest.raises(RloraError, match=r"can't be read \(the store does not answer\); try again, or move .* away"):
        checkpoint.newest(run, ORIGIN)


def test_prompts_in_flight_of_all_weights_are_sampled_again(run: UPath, bundle: Callable[..., Bundle]) -> None:
    """A bundle does not contain the model that sampled them, so their version would be unknown."""
    model = Adapter("run", 2, b"{}", WEIGHTS, full_weights=True)
    sent = InFlight(3, 1, replace(model, number=1), group([7], episode([8], 1.0)), scored=True)
    written = bundle(2, adapter=model, cursor=Cursor(4, (), (sent,)))
    assert checkpoint.read(write(run, written)).cursor.in_flight == (InFlight(3, 1),)


def test_a_version_is_read_by_its_number(tmp_path: Path, bundle: Callable[..., Bundle]) -> None:
    run = UPath(tmp_path)
    write_provenance(tmp_path)
    with pytest.raises(RloraError, match=r"there is no bundle yet; `rlora train --resume .*` starts the run again"):
        checkpoint.read_version(run)
    for version in (1, 2, 3, 5, 8, 9):
        write(run, bundle(version))
    assert checkpoint.read_version(run).version == 9
    assert checkpoint.read_version(run, 3) == bundle(3)
    with pytest.raises(
        RloraError, match=r"no bundle of version 4; use one of the versions 1 to 3, 5, 8 to 9 \(checkpoint"
    ):
        checkpoint.read_version(run, 4)
    shutil.rmtree(tmp_path / "bundles" / "9")
    damage_by_a_bit(bundle_path(run, 8) / "state.safetensors")
    assert checkpoint.read_version(run).version == 5
    with pytest.raises(BundleError, match=r"state\.safetensors: damaged: its digest"):
        checkpoint.read_version(run, 8)


def test_all_weights_are_a_bundle_too(run: UPath, bundle: Callable[..., Bundle]) -> None:
    written = bundle(1, adapter=Adapter("run", 1, b"{}", b"weights", full_weights=True))
    path = write(run, written)
    assert {"config.json", "model.safetensors"} < {file.name for file in path.iterdir()}
    assert checkpoint.read(path).adapter == written.adapter
