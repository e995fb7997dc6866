"""The loop over several runs, with a real learner and recorded episodes instead of engines."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from loop_stage import Stage, set_stage, task_of
from transformers import LlamaForCausalLM
from upath import UPath

from rlora.core.setup import Setup
from rlora.records import DeliveryError, RloraError
from rlora.run import checkpoint, directory, episodes
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

    def create(policy: str, parent: str = "", **changes: Any) -> Run:
        settings = config(**{"steps": STEPS, "reward": "-"} | SETTINGS[policy] | changes)
        path = UPath(tmp_path / parent / policy)
        directory.create(path, settings, task)
        return Run(settings, task, Setup.of(settings), path, observers=changes.pop("observers", ()))

    return create


def bundles(run: Run) -> dict[int, tuple[bytes, bytes]]:
    return {
        number: (bundle.adapter.weights, bundle.state)
        for number in checkpoint.versions(run.path)
        for bundle in [checkpoint.read(checkpoint.bundle_path(run.path, number))]
    }


@pytest.mark.parametrize("turns", [rounds, first])
def test_runs_that_train_together_equal_runs_that_train_alone(
    stage: Stage, make: Callable[..., Run], turns: Any
) -> None:
    alone = {}
    for policy in SETTINGS:
        drive([run := make(policy, "alone")])
        alone[policy] = bundles(run)
    stage.calls.clear()
    together = [make(policy, "together") for policy in SETTINGS]
    drive(together, turns)
    for run in together:
        assert bundles(run) == alone[run.policy]
        assert run.number == STEPS
        lines = [json.loads(line) for line in directory.complete_lines(run.path)]
        assert [line["step"] for line in lines] == list(range(STEPS))
        assert directory.summary(run.path)["steps"] == STEPS
    for policy in SETTINGS:  # each version is swapped in before prompts are sent under it
        calls = [(call, number) for call, name, number in stage.calls if name == policy and call != "leave"]
        steps = [(call, number) for number in range(STEPS) for call in ("swap", "send", "take")]
        assert calls == [*steps, ("swap", STEPS)]  # the last version is evaluated
        assert stage.calls.count(("leave", policy, 0)) == 1


def test_prompts_of_all_due_runs_are_sent_before_any_run_waits(stage: Stage, make: Callable[..., Run]) -> None:
    drive([make(policy) for policy in SETTINGS], rounds)
    calls = [(call, policy) for call, policy, number in stage.calls if number == 1 and call in ("send", "take")]
    assert calls == [(call, policy) for call in ("send", "take") for policy in SETTINGS]


def test_an_error_in_one_run_ends_that_run_only(stage: Stage, make: Callable[..., Run]) -> None:
    stage.errors = {("swap", "two", 2): DeliveryError("version two-v2: the engine does not serve it")}
    runs = [make(policy) for policy in SETTINGS]
    with pytest.raises(RloraError, match=r"1 of 3 runs failed:\ntwo, after 2 steps: version two-v2: the engine does"):
        drive(runs)
    assert [run.number for run in runs] == [STEPS, 2, STEPS]
    assert [max(bundles(run)) for run in runs] == [STEPS, 2, STEPS]
    assert ("leave", "two", 0) in stage.calls
    assert not stage.learner.states
    assert "steps" not in directory.summary(runs[1].path)


def test_a_lone_run_raises_its_own_error_and_its_bundle_is_written(stage: Stage, make: Callable[..., Run]) -> None:
    stage.errors = {("take", "one", 3): RloraError("reward: it fails")}
    run = make("one")
    with pytest.raises(RloraError, match=r"^reward: it fails$"):
        drive([run])
    assert max(bundles(run)) == 3


def test_ctrl_c_ends_all_with_everything_saved(stage: Stage, make: Callable[..., Run]) -> None:
    stage.errors = {("take", "two", 3): KeyboardInterrupt()}  # type: ignore[dict-item]
    runs = [make(policy) for policy in SETTINGS]
    with pytest.raises(KeyboardInterrupt):
        drive(runs)
    assert [max(bundles(run)) for run in runs] == [3, 3, 3]  # running updates are lost


class Notes:
    """An observer that a user might write."""

    def __init__(self) -> None:
        self.rewards: list[float] = []

    def on_step(self, run: Run, figures: Mapping[str, Any]) -> None:
        self.rewards.append(figures["reward/mean"])
        if figures["step"] == 1:
            raise ValueError("no connection")


def most_steps_left(runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
    """A turn rule that a user might write: one run at a time, the one with the most steps left."""
    while active := [run for run in runs if run.is_active]:
        yield [max(active, key=lambda run: run.config.steps - run.number)]


def test_an_observer_and_a_turn_rule_plug_in(
    stage: Stage, make: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    notes = Notes()
    runs = [make("one"), make("two", steps=2)]
    runs[0].observers = (notes,)
    drive(runs, most_steps_left)
    assert notes.rewards == [0.5] * STEPS
    assert "one: Notes.on_step raised ValueError: no connection; training continues" in capsys.readouterr().err
    taken = [policy for call, policy, _ in stage.calls if call == "take"]
    assert taken == ["one", "one", "one", "two", "one", "two"]


def test_each_step_records_what_it_changed_in_the_weights(stage: Stage, make: Callable[..., Run], tiny: str) -> None:
    drive([run := make("two")])
    norms = json.loads((run.path / "matrices.json").read_text())
    base = LlamaForCausalLM.from_pretrained(tiny)
    weights = {name: float(base.get_submodule(name).weight.detach().norm()) for name in norms}
    assert norms == pytest.approx(weights, rel=1e-5)
    lines = [json.loads(line) for line in directory.complete_lines(run.path, "weights.jsonl")]
    assert [line["step"] for line in lines] == list(range(STEPS))
    for line, figures in zip(lines, run.figures, strict=True):
        assert len(line["norm"]) == len(norms)
        assert figures["weights/norm"] == pytest.approx(math.hypot(*line["norm"]), rel=1e-3)
        assert figures["weights/relative"] == pytest.approx(figures["weights/norm"] / math.hypot(*norms.values()))
    groups = checkpoint.read_update(run.path, STEPS)
    assert groups
    assert episodes.decode_training(groups)  # advantages and logprobs of the last update


def test_a_resumed_run_records_the_same_weights(
    stage: Stage, make: Callable[..., Run], config: Callable[..., Config]
) -> None:
    drive([whole := make("one", "whole")])
    stage.errors = {("take", "one", 2): KeyboardInterrupt()}  # type: ignore[dict-item]
    with pytest.raises(KeyboardInterrupt):
        drive([run := make("one", "resumed")])
    stage.errors = {}
    start = checkpoint.newest(run.path, directory.Provenance.of(run.path))
    drive([Run(run.config, run.task, run.setup, run.path, start)])
    assert (run.path / "weights.jsonl").read_text() == (whole.path / "weights.jsonl").read_text()
