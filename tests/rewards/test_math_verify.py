"""math-verify as a reward: the library's verdicts as statuses."""

import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import math_verify
import pytest
from conftest import NEEDS_SHARED, SHARED, case

from rlora.records import RloraError
from rlora.rewards import math_verify as ours
from rlora.scoring.pool import Pool
from rlora.scoring.worker import Setup

SPEC = "rlora.rewards.math_verify:answer"


@pytest.mark.parametrize(
    ("gold", "completion", "status"),
    [
        ("4", "It is 4.", "correct"),
        (4, r"\boxed{4}", "correct"),
        ("4", r"\boxed{5}", "wrong"),
        (r"\frac{1}{2}", "So it is 0.5.", "correct"),
        (r"The answer is $\frac{1}{2}$", r"\boxed{\frac{2}{4}}", "correct"),
        (r"Hence \boxed{\frac{1}{2}}.", r"\boxed{2}", "wrong"),
        ("4", "I do not know.", "unparsable"),
        ("4", "", "unparsable"),
    ],
)
def test_verdicts_are_statuses(gold: object, completion: str, status: str) -> None:
    assert ours.answer(completion, gold) == status


@pytest.mark.parametrize("gold", [None, "", " ", [4], True, {"answer": 4}, float("nan"), "$$"])
def test_an_unreadable_gold_is_an_error(gold: object) -> None:
    with pytest.raises(RloraError, match=r"the gold answer .*make the env return"):
        ours.answer("4", gold)


@NEEDS_SHARED
@pytest.mark.parametrize("name", ["math_verify", "trl_rewards", "hendrycks_math", "verifiers_math_rubric"])
def test_the_reward_agrees_with_the_library(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    for line in (SHARED / "graders" / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        marked = row["gold"] if "$" in row["gold"] or "boxed" in row["gold"] else f"${row['gold']}$"
        expected = math_verify.verify(math_verify.parse(marked), math_verify.parse(row["prediction"]))
        assert (ours.answer(row["prediction"], row["gold"]) == "correct") == expected, row


def test_time_limits_apply_in_a_worker_but_not_on_other_threads() -> None:
    slow = "$" + "(" * 12 + "x" + "+1)^{99}" * 12 + "$"
    with closing(Pool(Setup((SPEC,), deadline=20.0), 1)) as pool:
        scores = pool.submit(case(r"\boxed{4}", slow, "5", answer="4")).result(timeout=120)[0]
        assert [scores[0].status, scores[2].status] == ["correct", "wrong"]  # type: ignore[union-attr]
        assert scores[1].status in ("wrong", "unparsable")  # type: ignore[union-attr]
    with ThreadPoolExecutor() as threads:
        assert threads.submit(ours.answer, "4", "4").result() == "correct"


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    ours._library.cache_clear()
    yield
    ours._library.cache_clear()


@pytest.mark.usefixtures("missing")
def test_the_error_for_a_missing_library_says_how_to_install_it() -> None:
    with pytest.raises(RloraError, match=r"can't be imported .*; run `pip install 'rlora\[math-verify\]'`"):
        ours.answer("4", "8")
