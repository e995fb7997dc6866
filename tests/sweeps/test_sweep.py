"""Sweeps over recorded episodes: each member produces the same bits as a run by itself."""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from loop_stage import LocalJob, Stage, set_stage, task_of
from upath import UPath

import rlora.sweeps.sweep
from rlora import store
from rlora.records import DeliveryError, RewardError, RloraError
from rlora.run import checkpoint, directory
from rlora.run.prepare import prepared
from rlora.run.run import Run
from rlora.run.writer import CheckpointWriter
from rlora.settings import Config
from rlora.sweeps import members
from rlora.sweeps.diary import WANTED, Diary, append, ask, complete_lines
from rlora.sweeps.halving import Halving
from rlora.sweeps.results import read_results
from rlora.sweeps.sweep import sweep
from rlora.train import drive

STEPS = 6
MEMBERS: dict[str, dict[str, Any]] = {
    "plain": {"learner.lr": 0.01},
    "rank-2": {"learner.rank": 2, "learner.lr": 0.02, "seed": 1},
    "rank-8": {"learner.rank": 8, "learner.targets": "mlp", "learner.alpha": 16.0},
    "grpo": {"algorithm.name": "grpo", "algorithm.kl": 0.1, "seed": 2},
    "ppo": {"algorithm.name": "ppo", "algorithm.minibatches": 2, "critic.rank": 2},
    "cispo": {"algorithm.name": "cispo", "algorithm.minibatches": 2, "learner.targets": "attention"},
    "dapo": {"algorithm.name": "dapo", "algorithm.entropy": 0.01, "algorithm.refills": 0},
    "stopping": {"steps": 4},
}
Bits = Mapping[int, tuple[bytes, bytes]]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tiny: str) -> Stage:
    monkeypatch.setattr(rlora.sweeps.sweep, "load_task", lambda config: task_of(tiny))
    return set_stage(monkeypatch, tiny)


@pytest.fixture
def base(config: Callable[..., Config]) -> Config:
    return config(steps=STEPS, reward="-", learner={"lr": 0.01, "threads": 1}, health={"steps": 50})


def bits(path: Path) -> Bits:
    """Content of a run's bundles by version: the adapter; masters, moments and random states."""
    run = UPath(path)
    read = [checkpoint.read(checkpoint.bundle_path(run, number)) for number in checkpoint.versions(run)]
    return {bundle.version: (bundle.adapter.weights, bundle.state) for bundle in read}


def alone(path: Path, name: str, config: Config, tiny: str, fork: str | None = None) -> Bits:
    """Train a run by itself and return its bits."""
    with prepared(config, path / name, fork=fork, report=str, load=lambda config: task_of(tiny)) as run:
        drive([run])
    return bits(path / name)


def config_of(base: Config, changes: Mapping[str, Any]) -> Config:
    return members.config_of(asdict(base), "-", changes)


def events(path: Path) -> list[tuple[Any, ...]]:
    return [
        (line["event"], line.get("member", ""), line.get("step", "")) for line in complete_lines(path / "sweep.jsonl")
    ]


