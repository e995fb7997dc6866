"""The math reward on the labelled pairs of other graders, including outputs of real models."""

import json
from functools import cache
from typing import Any

import pytest
from conftest import NEEDS_SHARED, SHARED

from rlora.rewards.equivalence import grade

pytestmark = NEEDS_SHARED

# Grades that differ from the label; docs/math.md says which side is wrong.
LABEL_DISPUTED = {"hendrycks_math-10", "math_verify-31", "math_verify-32", "math_verify-187"}
FLAGGED = {  # labels that are marked as conventions or as wrong
    "hendrycks_math-1", "hendrycks_math-8", "math_verify-133", "math_verify-139", "math_verify-253", "math_verify-263",
}  # fmt: skip
MODEL_OUTPUTS = {"gsm8k_model_outputs", "qwen_math_outputs"}


@cache
def rows() -> list[dict[str, Any]]:
    labelled = []
    for file in sorted((SHARED / "graders").glob("*.jsonl")):
        labelled += [{"file": file.stem, **json.loads(line)} for line in file.read_text().splitlines()]
    return [row for row in labelled if not row["mode"].startswith("format")]


@cache
def disagreements() -> set[str]:
    return {row["id"] for row in rows() if (grade(row["gold"], row["prediction"]) == "correct") != row["expected"]}


def test_all_disagreements_are_known() -> None:
    assert len(rows()) >= 2500
    assert disagreements() == LABEL_DISPUTED | FLAGGED


@pytest.mark.parametrize("file", sorted(MODEL_OUTPUTS))
def test_real_model_outputs_are_graded_as_labelled(file: str) -> None:
    ids = [row["id"] for row in rows() if row["file"] == file]
    assert len(ids) >= 200
    assert not disagreements().intersection(ids)


def test_right_and_wrong_answers_are_both_well_represented() -> None:
    expected = [row["expected"] for row in rows()]
    assert min(expected.count(True), expected.count(False)) > 800
