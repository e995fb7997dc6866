import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from conftest import case

from rlora.records import RloraError
from rlora.rewards import calculator, countdown, gym
from rlora.rewards.integer import gold_integer, integer_answer, last_integer
from rlora.scoring.signatures import reward_function


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 + 4 = 7", 7),
        ("The answer is 7.", 7),
        ("7", 7),
        ("It is -12.", -12),
        ("12-5", 5),  # a minus between numbers is an operator
        ("$1,234 in all", 1234),
        ("3.5", None),
        ("2 or 3.5", 2),
        ("$4.00", 4),
        ("4.05", None),
        ("no number", None),
        ("", None),
        ("\u0667", 7),  # an Arabic-Indic seven
        ("\N{MINUS SIGN}4", -4),
        ("It is \N{MINUS SIGN}4.", -4),
        ("It is \N{FULLWIDTH HYPHEN-MINUS}4", -4),
        ("It is \N{EN DASH}4", -4),
        ("12\N{MINUS SIGN}5", 5),
        ("- 4", -4),  # golds are read alike
        ("x = - 4", -4),
        ("- 4 apples", 4),  # an item of a list
        ("-$4", -4),
        ("+4", 4),
        ("2^4", None),
        ("x^4", None),
        ("2^{4}", None),
        ("2^{-4}", None),
        ("2 ^ 4", None),
        ("2**4", None),
        ("2^4 = 16", 16),
        ("4\u00b2", None),
        ("10\u207b\u00b3", None),
        ("4%", None),
        ("4 %", None),
        (r"4\%", None),
        ("1,234%", None),
        ("3e4", None),
        ("3E-4", None),
        ("34e5", None),
        ("1.5e3", None),
        (r"3 \times 10^4", None),
        ("3 \u00d7 10^4", None),
        ("3/4", None),
        ("12/4=3", 3),
        (r"\frac{3}{4}", None),
        (r"\dfrac{12}{4} = 3", 3),
        ("It is .5", None),
        ("... 5 ...4", 4),
        (r"\sqrt{4}", None),
        ("\u221a4", None),
        (r"4\pi", None),
        ("1,234.5", None),
        ("52_8", None),
        ("x_1", None),
        ("x_{1} = 5", 5),
        ("7, or 2^4", 7),
        ("4!", 4),
        ("**4**", 4),
        ("**Answer:** 4", 4),
        ("_4_", 4),
        ("$4$", 4),
        (r"90^\circ", 90),
        (r"90^{\circ}", 90),
        ("4kg, 20th", 20),
        ("4 each", 4),
        ("4 e4", 4),
        ("(1,2)", 2),
        ("4\u00b0", 4),
        ("9" * 5000, None),  # int() would refuse it
    ],
)
def test_last_integer(text: str, expected: int | None) -> None:
    assert last_integer(text) == expected


def test_integer_answer() -> None:
    assert integer_answer("1 + 1 = 2", 2) == 1.0
    assert integer_answer("1 + 1 = 3", 2) == 0.0
    assert integer_answer("", 2) == 0.0


@pytest.mark.parametrize(
    "text", ["\N{MINUS SIGN}4", "\N{EN DASH}4", "- 4", "4.0", "\N{FULLWIDTH DIGIT FOUR}", "+4", "1,234"]
)
def test_completions_and_golds_are_read_alike(text: str) -> None:
    assert integer_answer(text, text) == 1.0
    assert integer_answer(text, -gold_integer(text)) == 0.0


@pytest.mark.parametrize(
    ("gold", "value"),
    [
        (4, 4),
        ("4", 4),
        (" 4 ", 4),
        ("4\n", 4),
        ("-3", -3),
        ("- 3", -3),
        ("+4", 4),
        ("1,234", 1234),
        ("4.0", 4),
        ("007", 7),
        ("\N{MINUS SIGN}3", -3),
        ("\N{FULLWIDTH DIGIT FOUR}", 4),
        ("\N{ARABIC-INDIC DIGIT FOUR}", 4),
        ("9" * 90, int("9" * 90)),
        (4.0, 4),
        (-0.0, 0),
        (Decimal("4.0"), 4),
        (Fraction(8, 2), 4),
        (np.int64(4), 4),
        (np.float32(4), 4),
    ],
)
def test_a_gold_may_be_the_text_of_an_integer(gold: object, value: int) -> None:
    assert gold_integer(gold) == value
    assert integer_answer(f"It is {value}.", gold) == 1.0
    assert integer_answer(f"It is {value + 1}.", gold) == 0.0
    assert calculator.answered(f"<<2*2>>4>> {value}", gold) == "correct"


