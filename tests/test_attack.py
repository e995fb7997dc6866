"""Attacks on the grader: no mutation raises, no change of a gold's value is paid. benchmarks/attack.py makes more."""

import json
from pathlib import Path

import pytest
from attacks import answers, changes, mutated_pairs
from conftest import NEEDS_SHARED, SHARED
from rlora.rewards.answer import find_gold
from rlora.rewards.equivalence import grade

CASES = Path(__file__).with_name("cases")
PLAIN = [
    "7",
    "-3",
    r"\frac{2}{3}",
    "x^2+1",
    "(2, 5)",
    "1,2,3",
    r"2\sqrt{3}",
    r"\pi",
    "[1,4)",
    "x > 3",
    "12 \\text{ cm}",
]


@pytest.mark.parametrize("seed", range(4))
def test_no_mutation_raises(seed: int) -> None:
    statuses = {grade(*pair) for pair in mutated_pairs(answers([CASES]), 1500, seed)}
    assert statuses <= {"correct", "wrong", "unparsable", "timeout"}


@pytest.mark.parametrize("gold", PLAIN)
def test_no_change_of_a_value_is_paid(gold: str) -> None:
    paid = [(kind, text) for kind, text in changes(gold) if grade(gold, rf"\boxed{{{text}}}") == "correct"]
    assert not paid
    assert len(list(changes(gold))) > 20


@NEEDS_SHARED
def test_no_change_of_a_gold_of_math_is_paid() -> None:
    rows = json.loads((SHARED / "data" / "math_train" / "math.json").read_text("utf-8"))
    golds = sorted({find_gold(row["answer"]).text.strip("$ ") for row in rows if row["answer"]})[::20]
    paid = [
        (gold, text) for gold in golds for _, text in changes(gold) if grade(gold, rf"\boxed{{{text}}}") == "correct"
    ]
    assert not paid
