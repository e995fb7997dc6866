import pytest
from rlora.rewards.integer import integer_answer, last_integer


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
        ("no number", None),
        ("", None),
        ("\u0667", None),  # an Arabic-Indic seven
        ("9" * 5000, None),  # int() would refuse it
    ],
)
def test_last_integer(text: str, expected: int | None) -> None:
    assert last_integer(text) == expected


def test_integer_answer() -> None:
    assert integer_answer("1 + 1 = 2", 2) == 1.0
    assert integer_answer("1 + 1 = 3", 2) == 0.0
    assert integer_answer("", 2) == 0.0
