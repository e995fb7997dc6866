import resource
import time

import pytest
from hostile import ODD_CLOTHES, hostile

from rlora.rewards.math.equivalence import SECONDS, grade

PAIRS = hostile()


def test_the_corpus_is_large_enough() -> None:
    assert len(PAIRS) >= 150


@pytest.mark.parametrize(("gold", "prediction"), PAIRS, ids=[f"{n}" for n in range(len(PAIRS))])
def test_hostile_answers_are_neither_right_nor_slow(gold: str, prediction: str) -> None:
    started = time.monotonic()
    status = grade(gold, prediction)
    assert status in ("wrong", "unparsable", "timeout"), prediction[:80]
    assert time.monotonic() - started < SECONDS + 0.5, prediction[:80]


@pytest.mark.parametrize(("gold", "prediction"), ODD_CLOTHES, ids=[f"{n}" for n in range(len(ODD_CLOTHES))])
def test_right_answers_in_odd_clothes_are_right(gold: str, prediction: str) -> None:
    assert grade(gold, prediction) == "correct", prediction[:80]


def test_the_corpus_takes_little_memory() -> None:
    initial = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for gold, prediction in PAIRS:
        grade(gold, prediction)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - initial < 200 * 1024  # kilobytes