@pytest.mark.parametrize("is_apart", [False, True])
def test_each_member_produces_the_bits_of_a_run_by_itself(
    is_apart: bool, stage: Stage, base: Config, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the turn rules `rounds` and `first`."""
    monkeypatch.setattr(LocalJob, "is_apart", is_apart)
    swept = sweep(base, members=MEMBERS, run_dir=tmp_path / "sweep", tell=str)
    assert set(swept.statuses.values()) == {"finished"}
    for name, changes in MEMBERS.items():
        assert bits(tmp_path / "sweep" / name) == alone(tmp_path / "alone", name, config_of(base, changes), tiny)
        assert swept.summaries[name]["steps"] == changes.get("steps", STEPS)
    log = events(tmp_path / "sweep")
    assert [event for event in log if event[0] == "began"] == [("began", name, 0) for name in MEMBERS]
    assert ("finished", "stopping", 4) in log
    turns = complete_lines(tmp_path / "sweep" / "metrics.jsonl")
    assert [len(turn["steps"]) for turn in turns] == ([1] * (7 * STEPS + 4) if is_apart else [8] * 4 + [7] * 2)
    assert not any((tmp_path / "sweep").rglob("*.half"))


def test_pause_go_drop_and_fork_change_no_bit(stage: Stage, base: Config, tmp_path: Path, tiny: str) -> None:
    path = tmp_path / "sweep"
    names = ["plain", "rank-2", "ppo", "grpo"]
    hotter = {"learner.lr": 0.05}
    stage.actions = {
        ("take", "plain", 1): lambda: ask(path, "pause", "ppo"),
        ("take", "plain", 2): lambda: ask(path, "drop", "grpo"),
        ("take", "plain", 3): lambda: ask(path, "go", "ppo"),
        ("take", "rank-2", 3): lambda: ask(path, "fork", "rank-2", version=2, name="hotter", changes=hotter),
    }
    swept = sweep(base, members={name: MEMBERS[name] for name in names}, run_dir=path, tell=str)
    stage.actions = {}
    assert stage.calls.count(("leave", "ppo", 0)) == 2  # its slots were free in between
    assert swept.statuses == dict.fromkeys([*names, "hotter"], "finished") | {"grpo": "dropped"}
    for name in ("plain", "rank-2", "ppo"):
        assert bits(path / name) == alone(tmp_path / "alone", name, config_of(base, MEMBERS[name]), tiny)
    solo = alone(tmp_path / "alone", "grpo", config_of(base, MEMBERS["grpo"]), tiny)
    assert bits(path / "grpo") == {number: content for number, content in solo.items() if number <= 3}
    changed = config_of(base, MEMBERS["rank-2"] | hotter)
    assert bits(path / "hotter") == alone(tmp_path / "alone", "hotter", changed, tiny, fork=f"{path / 'rank-2'}@2")
    origin = directory.Provenance.of(UPath(path / "hotter")).forked_from
    assert origin
    assert origin["run"] == "rank-2"
    assert [(result.first, result.configuration) for result in read_results(path) if result.origin] == [
        (2, "learner.rank = 2, learner.lr = 0.05, forked from rank-2@2")
    ]
    log = events(path)
    assert log.index(("paused", "ppo", 2)) < log.index(("dropped", "grpo", 3)) < log.index(("went on", "ppo", 0))
    assert ("forked", "hotter", 2) in log


def test_a_member_that_fails_is_resumed_later(stage: Stage, base: Config, tmp_path: Path, tiny: str) -> None:
    path, names = tmp_path / "sweep", ["plain", "rank-2", "ppo"]
    stage.errors = {
        ("swap", "rank-2", 3): DeliveryError("version rank-2-v3: the engine does not serve it"),
        ("take", "ppo", 4): ValueError("a fault"),
    }
    with pytest.raises(RloraError) as failed:
        sweep(base, members={name: MEMBERS[name] for name in names}, run_dir=path, tell=str)
    assert str(failed.value).splitlines() == [
        "2 of 3 members failed:",
        "rank-2, after 3 steps: version rank-2-v3: the engine does not serve it",
        "ppo, after 4 steps: ValueError: a fault",
        f"`rlora sweep --resume {path}` continues them",
    ]
    assert Diary(path).states["rank-2"].reason.startswith("version rank-2-v3")
    assert bits(path / "plain") == alone(tmp_path / "alone", "plain", config_of(base, MEMBERS["plain"]), tiny)
    stage.errors = {}
    swept = sweep(resume=path, tell=str)
    assert set(swept.statuses.values()) == {"finished"}
    for name in names:
        assert bits(path / name) == alone(tmp_path / "again", name, config_of(base, MEMBERS[name]), tiny)


def test_an_error_in_a_member_affects_no_other(
    stage: Stage, base: Config, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing reward function, a learning rate without finite losses, and a full disk."""
    path = tmp_path / "sweep"
    changes: dict[str, dict[str, Any]] = {
        "plain": MEMBERS["plain"],
        "wild": {"learner.lr": 1e30, "learner.max_bad_updates": 2},
        "failing": {"seed": 3},
        "full": {"seed": 4, "checkpoint.patience": 0.2},
        "ppo": MEMBERS["ppo"],
    }
    stage.errors = {("take", "failing", 2): RewardError("9 of 16 episodes are in error")}
    write = store.write_directory

    def full(path: Path, files: Mapping[str, bytes]) -> None:
        if "full" in str(path) and int(path.name) >= 2:
            raise OSError(28, "No space left on device")
        write(path, files)

    monkeypatch.setattr("rlora.run.writer.write_directory", full)
    stage.actions = {("take", "plain", number): lambda: time.sleep(0.3) for number in range(STEPS)}
    with pytest.raises(RloraError, match=r"3 of 5 members failed:\nwild") as failed:
        sweep(base, members=changes, run_dir=path, tell=str)
    for reason in (
        r"wild, after \d steps: learner: 2 updates in a row had a non-finite loss or gradient",
        r"failing, after 2 steps: 9 of 16 episodes are in error",
        r"full, after \d steps: --run-dir .*full: version \d could not be written there",
    ):
        assert re.search(reason, str(failed.value)), str(failed.value)
    stage.errors, stage.actions = {}, {}
    for name in ("plain", "ppo"):
        assert bits(path / name) == alone(tmp_path / "alone", name, config_of(base, changes[name]), tiny)


def test_an_interrupted_sweep_resumes_each_member_from_its_newest_bundle(
    stage: Stage, base: Config, tmp_path: Path, tiny: str
) -> None:
    path, first_members = tmp_path / "sweep", dict(list(MEMBERS.items())[:4])
    stage.errors = {("swap", "rank-2", 3): KeyboardInterrupt()}  # type: ignore[dict-item]
    with pytest.raises(KeyboardInterrupt) as interrupt:
        sweep(base, members=first_members, run_dir=path, tell=str)
    assert f"`rlora sweep --resume {path}`" in interrupt.value.__notes__[-1]
    stage.errors = {}
    sweep(resume=path, tell=str)
    for name, changes in first_members.items():
        assert bits(path / name) == alone(tmp_path / "alone", name, config_of(base, changes), tiny)


def test_the_better_configurations_continue(
    stage: Stage, base: Config, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compared by the mean over their seeds. All seeds of a configuration continue, or none."""
    path, rewards = tmp_path / "sweep", {0.001: 0.1, 0.003: 0.9, 0.01: 0.4, 0.03: 0.6}

    def figures(run: Run) -> list[dict[str, Any]]:
        reward = rewards[float(run.config.learner.lr)] + 0.3 * run.config.seed
        return [{"step": step, "reward/mean": reward if step else 100.0} for step in range(6)]

    monkeypatch.setattr(Run, "figures", property(figures))
    over: dict[str, Sequence[Any]] = {"learner.lr": list(rewards), "seed": [0, 1]}
    swept = sweep(base, over=over, run_dir=path, halving=Halving(at=(2, 4), over_last=1), tell=str)
    done = {name for name, status in swept.statuses.items() if status == "finished"}
    assert done == {"lr-3e-3_seed-0", "lr-3e-3_seed-1"}
    halved = [line for line in complete_lines(path / "sweep.jsonl") if line["event"] == "halved"]
    assert [(line["at"], len(line["kept"]), len(line["dropped"])) for line in halved] == [(2, 4, 4), (4, 2, 2)]
    assert set(swept.statuses.values()) == {"finished", "dropped"}
    for name in done:
        changes = {"learner.lr": 0.003, "seed": int(name[-1])}
        assert bits(path / name) == alone(tmp_path / "alone", name, config_of(base, changes), tiny)
    assert max(bits(path / "lr-1e-3_seed-0")) == 2
    assert max(bits(path / "lr-0.03_seed-0")) == 4


def test_halving_counts_steps_that_are_not_written_yet(
    stage: Stage, base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[list[int]] = []

    def dropped(self: Halving, rung: int, members: Any, lines: Mapping[str, Sequence[Any]]) -> list[str]:
        counted.extend([line["step"] for line in of_member] for of_member in lines.values())
        return []

    def late(self: CheckpointWriter, *arguments: Any) -> None:
        time.sleep(0.5)
        write(self, *arguments)

    write = CheckpointWriter._write
    monkeypatch.setattr(CheckpointWriter, "_write", late)
    monkeypatch.setattr(Halving, "dropped", dropped)
    sweep(base, over={"learner.rank": [1, 2]}, run_dir=tmp_path / "sweep", halving=Halving(at=(2,)), tell=str, steps=3)
    assert counted == [[0, 1], [0, 1]]


def test_members_with_different_ends_of_messages_train_together(base: Config) -> None:
    ends = {"token": {"chat.stop_token_ids": [5]}, "string": {"chat.stop": ["="]}, "plain": {}}
    assert len(members.groups(members.members(asdict(base), {}, ends))) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sampling.top_p": 0.9}, "sampling: top_k, top_p or min_p"),
        ({"sampling.max_tokens": 4000}, r"sampling: max_prompt_tokens \+ max_tokens = \d+"),
    ],
)
def test_a_fork_for_which_the_engines_have_no_room_waits_for_a_resume(
    stage: Stage, base: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str
) -> None:
    path, request = tmp_path / "sweep", {"version": 1, "name": "new", "changes": changes}
    stage.actions[("take", "one", 2)] = lambda: ask(path, "fork", "one", **request)
    swept = sweep(base, members={"one": {}, "two": {"learner.rank": 2}}, run_dir=path, tell=str)
    assert set(swept.statuses) == {"one", "two"}
    assert re.search(rf"new: the engines started without room for {reason}; stop the sweep", capsys.readouterr().err)
    ask(path, "fork", "one", **request)  # while no process trains
    assert sweep(resume=path, tell=str).statuses["new"] == "finished"


def test_a_member_that_was_paused_at_a_resume_waits_for_the_next_one(
    stage: Stage, base: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep"
    stage.actions[("take", "kept", 1)] = lambda: ask(path, "pause", "kept")
    stage.errors = {("swap", "plain", 3): KeyboardInterrupt()}  # type: ignore[dict-item]
    changes = {"plain": {}, "kept": {"learner.rank": 2, "sampling.top_k": 5}}
    with pytest.raises(KeyboardInterrupt):
        sweep(base, members=changes, run_dir=path, tell=str)
    stage.errors = {}
    stage.actions[("take", "plain", 4)] = lambda: ask(path, "go", "kept")
    assert sweep(resume=path, tell=str).statuses == {"plain": "finished", "kept": "paused"}
    error = capsys.readouterr().err
    assert "go kept: kept: the member is not in the group that trains now; " in error
    ask(path, "go", "kept")
    assert sweep(resume=path, tell=str).statuses["kept"] == "finished"


def test_full_fine_tuning_trains_after_the_others(stage: Stage, base: Config, tmp_path: Path) -> None:
    path, output = tmp_path / "sweep", list[str]()
    changes: dict[str, dict[str, Any]] = {"one": {}, "full": {"learner.adapter": "none"}, "two": {"learner.rank": 2}}
    swept = sweep(base, members=changes, run_dir=path, tell=output.append, steps=2)
    assert set(swept.statuses.values()) == {"finished"}
    assert output[0] == "2 groups train one after the other, because they can't share processes: one, two; full"
    assert [text.splitlines()[0] for text in output[1:]] == ["members: 2", "members: 1"]
    began = [line["member"] for line in complete_lines(path / "sweep.jsonl") if line["event"] == "began"]
    assert began == ["one", "two", "full"]


def test_a_sweep_that_does_not_fit_is_refused_before_it_starts(
    stage: Stage, base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output: list[str] = []
    sweep(base, over={"learner.rank": [1, 8]}, run_dir=tmp_path / "fits", tell=output.append, steps=1)
    assert re.search(
        r"^members: 2\ncompletions in flight: 256; the engines sample 128 at a time\nadapter slots per engine: 4, "
        r"4\.7 MiB each\nmemory: base and processes \d\.\d\d GiB, members 0\.\d\d GiB of .*\ndisk: 0\.\d\d GiB of",
        output[0],
    )
    real = rlora.sweeps.sweep.budget
    for change, message in (
        ({"total": 2**30}, r"2 members need 0\.\d+ GiB in addition to .* has 1\.00 GiB: 0 members fit; train fewer"),
        (
            {"free": 2**20},
            r"2 members need 0\.\d+ GiB of disk space, but 0\.00 GiB are free; lower checkpoint\.keep_last",
        ),
    ):
        small = partial(lambda change, *arguments: replace(real(*arguments), **change), change)
        monkeypatch.setattr(rlora.sweeps.sweep, "budget", small)
        with pytest.raises(RloraError, match=message):
            sweep(base, over={"learner.rank": [1, 8]}, run_dir=tmp_path / f"{change}", tell=str)
    assert not stage.job.learners["rank-1"].states


def test_a_fork_waits_for_a_free_slot(stage: Stage, base: Config, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    stage.actions[("take", "one", 1)] = lambda: ask(path, "fork", "one", version=1, name="three", changes={"steps": 3})
    swept = sweep(base, members={"one": {}, "two": {"learner.rank": 2, "steps": 4}}, run_dir=path, tell=str)
    assert set(swept.statuses.values()) == {"finished"}
    log = events(path)
    assert log.index(("forked", "three", 1)) < log.index(("finished", "two", 4)) < log.index(("began", "three", 1))


def test_a_fork_that_is_dropped_while_it_waits_never_begins(stage: Stage, base: Config, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    stage.actions[("take", "one", 1)] = lambda: ask(path, "fork", "one", version=1, name="three", changes={"steps": 3})
    stage.actions[("take", "one", 2)] = lambda: append(path / WANTED, {"what": "drop", "member": "three"})
    swept = sweep(base, members={"one": {}, "two": {"learner.rank": 2, "steps": 4}}, run_dir=path, tell=str)
    assert swept.statuses == {"one": "finished", "two": "finished", "three": "dropped"}
    assert ("began", "three", 1) not in events(path)


def test_requests_to_a_sweep_that_does_not_train_are_carried_out_when_it_is_resumed(
    stage: Stage, base: Config, tmp_path: Path, tiny: str
) -> None:
    path, names = tmp_path / "sweep", ["plain", "rank-2", "grpo"]
    stage.actions = {
        ("take", "plain", 1): lambda: ask(path, "pause", "rank-2"),
        ("take", "plain", 2): lambda: ask(path, "pause", "grpo"),
    }
    paused = sweep(base, members={name: MEMBERS[name] for name in names}, run_dir=path, tell=str).statuses
    assert paused == {"plain": "finished", "rank-2": "paused", "grpo": "paused"}
    stage.actions = {}
    ask(path, "go", "rank-2")
    ask(path, "drop", "grpo")
    ask(path, "fork", "plain", version=2, name="hotter", changes={"learner.lr": 0.05})
    ask(path, "fork", "plain", version=2, name="rank-2", changes={})
    swept = sweep(resume=path, tell=str)
    assert swept.statuses == {"plain": "finished", "rank-2": "finished", "grpo": "dropped", "hotter": "finished"}
    assert bits(path / "rank-2") == alone(tmp_path / "alone", "rank-2", config_of(base, MEMBERS["rank-2"]), tiny)
    changed = config_of(base, MEMBERS["plain"] | {"learner.lr": 0.05})
    assert bits(path / "hotter") == alone(tmp_path / "alone", "hotter", changed, tiny, fork=f"{path / 'plain'}@2")
    assert [line["request"] for line in complete_lines(path / "sweep.jsonl") if line["event"] == "refused"] == [5]


def test_an_impossible_request_is_reported(
    stage: Stage, base: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep"
    stage.actions[("take", "one", 1)] = lambda: ask(path, "fork", "one", version=1, name="two", changes={})
    stage.actions[("take", "one", 2)] = lambda: ask(
        path, "fork", "one", version=1, name="x", changes={"learner.rank": 0}
    )
    changes = {"dtype": "bfloat16"}
    stage.actions[("take", "two", 2)] = lambda: ask(path, "fork", "two", version=1, name="y", changes=changes)
    sweep(base, members={"one": {}, "two": {"learner.rank": 2}}, run_dir=path, tell=str)
    err = capsys.readouterr().err
    assert "fork one: two: a member has this name already; use a different name" in err
    assert "fork one: member x: learner.rank = 0: " in err
    refused = [line for line in complete_lines(path / "sweep.jsonl") if line["event"] == "refused"]
    assert [line["request"] for line in refused] == [0, 1, 2]
    assert "fork two: y: can't share processes with two" in err
    for action, member, message in (
        ("pause", "one", r"sweep/one: the member is finished, so `rlora pause` is not possible"),
        ("drop", "three", r"there is no member three, .*; use one of the members one, two"),
    ):
        with pytest.raises(RloraError, match=message):
            ask(path, action, member)


def test_members_are_tracked(stage: Stage, base: Config, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    stage.errors = {("take", "rank-2", 1): RloraError("fails")}
    with pytest.raises(RloraError, match="1 of 2 members failed"):
        sweep(base, over={"learner.rank": [1, 2]}, run_dir=path, tell=str, steps=2, trackers={"use": ["tensorboard"]})
    for name, steps in (("rank-1", {"step": 1}), ("rank-2", {"step": 0})):
        assert json.loads((path / name / "trackers" / "tensorboard.json").read_text()) == steps


def test_a_finished_member_without_that_event_is_not_trained_again(stage: Stage, base: Config, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    sweep(base, over={"learner.rank": [1, 2]}, run_dir=path, tell=str, steps=2)
    lines = [line for line in (path / "sweep.jsonl").read_text().splitlines() if '"finished"' not in line]
    (path / "sweep.jsonl").write_text("".join(f"{line}\n" for line in lines))
    stage.calls.clear()
    swept = sweep(resume=path, tell=str)
    assert set(swept.statuses.values()) == {"finished"}
    assert stage.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"over": {"learner.rnk": [1, 2]}},
            r"member rnk-1: learner\.rnk = 1: no such field; did you mean learner\.rank",
        ),
        ({"over": {"learner.rank": [1, 9]}}, r"member rank-9: learner\.rank = 9: .*less than or equal to 8"),
        ({"over": {"learner.rank": []}}, r"--over learner\.rank: no values"),
        (
            {"over": {"engine.replicas": [1, 2]}},
            r"member replicas-1: engine\.replicas = 1: all members share this setting",
        ),
        ({"over": {"learner.rank": [1]}}, r"sweep: 1 members, fewer than 2; add an axis"),
        ({"over": {"seed": [0, 0]}}, r"member seed-0: two members have this name"),
        ({"members": {"a": {"seed": 1}, "b": {"seed": 1}}}, r"member b: its config is the same as that of a"),
        ({"members": {"a/b": {"seed": 1}, "b": {}}}, r"member 'a/b': not a name for a directory"),
        ({"over": {"seed": [0, 1]}, "halving": Halving(at=(2,))}, r"--halve-at: the members differ in seed only"),
        ({"over": {"learner.rank": [1, 2]}, "halving": Halving(at=(6,))}, r"--halve-at 6: rank-1 has steps = 6"),
        ({"over": {"learner.rank": [1, 2]}, "halving": Halving(at=(0,))}, r"--halve-at 0"),
        (
            {"over": {"learner.rank": [1, 2]}, "halving": Halving(at=(3, 2))},
            r"--halve-at 3,2: each step must be larger .* use --halve-at 2,3",
        ),
        ({"over": {"learner.rank": [1, 2]}, "halving": Halving(at=(2,), keep=1.0)}, r"--keep 1: .*use a share"),
    ],
)
def test_an_invalid_sweep_is_refused(
    arguments: dict[str, Any], message: str, stage: Stage, base: Config, tmp_path: Path
) -> None:
    with pytest.raises(RloraError, match=message):
        sweep(base, **arguments, run_dir=tmp_path / "sweep", tell=str)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_resumes_unchanged(stage: Stage, base: Config, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    sweep(base, over={"learner.rank": [1, 2]}, run_dir=path, tell=str, steps=1)
    with pytest.raises(RloraError, match=r"--resume .*: over was .*1, 2.* and is .*1, 4.* now.*; remove over"):
        sweep(resume=path, over={"learner.rank": [1, 4]})
    with pytest.raises(RloraError, match=r"remove config, run_dir and"):
        sweep(resume=path, run_dir=tmp_path / "other")
    with pytest.raises(RloraError, match=r"the directory is not empty; resume its sweep with `rlora sweep --resume"):
        sweep(base, over={"learner.rank": [1, 2]}, run_dir=path)
    with pytest.raises(RloraError, match=r"not the directory of a sweep"):
        sweep(resume=tmp_path)
    with directory.locked(UPath(path)), pytest.raises(RloraError, match=r"is training in this directory; stop that"):
        sweep(resume=path)


def test_a_member_that_a_second_process_trains_is_named(stage: Stage, base: Config, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    stage.errors = {("swap", "rank-2", 1): RloraError("fails")}
    with pytest.raises(RloraError, match="1 of 2 members failed"):
        sweep(base, over={"learner.rank": [1, 2]}, run_dir=path, tell=str)
    with directory.locked(UPath(path / "rank-2")), pytest.raises(RloraError, match=r"member rank-2: .* is training in"):
        sweep(resume=path)


def test_a_line_that_a_crash_cut_off_is_removed(tmp_path: Path) -> None:
    (tmp_path / "sweep.jsonl").write_text(json.dumps({"event": "began", "member": "a", "step": 0}) + '\n{"event": "fin')
    diary = Diary(tmp_path)
    assert diary.states["a"].status == "running"
    diary.note("finished", "a", 3)
    assert Diary(tmp_path).states["a"].status == "finished"
    assert [line["event"] for line in complete_lines(tmp_path / "sweep.jsonl")] == ["began", "finished"]
