import json

import pytest
from conftest import NEEDS_SHARED, SHARED, case
from rlora.rewards import shaping
from rlora.rewards.styles import plug


@NEEDS_SHARED
def test_open_r1s_own_cases_of_its_format() -> None:
    rows = [json.loads(line) for line in (SHARED / "graders" / "open_r1_format.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert shaping.think_answer(row["prediction"]) == row["expected"], row


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nSo.\n</think>\nIt is 4.", 1.0),
        ("<think></think>", 1.0),
        ("<think>\nSo. It is 4.", 0.0),
        ("So.\n</think>\nIt is 4.", 0.0),
        ("First <think>so</think>", 0.0),
        ("<think>a<think>b</think></think>", 0.0),
        ("<think>a</think>b</think>", 0.0),
    ],
)
def test_one_block_of_thought_at_the_beginning(text: str, expected: float) -> None:
    assert shaping.think(text) == expected


def test_one_box_after_all_thinking() -> None:
    assert shaping.boxed(r"<think>2 + 2</think> \boxed{4}") == 1.0
    assert shaping.boxed(r"<think>\boxed{4}</think> 4") == shaping.boxed(r"\boxed{3} \boxed{4}") == 0.0
    assert shaping.boxed(r"<think>\boxed{3}</think> \boxed{4}") == 0.0


def test_lengths() -> None:
    assert [shaping.short(range(n), budget=4) for n in (0, 4, 8)] == [1.0, 1.0, 0.5]
    assert [shaping.cosine(range(n), budget=4) for n in (0, 2, 4, 9)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert shaping.shortest(["", "", ""], [range(2), range(4), range(3)]) == [0.5, -0.5, 0.0]
    assert shaping.shortest(["", ""], [range(2), range(2)]) == [0.0, 0.0]


def test_repetition() -> None:
    assert shaping.repeated("a b c d") == 1.0
    assert shaping.repeated("a b c a b c a b c", words=3) == pytest.approx(3 / 7)
    assert shaping.repeated("a") == 1.0


@pytest.mark.parametrize("name", ["think_answer", "think", "boxed", "short", "shortest", "repeated", "cosine"])
def test_each_can_be_named_as_a_reward(name: str) -> None:
    made = plug(f"rlora.rewards.shaping:{name}", getattr(shaping, name))
    found = made(case("one", "two three"), range(2))
    assert all(score.value is not None for score in found), found
