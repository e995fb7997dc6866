"""A sweep over recorded episodes: each member leaves the bits that it would leave alone."""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from loop_stage import HereJob, Stage, set_stage, task_of
from upath import UPath

import rlora.sweeps.sweep
from rlora import store
from rlora.records import DeliveryError, RewardError, RloraError
from rlora.run import checkpoint, directory
from rlora.run.prepare import prepared
from rlora.run.run import Run
from rlora.run.writer import Saver
from rlora.settings import Config
from rlora.sweeps import members
from rlora.sweeps.diary import Diary, ask, whole_lines
from rlora.sweeps.halving import Halving
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


def bits(place: Path) -> Bits:
    """What each bundle of a run has: adapter; masters, moments and random states."""
    run = UPath(place)
    read = [checkpoint.read(checkpoint.bundle_path(run, number)) for number in checkpoint.versions(run)]
    return {bundle.version: (bundle.adapter.weights, bundle.state) for bundle in read}


def alone(place: Path, name: str, config: Config, tiny: str, fork: str | None = None) -> Bits:
    """The bits of a run by itself."""
    with prepared(config, place / name, fork=fork, tell=str, load=lambda config: task_of(tiny)) as run:
        drive([run])
    return bits(place / name)


def config_of(base: Config, changes: Mapping[str, Any]) -> Config:
    return members.config_of(asdict(base), "-", changes)


def events(place: Path) -> list[tuple[Any, ...]]:
    return [
        (line["event"], line.get("member", ""), line.get("step", "")) for line in whole_lines(place / "sweep.jsonl")
    ]


