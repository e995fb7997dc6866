"""Which configuration a sweep says to take, and how sure it says that is."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlora.sweeps.halving import Halving
from rlora.sweeps.members import Member
from rlora.sweeps.plot import plot
from rlora.sweeps.results import Ended, Standing, quantile, standings, verdict


def of(
    configuration: str, after: float | None, status: str = "finished", rewards: Sequence[float] = (), **changes: Any
) -> Ended:
    return Ended(f"{configuration}-{after}", configuration, changes, status, rewards, 0.1, after)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_quantiles_of_students_t(freedom: int, expected: float) -> None:
    assert quantile(freedom) == pytest.approx(expected, abs=1e-3)


def test_an_interval_by_hand() -> None:
    standing = Standing("a", [0.7, 0.8, 0.9])
    assert standing.half == pytest.approx(4.3027 * 0.1 / math.sqrt(3), abs=1e-4)
    assert str(standing) == "0.800 (95% 0.552 to 1.048, 3 members)"
    assert str(Standing("a", [0.7])) == "0.700 (one member)"


def test_the_best_is_taken_and_what_can_not_be_told_from_it_is_named() -> None:
    members = [of("a", after) for after in (0.90, 0.91, 0.92)] + [of("b", after) for after in (0.88, 0.93, 0.86)]
    members += [of("c", after) for after in (0.30, 0.31, 0.29)] + [of("d", 0.99, "dropped")]
    figure, found = standings(members)
    assert figure == "accuracy after training"
    assert [each.configuration for each in found] == ["a", "b", "c"]
    told = verdict(members)
    assert told.startswith("take a: accuracy after training 0.910 (95% 0.885 to 0.935, 3 members)\n")
    assert "can't be told from it: b 0.890" in told
    assert "c 0.300" not in told
    assert "each other configuration is worse" in verdict([*members[:3], *members[6:]])


def test_one_member_says_nothing_of_how_sure_that_is() -> None:
    assert "train more seeds to know how sure that is" in verdict([of("a", 0.9), of("b", 0.1)])
    assert verdict([of("a", 0.9, "paused")]) == "no member has finished"


def test_rewards_count_where_there_is_no_accuracy() -> None:
    members = [of("a", None, rewards=[0, 0, 1, 1, 1, 1]), of("b", None, rewards=[0, 0, 0, 0, 1, 1])]
    figure, (first, second) = standings(members)
    assert figure == "mean reward of the last 4 steps"
    assert (first.mean, second.mean) == (1.0, 0.5)


@pytest.mark.parametrize("field", ["learner.lr", "learner.rank"])
def test_a_picture(field: str, tmp_path: Path) -> None:
    members = [
        of(f"{field} = {value}", 0.1 * seed + value, rewards=[0, value, seed], **{field: value, "seed": seed})
        for value in (1, 2)
        for seed in (0, 1)
    ] + [of("dropped", None, "dropped", rewards=[0.0, 0.1])]
    plot(members, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def member(name: str, **changes: Any) -> Member:
    return Member(name, changes, None)  # type: ignore[arg-type]


def test_configurations_that_are_level_stay() -> None:
    members = [member(name, rank=number, seed=0) for number, name in enumerate("abcd")]
    lines = {
        name: [{"step": step, "reward/mean": reward if step >= 2 else 9.0} for step in range(8)]
        for name, reward in zip("abcd", (0.5, 0.7, 0.5, 0.1), strict=True)
    }
    rule = Halving(at=(6,), over_last=4)
    assert rule.dropped(6, members, lines) == ["d"]
    assert Halving(at=(6,), keep=0.25).dropped(6, members, lines) == ["a", "c", "d"]
    lines["b"] = [{"step": 0, "reward/mean": None}]  # it has no reward yet
    assert "b" in Halving(at=(6,), keep=0.75).dropped(6, members, lines)