@pytest.mark.parametrize(
    "gold",
    [
        "",
        " ",
        "four",
        "4.5",
        "4 apples",
        "#### 4",
        "$4$",
        "1,23",
        "1e3",
        "2^4",
        "4%",
        "4\u00b2",
        "3/1",
        "4 5",
        "9" * 200,
        "x" * 5000,
        4.5,
        True,
        False,
        None,
        [4],
        {"answer": 4},
        b"4",
        float("nan"),
        float("inf"),
        Decimal("Infinity"),
        Fraction(1, 2),
        4j,
        np.bool_(True),
    ],
)
@pytest.mark.parametrize("reward", [integer_answer, calculator.answered])
def test_a_gold_that_is_not_an_integer_is_an_error(gold: object, reward: Callable[..., Any]) -> None:
    (score,) = reward_function("rlora:f", reward)(case("It is 4.", answer=gold), [0])
    assert score.status == "error"
    assert re.search(r"the gold answer .* is not an integer: make the env return one", score.detail), score.detail
    assert "fix the function" not in score.detail


NUMBERS = [3, 3, 8, 8]


@pytest.mark.parametrize("target", [24, "24", 24.0, " 24 "])
@pytest.mark.parametrize(
    "numbers",
    [
        NUMBERS,
        tuple(NUMBERS),
        np.array(NUMBERS),
        [str(n) for n in NUMBERS],
        [float(n) for n in NUMBERS],
        "[3, 3, 8, 8]",
        "3,3,8,8",
        "3 3 8 8",
        "['3', '3', '8', '8']",
        '["3", "3", "8", "8"]',
    ],
)
def test_countdown_takes_numbers_as_data_sets_store_them(target: object, numbers: object) -> None:
    statuses = [
        countdown.countdown_answer(text, target, numbers) for text in ("8/(3-8/3) = 24", "8/(3-8/3) = 25", "8*3", "?")
    ]
    assert statuses == ["correct", "wrong", "wrong", "unparsable"]


@pytest.mark.parametrize(
    ("target", "numbers", "options"),
    [
        (24, None, {}),
        (24, [], {}),
        (24, "", {}),
        (24, "a b", {}),
        (24, [True], {}),
        (24, [3.5], {}),
        (24, {"a": 1}, {}),
        (None, NUMBERS, {}),
        ("many", NUMBERS, {}),
        (24, NUMBERS, {"use_all": "false"}),
    ],
)
def test_countdown_refuses_values_that_are_not_integers(
    target: object, numbers: object, options: dict[str, Any]
) -> None:
    with pytest.raises(RloraError, match=r"is not an integer: make the env|has none; make the env|use true or false"):
        countdown.countdown_answer("8/(3-8/3)", target, numbers, **options)


@pytest.mark.parametrize(
    ("gold", "completion", "status"),
    [
        (12, "12", "correct"),
        (12, "12.0", "correct"),
        (12, "13", "wrong"),
        (12.5, "12.5", "correct"),
        (12.0, "12", "correct"),
        (Decimal("1234.50"), "1,234.5", "correct"),
        (True, "true", "correct"),
        (1e22, "10000000000000000000000", "correct"),
    ],
)
def test_a_gym_gold_may_be_a_number(gold: object, completion: str, status: str) -> None:
    assert gym.gym_answer(f"<answer>{completion}</answer>", gold) == status


@pytest.mark.parametrize("gold", [None, "", "  ", [], [12], {}, float("nan"), float("inf")])
def test_a_gym_gold_that_is_neither_text_nor_a_number_is_an_error(gold: object) -> None:
    with pytest.raises(RloraError, match=r"the gold answer .* is neither text nor a number; make the env"):
        gym.gym_answer("<answer>12</answer>", gold)
