from dataclasses import replace
from itertools import combinations
from statistics import fmean

import pytest
from conftest import episode, group

from rlora.records import Group
from rlora.rollout.evaluate import pass_at, rows, summarise, wilson


def graded(*correct: bool) -> Group:
    """A group whose completions are correct or wrong."""
    episodes = (replace(episode([1, 2], float(c)), status="correct" if c else "wrong") for c in correct)
    return group([5], *episodes)


def test_pass_at_k_is_the_share_of_draws_of_k_with_a_correct_one() -> None:
    correct = (True, False, False, True, False)
    for k in range(1, 6):
        drawn = [any(draw) for draw in combinations(correct, k)]
        assert pass_at(k, [graded(*correct)]).estimate == pytest.approx(fmean(drawn))


def test_pass_at_1_is_the_mean_over_prompts() -> None:
    groups = [graded(True, True), graded(True, False), graded(False, False)]
    assert pass_at(1, groups).estimate == pytest.approx(0.5)
    assert pass_at(2, groups).estimate == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.5, 100, 0.4038, 0.5962), (8 / 10, 10, 0.4902, 0.9433)],
)
def test_wilsons_interval_against_published_values(share: float, count: int, low: float, high: float) -> None:
    interval = wilson(share, count)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)


def test_a_completion_without_a_reward_counts_as_incorrect() -> None:
    scored = graded(True, False, False)
    skipped = replace(scored.episodes[2], reward=None, status="")
    result = summarise([replace(scored, episodes=(*scored.episodes[:2], skipped))])
    assert result.accuracy.estimate == pytest.approx(1 / 3)
    assert result.statuses == {"correct": 1, "wrong": 1, "skipped": 1}


def test_every_completion_is_a_row_with_its_status_and_reward() -> None:
    table = list(rows([graded(True, False), graded(False)]))
    assert [(row["prompt"], row["sample"], row["status"], row["reward"]) for row in table] == [
        (0, 0, "correct", 1.0), (0, 1, "wrong", 0.0), (1, 0, "wrong", 0.0),
    ]  # fmt: skip
