"""Attacks on the grader: no mutation raises, and no changed value is paid. benchmarks/attack.py runs more of them."""

import json
from pathlib import Path

import pytest
from attacks import answers, mutated_pairs
from changes import changes
from conftest import NEEDS_SHARED, SHARED
from oracle import differ, number

from rlora.rewards.equivalence import grade
from rlora.rewards.math.answer import find_gold

CASES = Path(__file__).with_name("cases")
PLAIN = [
    "7", "-3", r"\frac{2}{3}", "x^2+1", "(2, 5)", "(3, -1, 2)", "1,2,3", "2,2,5", r"2\sqrt{3}", r"\pi", "[1,4)",
    "x = 3", r"12 \text{ cm}", "y = 2x + 1", r"(-\infty, 2) \cup (3, \infty)", r"\{1, 4\}", "3:4", r"\text{C}",
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\text{A,C}", "1+2i", r"45^\circ", r"20\%", "1011_2", r"\sin x",
    r"\frac{x-1}{x+2}", "|x-3|", r"\log_2 7", "1,2", "2x + z - 5 = 0", "33,800", r"8:34 \text{ p.m.}",
]  # fmt: skip


def paid(golds: list[str]) -> list[tuple[str, str, str]]:
    return [
        (kind, gold, text)
        for gold in golds
        for kind, text in changes(gold)
        if grade(gold, rf"\boxed{{{text}}}") == "correct"
    ]


@pytest.mark.parametrize("seed", range(4))
def test_no_mutation_raises(seed: int) -> None:
    statuses = {grade(*pair) for pair in mutated_pairs(answers([CASES]), 1000, seed)}
    assert {"correct", "wrong", "unparsable"} == statuses


@pytest.mark.parametrize("gold", PLAIN)
def test_no_change_of_a_value_is_paid(gold: str) -> None:
    assert not paid([gold])
    assert len(changes(gold)) >= 40


@NEEDS_SHARED
def test_no_change_of_a_math_gold_is_paid() -> None:
    rows = json.loads((SHARED / "data" / "math_train" / "math.json").read_text("utf-8"))
    assert not paid(sorted({find_gold(row["answer"]).text.strip("$ ") for row in rows if row["answer"]})[::60])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"129\frac{1}{3}", 388 / 3), (r"-\frac17+1", 6 / 7), ("1011_2", 11), (r"20\%", 0.2), (r"9,\!000", 9000),
        ("2|-3|", 6), ("2^3!", 40320),
    ],
)  # fmt: skip
def test_the_oracle_reads_the_notation_of_golds(text: str, value: float) -> None:
    result = number(text)
    assert result is not None
    assert abs(result - value) < 1e-12


def test_the_oracle_finds_differences_only_if_they_exist() -> None:
    assert differ("x", r"\sqrt{x^2}")
    assert differ("n", "n + 10^{-9}")
    assert not differ(r"\frac12", "0.5")
    assert not differ("(x+1)^2", "x^2 + 2x + 1")
    assert not differ(r"\tan 15^\circ", r"|\tan 15^\circ|")  # equal in degrees
    assert not differ("f(2)", "3")  # can't be read
