import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import episode, group
from upath import UPath

from rlora import checkpoint, episodes
from rlora.checkpoint import Bundle, BundleError, bundle_path
from rlora.config import Config
from rlora.records import Adapter, Cursor, Group, InFlight, RloraError
from rlora.runs import Origin
from rlora.storage import write_directory

ORIGIN = Origin("run", "0123456789abcdef", "prompts", {"torch": "2"}, "a machine")
WEIGHTS = (2).to_bytes(8, "little") + b"{}"


def adapter(version: int) -> Adapter:
    return Adapter("run", version, b"{}", WEIGHTS + version.to_bytes(2, "little") * 50)


@pytest.fixture
def bundle(config: Callable[..., Config], groups: list[Group]) -> Callable[..., Bundle]:
    def make(version: int, **changes: Any) -> Bundle:
        made = Bundle(ORIGIN, adapter(version), b"state" * version, Cursor(version), config())
        return replace(made, update=episodes.encode(groups), rewards={version - 1: 0.5}, **changes)

    return make


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
    before = bundle(11, cursor=Cursor(13, (3, 4), in_flight), parent="the digest before")
    after = checkpoint.read(write(run, before))
    assert after == before
    assert after.groups == groups
    assert json.loads((bundle_path(run, 11) / "bundle.json").read_text())["versions"] == {
        "9": adapter(9).digest,
        "10": adapter(10).digest,
    }


