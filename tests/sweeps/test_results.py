"""The best configuration of a sweep, and its confidence interval."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from rlora.sweeps.display import Display
from rlora.sweeps.halving import Halving
from rlora.sweeps.members import Member
from rlora.sweeps.plot import plot
from rlora.sweeps.results import MemberResult, Standing, quantile, standings, verdict


def result(
    configuration: str, accuracy: float | None, status: str = "finished", rewards: Sequence[float] = (), **changes: Any
) -> MemberResult:
    return MemberResult(f"{configuration}-{accuracy}", configuration, changes, status, rewards, 0.1, accuracy)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_quantiles_of_students_t(freedom: int, expected: float) -> None:
    assert quantile(freedom) == pytest.approx(expected, abs=1e-3)


def test_an_interval_by_hand() -> None:
    standing = Standing("a", [0.7, 0.8, 0.9])
    assert standing.half == pytest.approx(4.3027 * 0.1 / math.sqrt(3), abs=1e-4)
    assert str(standing) == "0.800 (95% 0.552 to 1.048, 3 members)"
    assert str(Standing("a", [0.7])) == "0.700 (one member)"


def test_the_best_configuration_and_similar_ones_are_named() -> None:
    accuracies = {"a": (0.90, 0.91, 0.92), "b": (0.88, 0.93, 0.86), "c": (0.30, 0.31, 0.29)}
    members = [result(name, accuracy) for name, values in accuracies.items() for accuracy in values]
    members.append(result("d", 0.99, "dropped"))
    metric, ranking = standings(members)
    assert metric == "accuracy after training"
    assert [standing.configuration for standing in ranking] == ["a", "b", "c"]
    text = verdict(members)
    assert text.startswith("best configuration a: accuracy after training 0.910 (95% 0.885 to 0.935, 3 members)\n")
    assert "not significantly worse: b 0.890" in text
    assert "c 0.300" not in text
    assert "every other configuration is significantly worse" in verdict([*members[:3], *members[6:]])


def test_one_member_has_no_confidence_interval() -> None:
    assert "train more seeds for a confidence interval" in verdict([result("a", 0.9), result("b", 0.1)])
    assert verdict([result("a", 0.9, "paused")]) == "no member has finished"


def test_rewards_are_compared_if_there_is_no_accuracy() -> None:
    members = [result("a", None, rewards=[0, 0, 1, 1, 1, 1]), result("b", None, rewards=[0, 0, 0, 0, 1, 1])]
    metric, (first, second) = standings(members)
    assert metric == "mean reward of the last 4 steps"
    assert (first.mean, second.mean) == (1.0, 0.5)


@pytest.mark.parametrize("field", ["learner.lr", "learner.rank"])
def test_a_plot(field: str, tmp_path: Path) -> None:
    members = [
        result(f"{field} = {value}", 0.1 * seed + value, rewards=[0, value, seed], **{field: value, "seed": seed})
        for value in (1, 2)
        for seed in (0, 1)
    ] + [result("dropped", None, "dropped", rewards=[0.0, 0.1])]
    plot(members, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_long_names_leave_room_for_a_plot(tmp_path: Path) -> None:
    """matplotlib warns if names leave no room, and warnings are errors here."""
    name = f"reward = {'/a/long/path' * 12}/mine.py:reward"
    plot([result(name, 0.5, rewards=[0.0, 0.5]), result("other", 0.2, rewards=[0.0, 0.2])], tmp_path / "sweep.png")


def member(name: str, **changes: Any) -> Member:
    return Member(name, changes, None)  # type: ignore[arg-type]


def test_tied_configurations_are_kept() -> None:
    members = [member(name, rank=number, seed=0) for number, name in enumerate("abcd")]
    lines = {
        name: [{"step": step, "reward/mean": reward if step >= 2 else 9.0} for step in range(8)]
        for name, reward in zip("abcd", (0.5, 0.7, 0.5, 0.1), strict=True)
    }
    rule = Halving(at=(6,), over_last=4)
    assert rule.dropped(6, members, lines) == ["d"]
    assert Halving(at=(6,), keep=0.25).dropped(6, members, lines) == ["a", "c", "d"]
    lines["b"] = [{"step": 0, "reward/mean": None}]  # without a reward so far
    assert "b" in Halving(at=(6,), keep=0.75).dropped(6, members, lines)


@pytest.mark.parametrize(
    ("by", "values", "dropped"),
    [
        ("", [{"objective/nll": 0.5}, {"objective/nll": 0.7}], "b"),
        (
            "",
            [{"objective/nll": 0.5, "objective/accuracy": 0.5}, {"objective/nll": 0.7, "objective/accuracy": 0.6}],
            "a",
        ),
        ("-held_out/nll", [{"held_out/nll": 0.5}, {"held_out/nll": 0.4, "objective/nll": 9.0}], "a"),
        ("-held_out/nll", [{"held_out/nll": 0.5}, {}], "b"),
    ],
)
def test_members_without_rewards_are_compared_by_their_losses(
    by: str, values: list[dict[str, float]], dropped: str
) -> None:
    members = [member(name, rank=number, seed=0) for number, name in enumerate("ab")]
    lines = {name: [{"step": 0, **line}] for name, line in zip("ab", values, strict=True)}
    assert Halving(at=(1,), by=by).dropped(1, members, lines) == [dropped]


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ({"reward/mean": 0.25, "accuracy/held_out": 0.5}, ["reward so far", "0.250", "0.500"]),
        ({"objective/nll": 1.5, "held_out/nll": 1.75}, ["log p or accuracy so far", "-1.500", "1.750"]),
        ({"objective/accuracy": 0.75}, ["log p or accuracy so far", "0.750"]),
    ],
)  # fmt: skip
def test_the_table_of_a_running_sweep_shows_the_figure_that_members_have(
    figures: dict[str, Any], shown: list[str], tmp_path: Path
) -> None:
    display = Display(tmp_path)
    run: Any = SimpleNamespace(policy="a", number=1, config=SimpleNamespace(steps=2), is_active=True, failure=None)
    display.on_step(run, figures)
    console = Console(width=120, record=True)
    console.print(display._table([run]))
    text = console.export_text()
    assert [part for part in shown if part not in text] == []
