from itertools import permutations, product
from pathlib import Path

import pytest
from conftest import NEEDS_SHARED, SHARED

from rlora.envs.countdown import Countdown, Game24
from rlora.records import RloraError
from rlora.rewards.countdown import countdown_answer

HAND = [3, 3, 8, 8]


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        ("<answer>8/(3-8/3)</answer>", "correct"),
        ("<answer> 8 / (3 - 8 / 3) = 24 </answer>", "correct"),
        ("<answer>1</answer> no, <answer>8/(3-8/3)</answer>", "correct"),
        ("It is \\boxed{8 \\div (3 - 8 \\div 3)}.", "correct"),
        ("First 8/3.\nThe answer is 8 ÷ (3 − 8 ÷ 3) = 24.", "correct"),  # noqa: RUF001
        ("8/(3-8/3)", "correct"),
        ("<think>8*3</think><answer>8/(3-8/3)</answer>", "correct"),
        ("-8/(8/3-3)", "correct"),
        ("8/(3-8/3) = 25", "wrong"),
        ("8*3", "wrong"),  # not all numbers
        ("8*3+8-8", "wrong"),
        ("8/(3-8/3)+8-8", "wrong"),
        ("24", "wrong"),
        ("88/3-3", "wrong"),
        ("8/(3-3)+8", "wrong"),  # division by zero
        ("<think>8/(3-8/3)</think>", "unparsable"),
        ("<think><answer>8/(3-8/3)</answer>", "unparsable"),
        ("", "unparsable"),
        ("no idea", "unparsable"),
        ("8/(3-8/3", "unparsable"),
        ("8//3", "unparsable"),
        ("8**3**8**8", "unparsable"),
        ("8(3-8)", "unparsable"),
        ("8.0/(3-8/3)", "unparsable"),
        ("08/(3-8/3)", "unparsable"),
        ("8 if 3 else 3", "unparsable"),
        ("24 = 8/(3-8/3)", "unparsable"),
        ("__import__('os').abort()", "unparsable"),
        ("8/(3-8/3)\x00", "unparsable"),
        ("\ud800", "unparsable"),
        ("(" * 190 + "8", "unparsable"),
        ("-" * 199 + "8", "wrong"),
        ("(" * 100_000, "unparsable"),
        ("9" * 100_000, "unparsable"),
        ("<answer>" * 50_000, "unparsable"),
        ("answer " * 50_000, "unparsable"),
    ],
)
def test_countdown_answer(completion: str, status: str) -> None:
    assert countdown_answer(completion, 24, HAND) == status


def test_numbers_may_be_left_over_without_use_all() -> None:
    assert countdown_answer("8*3", 24, HAND, use_all=False) == "correct"
    assert countdown_answer("8+8+8", 24, HAND, use_all=False) == "wrong"
    assert countdown_answer("8*3 = 24", 24, HAND, use_all=True) == "wrong"


def solvable(numbers: list[int], target: int) -> bool:
    """Whether some expression of the three numbers equals the target, according to the reward."""
    shapes = ["({}{}{}){}{}", "{}{}({}{}{})"]
    return any(
        countdown_answer(shape.format(a, p, b, q, c), target, numbers) == "correct"
        for shape in shapes
        for a, b, c in permutations(numbers)
        for p, q in product("+-*/", repeat=2)
    )


def test_countdown_makes_problems_that_have_a_solution() -> None:
    env = Countdown(count=3, high=20, size=40, held_out_size=10)
    train, held_out = env.train(), env.held_out()
    assert (len(train), len(held_out)) == (40, 10)
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}
    assert all(solvable(prompt.columns["numbers"], prompt.answer) for prompt in train)
    assert all(10 <= prompt.answer <= 99 for prompt in train)
    assert Countdown(count=3, high=20, size=40, held_out_size=10).train() == train
    assert Countdown(count=3, high=20, size=40, held_out_size=10, seed=1).train() != train


def test_countdown_is_graded_by_how_many_numbers_there_are() -> None:
    train = Countdown(count="3,5", size=50).train()
    assert {prompt.columns["level"] for prompt in train} == {3, 5}
    assert all(len(prompt.columns["numbers"]) == prompt.columns["level"] for prompt in train)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 1}, "count = 1: use 2 to 8"),
        ({"count": "3,x"}, "count = '3,x'"),
        ({"low": 9, "high": 8}, "low = 9"),
        ({"target_low": 9, "target_high": 8}, "target_low = 9"),
        ({"template": "Go."}, "template = 'Go.': it needs the placeholder {numbers}"),
    ],
)
def test_countdown_refuses_invalid_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RloraError, match=message):
        Countdown(**arguments)  # type: ignore[arg-type]


def test_countdown_reports_too_few_problems() -> None:
    with pytest.raises(RloraError, match="distinct problems were found"):
        Countdown(count=2, high=3, target_low=1, target_high=9, size=1000).train()


def test_game24_names_the_row_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "24.csv"
    path.write_text("Rank,Puzzles\n1,1 1 4 6\n2,1 1 4 x\n")
    with pytest.raises(RloraError, match=r"row 1: .*every row needs Puzzles"):
        Game24(str(path)).train()


@NEEDS_SHARED
def test_game24_real_data() -> None:
    env = Game24(str(SHARED / "data" / "game24" / "24.csv"))
    train, held_out = env.train(), env.held_out()
    assert (len(train), len(held_out)) == (1262, 100)
    assert train[0].columns == {"numbers": [1, 1, 4, 6], "use_all": True, "level": 1}
    assert countdown_answer("<answer>(6 - 1 - 1) * 4</answer>", train[0].answer, train[0].columns["numbers"]) == "wrong"
    assert countdown_answer("<answer>6 * 4 * 1 * 1</answer>", train[0].answer, train[0].columns["numbers"]) == "correct"