def test_what_is_not_kept_is_not_there(run: UPath, bundle: Callable[..., Bundle]) -> None:
    path = write(run, replace(bundle(1), update=None))
    assert checkpoint.read(path).groups is None
    assert {each.name for each in path.iterdir()} == {
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
def test_a_damaged_bundle_is_passed_over(
    damage: Callable[[UPath], None],
    name: str,
    run: UPath,
    bundle: Callable[..., Bundle],
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_flight = (InFlight(1, 1, adapter(1), group([7], episode([8], 1.0)), True),)
    write(run, bundle(1))
    path = write(run, bundle(2, cursor=Cursor(2, (), in_flight)))
    assert {each.name for each in path.iterdir()} == set(FILES)
    damage(path / name)
    with pytest.raises(BundleError, match=name):
        checkpoint.read(path)
    found = checkpoint.newest(run, ORIGIN)
    assert found == bundle(1)
    said = capsys.readouterr().err
    assert f"{path} is passed over" in said
    assert name in said


@pytest.mark.parametrize("flipped", [0xFF, 0x01, 0x10])
def test_every_byte_of_a_manifest_counts(flipped: int, run: UPath, bundle: Callable[..., Bundle]) -> None:
    path = write(run, bundle(1)) / "bundle.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        content = bytearray(whole)
        content[place] ^= flipped
        path.write_bytes(bytes(content))
        if json_of(bytes(content)) != json_of(whole):  # white space between may change
            with pytest.raises(BundleError):
                checkpoint.read(path.parent)


def json_of(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_halves_strangers_and_misnamed_ones_are_passed_over(
    run: UPath, bundle: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, bundle(1))
    write_directory(run / "bundles" / ".2.half", bundle(2).files)  # the machine died before it was renamed
    (run / "bundles" / "3").mkdir(parents=True)  # or a store while it was filled
    write_directory(bundle_path(run, 4), bundle(5).files)
    write(run, replace(bundle(6), origin=replace(ORIGIN, run="other", id="fedcba9876543210")))
    found = checkpoint.newest(run, ORIGIN)
    assert found == bundle(1)
    said = capsys.readouterr().err
    assert "it is of another run, other (fedcba9876543210)" in said
    assert "`rlora train --fork` starts a run from it" in said
    assert "it is the bundle of version 5, under another's name" in said
    assert ".half" not in said


def test_a_run_without_a_whole_bundle_is_not_begun_again_silently(
    run: UPath, bundle: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint.newest(run, ORIGIN) is None  # nothing was saved yet
    damage_by_removal(write(run, bundle(1)) / "bundle.json")
    with pytest.raises(RloraError, match=r"none of its 1 bundles is whole.*bring back a copy of one, or start a"):
        checkpoint.newest(run, ORIGIN)


def test_another_release_is_told(run: UPath, bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FORMAT", 2)
    path = write(run, bundle(1))
    monkeypatch.undo()
    with pytest.raises(BundleError, match=r"format = 2; this release of rlora reads 1"):
        checkpoint.read(path)


def test_a_version_is_asked_for(tmp_path: Path, bundle: Callable[..., Bundle]) -> None:
    run = UPath(tmp_path)
    (tmp_path / "config.toml").write_text(
        '[provenance]\nid = "0123456789abcdef"\nprompts_sha256 = ""\nmachine = ""\n[provenance.packages]\n'
    )
    with pytest.raises(RloraError, match=r"it has no bundle yet; `rlora train --resume .*` begins it again"):
        checkpoint.read_version(run)
    for version in (1, 2, 3, 5, 8, 9):
        write(run, bundle(version))
    assert checkpoint.read_version(run).version == 9
    assert checkpoint.read_version(run, 3) == bundle(3)
    with pytest.raises(RloraError, match=r"no bundle of version 4; there are 1 to 3, 5, 8 to 9 \(config: checkpoint"):
        checkpoint.read_version(run, 4)
    shutil.rmtree(tmp_path / "bundles" / "9")
    damage_by_a_bit(bundle_path(run, 8) / "state.safetensors")
    assert checkpoint.read_version(run).version == 5
    with pytest.raises(BundleError, match=r"state\.safetensors: it is damaged: its digest"):
        checkpoint.read_version(run, 8)


def test_all_weights_are_a_bundle_too(run: UPath, bundle: Callable[..., Bundle]) -> None:
    before = bundle(1, adapter=Adapter("run", 1, b"{}", b"weights", whole=True))
    path = write(run, before)
    assert {"config.json", "model.safetensors"} < {each.name for each in path.iterdir()}
    assert checkpoint.read(path).adapter == before.adapter


def test_a_fork_begins_with_the_bundle_as_its_own(tmp_path: Path, bundle: Callable[..., Bundle]) -> None:
    (tmp_path / "config.toml").write_text(
        '[provenance]\nid = "ff"\nprompts_sha256 = "others"\nmachine = ""\n[provenance.packages]\n'
    )
    run = UPath(tmp_path)
    adopted = checkpoint.adopt(bundle(3), run)
    assert checkpoint.newest(run, Origin.of(run)) == adopted
    assert (adopted.origin.id, adopted.origin.prompts) == ("ff", "prompts")
    assert adopted.adapter.weights == adapter(3).weights
    assert checkpoint.lineage(bundle(3)) == {
        "run": "run", "id": ORIGIN.id, "version": 3, "digest": adapter(3).digest,
    }  # fmt: skip


def test_what_was_in_flight_goes_on_only_where_it_is_still_asked_for(
    config: Callable[..., Config], bundle: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    cursor = Cursor(20, (4,), (InFlight(18, 2, adapter(1)), InFlight(19, 2, None)))
    start = bundle(2, cursor=cursor)
    assert checkpoint.cursor_for(config(learner={"lr": 1e-3}, steps=7), start, ORIGIN) == cursor
    assert capsys.readouterr().err == ""
    hotter = config(sampling={"max_tokens": 8, "max_prompt_tokens": 48, "temperature": 0.5})
    assert checkpoint.cursor_for(hotter, start, ORIGIN) == Cursor(20, (18, 19, 4))
    assert "sampling: changed, so the prompts that were in flight are sampled again" in capsys.readouterr().err
    assert checkpoint.cursor_for(config(), start, replace(ORIGIN, prompts="others")) == Cursor(20)
    assert "its training prompts are others than they were" in capsys.readouterr().err


def test_a_run_goes_on_from_its_own_copy_of_what_it_started_from(
    tmp_path: Path, config: Callable[..., Config], bundle: Callable[..., Bundle]
) -> None:
    run, given = UPath(tmp_path), config(learner={"start_from": "gone"})
    own = checkpoint.with_own_start(given, bundle(2), run)
    assert own.learner.start_from == str(tmp_path / "bundles" / "2")
    assert checkpoint.with_own_start(config(), bundle(2), run) == config()
