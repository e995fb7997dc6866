"""The math reward on the labelled pairs of other graders, real models' outputs among them."""

import json
from functools import cache
from typing import Any

import pytest
from conftest import NEEDS_SHARED, SHARED

from rlora.rewards.equivalence import grade

pytestmark = NEEDS_SHARED

# Where we say otherwise than the label, and whose mistake that is: docs/rewards.md.
DISAGREE = {"hendrycks_math-10", "math_verify-31", "math_verify-32", "math_verify-187"}
FLAGGED = {  # the labels say themselves that they are conventions, or wrong
    "hendrycks_math-1", "hendrycks_math-8", "math_verify-133", "math_verify-139", "math_verify-253", "math_verify-263",
}  # fmt: skip
MODEL_OUTPUTS = {"gsm8k_model_outputs", "qwen_math_outputs"}


@cache
def rows() -> list[dict[str, Any]]:
    found = []
    for file in sorted((SHARED / "graders").glob("*.jsonl")):
        found += [{"file": file.stem, **json.loads(line)} for line in file.read_text().splitlines()]
    return [row for row in found if not row["mode"].startswith("format")]


@cache
def wrong() -> set[str]:
    return {row["id"] for row in rows() if (grade(row["gold"], row["prediction"]) == "correct") != row["expected"]}


def test_all_disagreements_are_known() -> None:
    assert len(rows()) >= 2500
    assert wrong() == DISAGREE | FLAGGED


@pytest.mark.parametrize("file", sorted(MODEL_OUTPUTS))
def test_no_output_of_a_real_model_is_graded_otherwise_than_its_label(file: str) -> None:
    of_file = [row["id"] for row in rows() if row["file"] == file]
    assert len(of_file) >= 200
    assert not wrong().intersection(of_file)


def test_right_and_wrong_ones_are_both_among_them() -> None:
    expected = [row["expected"] for row in rows()]
    assert min(expected.count(True), expected.count(False)) > 800
