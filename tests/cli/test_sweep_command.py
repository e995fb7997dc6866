"""`rlora sweep` as it is typed: what it makes of axes, single members and files."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from conftest import exit_status as run

import rlora.sweeps.results
import rlora.sweeps.sweep
from rlora.settings import Config
from rlora.sweeps.diary import Diary, complete_lines
from rlora.sweeps.halving import Halving
from rlora.sweeps.sweep import Swept

TOML = str(ROOT / "launch" / "arithmetic.toml")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `sweep` was called with."""
    found: dict[str, Any] = {}

    def sweep(config: Config | None = None, over: Any = None, members: Any = None, **others: Any) -> Swept:
        found.update(config=config, over=over, members=members, **others)
        return Swept(Path("-"), {}, {})

    monkeypatch.setattr(rlora.sweeps.sweep, "sweep", sweep)
    monkeypatch.setattr(rlora.sweeps.results, "read_results", lambda place: [])
    return found


def test_axes_and_single_members(asked: dict[str, Any]) -> None:
    axes = ["--over", "learner.rank=1,2", "--over=learner.lr=1e-4,auto", "--over", "sampling.temperature=0.7,1"]
    axes += ["--over", "learner.betas=[0.9,0.95],[0.9,0.999]", "--over", "learner.lr-schedule=constant,linear"]
    one = ["--member", "hot:learner.lr=1e-3,seed=1", "--member", 'other:env-args.levels="4,5"']
    assert (
        run("sweep", TOML, *axes, *one, "--steps", "12", "--halve-at", "3,6", "--keep", "0.25", "--run-dir", "x") == 0
    )
    assert asked["over"] == {
        "learner.rank": [1, 2], "learner.lr": [1e-4, "auto"], "sampling.temperature": [0.7, 1],
        "learner.betas": [[0.9, 0.95], [0.9, 0.999]], "learner.lr_schedule": ["constant", "linear"],
    }  # fmt: skip
    assert asked["members"] == {"hot": {"learner.lr": 1e-3, "seed": 1}, "other": {"env_args.levels": "4,5"}}
    assert asked["config"].steps == 12
    assert asked["halving"] == Halving((3, 6), 0.25)
    assert asked["run_dir"] == Path("x")


@pytest.mark.parametrize("config", [f'"{TOML}"', "{ model = 'm', env = 'e:E', reward = 'r:r', steps = 5 }"])
def test_a_file_may_hold_all_of_it(config: str, asked: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "ranks.toml"
    file.write_text(
        f'config = {config}\n[over]\n"learner.rank" = [1, 8]\nlearner.lr = [0.001]\n[members.hot]\nlearner.lr = 0.1\n'
        "[halving]\nat = [12]\nover_last = 2\n"
    )
    assert run("sweep", str(file), "--over", "seed=0,1", "--learner.alpha", "16") == 0
    assert asked["over"] == {"learner.rank": [1, 8], "learner.lr": [0.001], "seed": [0, 1]}
    assert asked["members"] == {"hot": {"learner.lr": 0.1}}
    assert asked["halving"] == Halving((12,), over_last=2)
    assert asked["config"].learner.alpha == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--over", "learner.rank"), r"--over learner\.rank: give FIELD=VALUE,VALUE"),
        (("--member", "hot"), r"--member hot: give NAME:FIELD=VALUE"),
        (("--member", "hot:learner.lr"), r"--member hot: learner\.lr: no value"),
        (("--member", "hot:learner.lrr=1"), r"--member hot: learner\.lrr: no such field; did you mean learner\.lr"),
        (("--over", "seed=0,1", "--halve-at", "a"), r"--halve-at a: give steps separated by commas"),
        (("--resume", "x", "--steps", "3"), r"--resume x: a resumed sweep keeps .*; remove --steps"),
    ],
)  # fmt: skip
def test_bad_input(
    arguments: tuple[str, ...], message: str, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sweep", *(() if "--resume" in arguments else (TOML,)), *arguments) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not asked


def test_what_is_asked_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bundle: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    diary = Diary(tmp_path)
    diary.note("began", "a")
    diary.note("began", "b")
    for what in ("pause", "drop"):
        assert run(what, str(tmp_path / "a")) == 0
    assert f"pause a, once it is resumed: `rlora sweep --resume {tmp_path}`" in capsys.readouterr().out
    assert complete_lines(tmp_path / "wanted.jsonl") == [{"what": each, "member": "a"} for each in ("pause", "drop")]
    assert run("go", str(tmp_path / "b")) == 1
    assert "b: the member is running, so `rlora go` is not possible" in capsys.readouterr().err
    monkeypatch.setattr("rlora.run.checkpoint.read_version", lambda run, version: bundle(version or 7))
    assert run("fork", str(tmp_path / "b"), "c", "learner.lr=1e-3", "seed=2") == 0
    expected: Mapping[str, Any] = {
        "what": "fork", "member": "b", "version": 7, "name": "c", "changes": {"learner.lr": 1e-3, "seed": 2},
    }  # fmt: skip
    assert complete_lines(tmp_path / "wanted.jsonl")[-1] == expected