@pytest.mark.parametrize("is_apart", [False, True])
def test_each_member_leaves_the_bits_of_its_solo_run(
    is_apart: bool, stage: Stage, base: Config, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rounds, and in turns of those whose groups are there first."""
    monkeypatch.setattr(HereJob, "is_apart", is_apart)
    swept = sweep(base, members=MEMBERS, run_dir=tmp_path / "sweep", tell=str)
    assert set(swept.statuses.values()) == {"finished"}
    for name, changes in MEMBERS.items():
        assert bits(tmp_path / "sweep" / name) == alone(tmp_path / "alone", name, config_of(base, changes), tiny)
        assert swept.summaries[name]["steps"] == changes.get("steps", STEPS)
    told = events(tmp_path / "sweep")
    assert [event for event in told if event[0] == "began"] == [("began", name, 0) for name in MEMBERS]
    assert ("finished", "stopping", 4) in told
    turns = whole_lines(tmp_path / "sweep" / "metrics.jsonl")
    assert [len(turn["steps"]) for turn in turns] == ([1] * (7 * STEPS + 4) if is_apart else [8] * 4 + [7] * 2)
    assert not any((tmp_path / "sweep").rglob("*.half"))


def test_pause_go_drop_and_fork_change_no_bit(stage: Stage, base: Config, tmp_path: Path, tiny: str) -> None:
    place = tmp_path / "sweep"
    names = ["plain", "rank-2", "ppo", "grpo"]
    hotter = {"learner.lr": 0.05}
    stage.acts = {
        ("take", "plain", 1): lambda: ask(place, "pause", "ppo"),
        ("take", "plain", 2): lambda: ask(place, "drop", "grpo"),
        ("take", "plain", 3): lambda: ask(place, "go", "ppo"),
        ("take", "rank-2", 3): lambda: ask(place, "fork", "rank-2", version=2, name="hotter", changes=hotter),
    }
    swept = sweep(base, members={name: MEMBERS[name] for name in names}, run_dir=place, tell=str)
    stage.acts = {}
    assert stage.told.count(("leave", "ppo", 0)) == 2  # its places were free meanwhile
    assert swept.statuses == dict.fromkeys([*names, "hotter"], "finished") | {"grpo": "dropped"}
    for name in ("plain", "rank-2", "ppo"):
        assert bits(place / name) == alone(tmp_path / "alone", name, config_of(base, MEMBERS[name]), tiny)
    solo = alone(tmp_path / "alone", "grpo", config_of(base, MEMBERS["grpo"]), tiny)
    assert bits(place / "grpo") == {number: each for number, each in solo.items() if number <= 3}
    changed = config_of(base, MEMBERS["rank-2"] | hotter)
    assert bits(place / "hotter") == alone(tmp_path / "alone", "hotter", changed, tiny, fork=f"{place / 'rank-2'}@2")
    origin = directory.Origin.of(UPath(place / "hotter")).forked_from
    assert origin
    assert origin["run"] == "rank-2"
    told = events(place)
    assert told.index(("paused", "ppo", 2)) < told.index(("dropped", "grpo", 3)) < told.index(("went on", "ppo", 0))
    assert ("forked", "hotter", 2) in told


def test_a_member_that_fails_is_set_aside_and_goes_on_later(
    stage: Stage, base: Config, tmp_path: Path, tiny: str
) -> None:
    place, names = tmp_path / "sweep", ["plain", "rank-2", "ppo"]
    stage.wrong = {
        ("swap", "rank-2", 3): DeliveryError("version rank-2-v3: the engine does not serve it"),
        ("take", "ppo", 4): ValueError("a fault"),
    }
    with pytest.raises(RloraError) as failed:
        sweep(base, members={name: MEMBERS[name] for name in names}, run_dir=place, tell=str)
    assert str(failed.value).splitlines() == [
        "2 of 3 members failed:",
        "rank-2, after 3 steps: version rank-2-v3: the engine does not serve it",
        "ppo, after 4 steps: ValueError: a fault",
        f"`rlora sweep --resume {place}` continues them",
    ]
    assert Diary(place).fates["rank-2"].why.startswith("version rank-2-v3")
    assert bits(place / "plain") == alone(tmp_path / "alone", "plain", config_of(base, MEMBERS["plain"]), tiny)
    stage.wrong = {}
    swept = sweep(resume=place, tell=str)
    assert set(swept.statuses.values()) == {"finished"}
    for name in names:
        assert bits(place / name) == alone(tmp_path / "again", name, config_of(base, MEMBERS[name]), tiny)


def test_what_is_wrong_with_a_member_harms_no_other(
    stage: Stage, base: Config, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward that fails, a learning rate at which nothing is finite, a disk that is full."""
    place = tmp_path / "sweep"
    some: dict[str, dict[str, Any]] = {
        "plain": MEMBERS["plain"],
        "wild": {"learner.lr": 1e30, "learner.max_bad_updates": 2},
        "ill": {"seed": 3},
        "full": {"seed": 4, "checkpoint.patience": 0.2},
        "ppo": MEMBERS["ppo"],
    }
    stage.wrong = {("take", "ill", 2): RewardError("9 of 16 episodes are in error")}
    write = store.write_directory

    def full(path: Path, files: Mapping[str, bytes]) -> None:
        if "full" in str(path) and int(path.name) >= 2:
            raise OSError(28, "No space left on device")
        write(path, files)

    monkeypatch.setattr("rlora.run.writer.write_directory", full)
    stage.acts = {("take", "plain", number): lambda: time.sleep(0.3) for number in range(STEPS)}
    with pytest.raises(RloraError, match=r"3 of 5 members failed:\nwild") as failed:
        sweep(base, members=some, run_dir=place, tell=str)
    for reason in (
        r"wild, after \d steps: learner: 2 updates in a row had a non-finite loss or gradient",
        r"ill, after 2 steps: 9 of 16 episodes are in error",
        r"full, after \d steps: --run-dir .*full: version \d could not be written there",
    ):
        assert re.search(reason, str(failed.value)), str(failed.value)
    stage.wrong, stage.acts = {}, {}
    for name in ("plain", "ppo"):
        assert bits(place / name) == alone(tmp_path / "alone", name, config_of(base, some[name]), tiny)


def test_a_sweep_that_is_interrupted_goes_on_from_each_members_newest_bundle(
    stage: Stage, base: Config, tmp_path: Path, tiny: str
) -> None:
    place, some = tmp_path / "sweep", dict(list(MEMBERS.items())[:4])
    stage.wrong = {("swap", "rank-2", 3): KeyboardInterrupt()}  # type: ignore[dict-item]
    with pytest.raises(KeyboardInterrupt):
        sweep(base, members=some, run_dir=place, tell=str)
    stage.wrong = {}
    sweep(resume=place, tell=str)
    for name, changes in some.items():
        assert bits(place / name) == alone(tmp_path / "alone", name, config_of(base, changes), tiny)


def test_the_better_configurations_go_on(
    stage: Stage, base: Config, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the mean over their seeds; all seeds of a configuration go on or none."""
    place, worth = tmp_path / "sweep", {0.001: 0.1, 0.003: 0.9, 0.01: 0.4, 0.03: 0.6}

    def figures(run: Run) -> list[dict[str, Any]]:
        reward = worth[float(run.config.learner.lr)] + 0.3 * run.config.seed
        return [{"step": step, "reward/mean": reward if step else 100.0} for step in range(6)]

    monkeypatch.setattr(Run, "figures", property(figures))
    over: dict[str, Sequence[Any]] = {"learner.lr": list(worth), "seed": [0, 1]}
    swept = sweep(base, over=over, run_dir=place, halving=Halving(at=(2, 4), over_last=1), tell=str)
    done = {name for name, status in swept.statuses.items() if status == "finished"}
    assert done == {"lr-3e-3_seed-0", "lr-3e-3_seed-1"}
    halved = [line for line in whole_lines(place / "sweep.jsonl") if line["event"] == "halved"]
    assert [(line["at"], len(line["kept"]), len(line["dropped"])) for line in halved] == [(2, 4, 4), (4, 2, 2)]
    assert set(swept.statuses.values()) == {"finished", "dropped"}
    for name in done:
        changes = {"learner.lr": 0.003, "seed": int(name[-1])}
        assert bits(place / name) == alone(tmp_path / "alone", name, config_of(base, changes), tiny)
    assert max(bits(place / "lr-1e-3_seed-0")) == 2
    assert max(bits(place / "lr-0.03_seed-0")) == 4


def test_halving_counts_steps_that_are_not_written_yet(
    stage: Stage, base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[list[int]] = []

    def dropped(self: Halving, rung: int, members: Any, lines: Mapping[str, Sequence[Any]]) -> list[str]:
        counted.extend([line["step"] for line in of_member] for of_member in lines.values())
        return []

    def late(self: Saver, *arguments: Any) -> None:
        time.sleep(0.5)
        write(self, *arguments)

    write = Saver._write
    monkeypatch.setattr(Saver, "_write", late)
    monkeypatch.setattr(Halving, "dropped", dropped)
    sweep(base, over={"learner.rank": [1, 2]}, run_dir=tmp_path / "sweep", halving=Halving(at=(2,)), tell=str, steps=3)
    assert counted == [[0, 1], [0, 1]]


def test_full_fine_tuning_trains_after_the_others(stage: Stage, base: Config, tmp_path: Path) -> None:
    place, told = tmp_path / "sweep", list[str]()
    some: dict[str, dict[str, Any]] = {"one": {}, "full": {"learner.adapter": "none"}, "two": {"learner.rank": 2}}
    swept = sweep(base, members=some, run_dir=place, tell=told.append, steps=2)
    assert set(swept.statuses.values()) == {"finished"}
    assert told[0] == "2 groups train one after the other, for they share no process: one, two; full"
    assert [text.splitlines()[0] for text in told[1:]] == ["members: 2", "members: 1"]
    began = [line["member"] for line in whole_lines(place / "sweep.jsonl") if line["event"] == "began"]
    assert began == ["one", "two", "full"]


def test_what_does_not_fit_is_told_before_anything_is_started(
    stage: Stage, base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    sweep(base, over={"learner.rank": [1, 8]}, run_dir=tmp_path / "fits", tell=told.append, steps=1)
    assert re.search(
        r"^members: 2\ncompletions in flight: 256; the engines sample 128 at a time\nversions that engines hold: 4, "
        r"4\.7 MiB each\nmemory: base and processes \d\.\d\d GiB, members 0\.\d\d GiB of .*\ndisk: 0\.\d\d GiB of",
        told[0],
    )
    real = rlora.sweeps.sweep.budget
    for change, message in (
        ({"total": 2**30}, r"2 members take 0\.\d+ GiB beside .* has 1\.00 GiB: 0 of them fit; train fewer"),
        ({"free": 2**20}, r"2 members take 0\.\d+ GiB of disk, and 0\.00 GiB are free; lower checkpoint\.keep_last"),
    ):
        small = partial(lambda change, *given: replace(real(*given), **change), change)
        monkeypatch.setattr(rlora.sweeps.sweep, "budget", small)
        with pytest.raises(RloraError, match=message):
            sweep(base, over={"learner.rank": [1, 8]}, run_dir=tmp_path / f"{change}", tell=str)
    assert not stage.job.learners["rank-1"].held


def test_a_fork_waits_until_engines_have_room(stage: Stage, base: Config, tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    stage.acts[("take", "one", 1)] = lambda: ask(place, "fork", "one", version=1, name="three", changes={"steps": 3})
    swept = sweep(base, members={"one": {}, "two": {"learner.rank": 2, "steps": 4}}, run_dir=place, tell=str)
    assert set(swept.statuses.values()) == {"finished"}
    told = events(place)
    assert told.index(("forked", "three", 1)) < told.index(("finished", "two", 4)) < told.index(("began", "three", 1))


def test_what_was_asked_and_can_not_be_done_is_told(
    stage: Stage, base: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "sweep"
    stage.acts[("take", "one", 1)] = lambda: ask(place, "fork", "one", version=1, name="two", changes={})
    stage.acts[("take", "one", 2)] = lambda: ask(place, "fork", "one", version=1, name="x", changes={"learner.rank": 0})
    other = {"dtype": "bfloat16"}
    stage.acts[("take", "two", 2)] = lambda: ask(place, "fork", "two", version=1, name="y", changes=other)
    sweep(base, members={"one": {}, "two": {"learner.rank": 2}}, run_dir=place, tell=str)
    err = capsys.readouterr().err
    assert "fork one: two: there is a member of this name; give another" in err
    assert "fork one: member x: learner.rank = 0: " in err
    refused = [line for line in whole_lines(place / "sweep.jsonl") if line["event"] == "refused"]
    assert [line["request"] for line in refused] == [0, 1, 2]
    assert "fork two: y: it can't share processes with two" in err
    for what, member, why in (
        ("pause", "one", r"sweep/one: it is finished, so there is nothing to pause"),
        ("drop", "three", r"there is no member three; there are one, two"),
    ):
        with pytest.raises(RloraError, match=why):
            ask(place, what, member)


def test_members_are_tracked(stage: Stage, base: Config, tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    stage.wrong = {("take", "rank-2", 1): RloraError("ill")}
    with pytest.raises(RloraError, match="1 of 2 members failed"):
        sweep(base, over={"learner.rank": [1, 2]}, run_dir=place, tell=str, steps=2, trackers={"use": ["tensorboard"]})
    for name, steps in (("rank-1", {"step": 1}), ("rank-2", {"step": 0})):
        assert json.loads((place / name / "trackers" / "tensorboard.json").read_text()) == steps


def test_a_member_whose_end_was_not_noted_is_not_trained_again(stage: Stage, base: Config, tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    sweep(base, over={"learner.rank": [1, 2]}, run_dir=place, tell=str, steps=2)
    lines = [line for line in (place / "sweep.jsonl").read_text().splitlines() if '"finished"' not in line]
    (place / "sweep.jsonl").write_text("".join(f"{line}\n" for line in lines))
    stage.told.clear()
    swept = sweep(resume=place, tell=str)
    assert set(swept.statuses.values()) == {"finished"}
    assert stage.told == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"over": {"learner.rnk": [1, 2]}},
            r"member rnk-1: learner\.rnk = 1: no such field; did you mean learner\.rank",
        ),
        ({"over": {"learner.rank": [1, 9]}}, r"member rank-9: learner\.rank = 9: .*less than or equal to 8"),
        ({"over": {"learner.rank": []}}, r"--over learner\.rank: it has no value"),
        (
            {"over": {"engine.replicas": [1, 2]}},
            r"member replicas-1: engine\.replicas = 1: the job's processes have it",
        ),
        ({"over": {"learner.rank": [1]}}, r"sweep: 1 members; give an axis"),
        ({"over": {"seed": [0, 0]}}, r"member seed-0: there are two of this name"),
        ({"members": {"a": {"seed": 1}, "b": {"seed": 1}}}, r"member b: it is the same as a"),
        ({"members": {"a/b": {"seed": 1}, "b": {}}}, r"member 'a/b': it names a directory"),
        ({"over": {"seed": [0, 1]}, "halving": Halving(at=(2,))}, r"--halve-at: the members differ in seed only"),
        ({"over": {"learner.rank": [1, 2]}, "halving": Halving(at=(6,))}, r"--halve-at 6: rank-1 has steps = 6"),
        ({"over": {"learner.rank": [1, 2]}, "halving": Halving(at=(0,))}, r"--halve-at 0"),
        (
            {"over": {"learner.rank": [1, 2]}, "halving": Halving(at=(3, 2))},
            r"--halve-at 3,2: give steps that increase",
        ),
        ({"over": {"learner.rank": [1, 2]}, "halving": Halving(at=(2,), keep=1.0)}, r"--keep 1: give a share"),
    ],
)
def test_what_makes_no_sweep_is_refused(
    given: dict[str, Any], message: str, stage: Stage, base: Config, tmp_path: Path
) -> None:
    with pytest.raises(RloraError, match=message):
        sweep(base, **given, run_dir=tmp_path / "sweep", tell=str)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_goes_on_as_it_began(stage: Stage, base: Config, tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    sweep(base, over={"learner.rank": [1, 2]}, run_dir=place, tell=str, steps=1)
    with pytest.raises(RloraError, match=r"--resume .*: over was .*1, 2.*, and is .*1, 4.* now; leave it out"):
        sweep(resume=place, over={"learner.rank": [1, 4]})
    with pytest.raises(RloraError, match=r"leave out config and run_dir"):
        sweep(resume=place, run_dir=tmp_path / "other")
    with pytest.raises(RloraError, match=r"it is not empty; go on with its sweep by `rlora sweep --resume"):
        sweep(base, over={"learner.rank": [1, 2]}, run_dir=place)
    with pytest.raises(RloraError, match=r"no sweep is there"):
        sweep(resume=tmp_path)
    with directory.held(UPath(place)), pytest.raises(RloraError, match=r"trains it; end that one first"):
        sweep(resume=place)


def test_a_member_that_another_process_trains_is_named(stage: Stage, base: Config, tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    stage.wrong = {("swap", "rank-2", 1): RloraError("ill")}
    with pytest.raises(RloraError, match="1 of 2 members failed"):
        sweep(base, over={"learner.rank": [1, 2]}, run_dir=place, tell=str)
    with directory.held(UPath(place / "rank-2")), pytest.raises(RloraError, match=r"member rank-2: .* trains it"):
        sweep(resume=place)


def test_a_line_that_a_death_cut_off_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "sweep.jsonl").write_text(json.dumps({"event": "began", "member": "a", "step": 0}) + '\n{"event": "fin')
    diary = Diary(tmp_path)
    assert diary.fates["a"].status == "running"
    diary.note("finished", "a", 3)
    assert Diary(tmp_path).fates["a"].status == "finished"
    assert [line["event"] for line in whole_lines(tmp_path / "sweep.jsonl")] == ["began", "finished"]
