"""The loop over several runs: a real learner, and episodes from a record in place of engines."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from loop_stage import Stage, set_stage, task_of
from upath import UPath

from rlora.core.setup import Setup
from rlora.records import DeliveryError, RloraError
from rlora.run import checkpoint, directory
from rlora.run.run import Run
from rlora.run.turns import first, rounds
from rlora.settings import Config
from rlora.train import drive

STEPS = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "one": {"learner": {"lr": 0.01}},
    "two": {"learner": {"lr": 0.02, "rank": 2}, "algorithm": {"name": "grpo", "kl": 0.1}, "seed": 1},
    "three": {"algorithm": {"name": "ppo", "minibatches": 2}, "learner": {"lr": 0.01, "targets": "mlp"}, "seed": 2},
}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tiny: str) -> Stage:
    return set_stage(monkeypatch, tiny)


@pytest.fixture
def make(config: Callable[..., Config], tmp_path: Path, tiny: str) -> Callable[..., Run]:
    task = task_of(tiny)

    def of(policy: str, where: str = "", **changes: Any) -> Run:
        own = config(**{"steps": STEPS, "reward": "-"} | SETTINGS[policy] | changes)
        place = UPath(tmp_path / where / policy)
        directory.create(place, own, task)
        return Run(own, task, Setup.of(own), place, observers=changes.pop("observers", ()))

    return of


def bundles(run: Run) -> dict[int, tuple[bytes, bytes]]:
    return {
        number: (bundle.adapter.weights, bundle.state)
        for number in checkpoint.versions(run.place)
        for bundle in [checkpoint.read(checkpoint.bundle_path(run.place, number))]
    }


@pytest.mark.parametrize("turns", [rounds, first])
def test_runs_that_train_together_leave_what_each_would_alone(
    stage: Stage, make: Callable[..., Run], turns: Any
) -> None:
    alone = {}
    for policy in SETTINGS:
        drive([run := make(policy, "alone")])
        alone[policy] = bundles(run)
    stage.told.clear()
    together = [make(policy, "together") for policy in SETTINGS]
    drive(together, turns)
    for run in together:
        assert bundles(run) == alone[run.policy]
        assert run.number == STEPS
        lines = [json.loads(line) for line in directory.whole_lines(run.place)]
        assert [line["step"] for line in lines] == list(range(STEPS))
        assert directory.summary(run.place)["steps"] == STEPS
    for policy in SETTINGS:  # each version is swapped in before prompts are sent under it
        own = [(what, number) for what, of, number in stage.told if of == policy and what != "leave"]
        assert own[:3] == [("swap", 0), ("send", 0), ("take", 0)]
        steps = [(what, n) for n in range(STEPS) for what in ("swap", "send", "take")]
        assert own == [*steps, ("swap", STEPS)]  # the last one is evaluated
        assert stage.told.count(("leave", policy, 0)) == 1


def test_all_that_are_due_are_sampled_before_any_waits(stage: Stage, make: Callable[..., Run]) -> None:
    drive([make(policy) for policy in SETTINGS], rounds)
    of_step = [(what, policy) for what, policy, number in stage.told if number == 1 and what in ("send", "take")]
    assert of_step == [(what, policy) for what in ("send", "take") for policy in SETTINGS]


def test_what_fails_in_one_run_ends_that_one(stage: Stage, make: Callable[..., Run]) -> None:
    stage.wrong = {("swap", "two", 2): DeliveryError("version two-v2: the engine does not serve it")}
    runs = [make(policy) for policy in SETTINGS]
    with pytest.raises(RloraError, match=r"1 of 3 runs failed:\ntwo, after 2 steps: version two-v2: the engine does"):
        drive(runs)
    assert [run.number for run in runs] == [STEPS, 2, STEPS]
    assert [max(bundles(run)) for run in runs] == [STEPS, 2, STEPS]
    assert ("leave", "two", 0) in stage.told
    assert not stage.learner.held
    assert "steps" not in directory.summary(runs[1].place)


def test_a_lone_run_raises_its_own_error_and_its_bundle_is_written(stage: Stage, make: Callable[..., Run]) -> None:
    stage.wrong = {("take", "one", 3): RloraError("reward: it is ill")}
    run = make("one")
    with pytest.raises(RloraError, match=r"^reward: it is ill$"):
        drive([run])
    assert max(bundles(run)) == 3


def test_ctrl_c_ends_all_with_everything_saved(stage: Stage, make: Callable[..., Run]) -> None:
    stage.wrong = {("take", "two", 3): KeyboardInterrupt()}  # type: ignore[dict-item]
    runs = [make(policy) for policy in SETTINGS]
    with pytest.raises(KeyboardInterrupt):
        drive(runs)
    assert [max(bundles(run)) for run in runs] == [3, 3, 3]  # updates that were under way are lost


class Notes:
    """An observer as a user writes one."""

    def __init__(self) -> None:
        self.rewards: list[float] = []

    def on_step(self, run: Run, figures: Mapping[str, Any]) -> None:
        self.rewards.append(figures["reward/mean"])
        if figures["step"] == 1:
            raise ValueError("a tracker that is away")


def most_steps_left(runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
    """A rule of turns as a user writes one: one run at a time, the one with the most steps left."""
    while going := [run for run in runs if run.going]:
        yield [max(going, key=lambda run: run.config.steps - run.number)]


def test_an_observer_and_a_rule_of_turns_plug_in(
    stage: Stage, make: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    notes = Notes()
    runs = [make("one"), make("two", steps=2)]
    runs[0].observers = (notes,)
    drive(runs, most_steps_left)
    assert notes.rewards == [0.5] * STEPS
    assert "one: Notes.on_step raised ValueError: a tracker that is away; training goes on" in capsys.readouterr().err
    taken = [policy for what, policy, _ in stage.told if what == "take"]
    assert taken == ["one", "one", "one", "two", "one", "two"]
