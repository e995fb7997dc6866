"""The math reward: whether a completion's answer equals the gold answer. The rules are in docs/math.md.

`answer.py` finds the answer, and `exact.py` compares plain numbers. `decoration.py`, `notation.py` and `expression.py`
parse other answers into trees, which `structure.py` compares and `values.py` evaluates.
"""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

from rlora.records import RloraError

from .answer import Answer, find_answer, find_gold, is_empty
from .choice import option_text, same_choice
from .decoration import bare
from .exact import number, plain
from .expression import read
from .notation import UnreadableError
from .prose import MAX_LENGTH
from .structure import equal
from .tree import Node
from .units import unit
from .values import draw_points, unknowns
from .wording import clock_time, is_words, same_word_lists, spelling, words

_KEY = os.environ.get("RLORA_SEED", "")  # the run's seed, so that its grades are reproducible
SECONDS = 2.0  # per pair, on the main thread only


class _OverrunError(BaseException):
    """The time limit of a comparison has passed. Not an Exception, so that libraries in between do not catch it."""


def math_answer(completion: str, answer: Any) -> str:
    """Return the status of a completion, as `grade` does, for the gold answer of its prompt.

    Raises RloraError if `answer` is empty.
    """
    if is_empty(answer):
        raise RloraError(
            f"the gold answer {answer!r} is empty; make the env return an answer (env_args.answer of rlora.envs.table "
            "names the column), or drop the row"
        )
    return grade(answer, completion)


def grade(gold: str | int | float, prediction: str) -> str:
    """Return the status of an answer: "correct", "wrong", "unparsable" or "timeout".

    `gold` can be bare, in dollars, boxed or a full solution; `prediction` is an answer or a full completion. An empty
    gold gives "wrong". A prediction without an answer, or with an answer that exceeds the bounds, gives "unparsable". A
    comparison of more than two seconds gives "timeout", but only on the main thread, where SIGALRM works.
    """
    if is_empty(gold):
        return "wrong"
    answer = find_answer(prediction)
    if answer is None or not answer.text or len(answer.text) > MAX_LENGTH:
        return "unparsable"
    expected = _gold_answer(str(gold))
    if not expected.text:
        return "wrong"
    gold_number, answer_number = number(expected.text), number(plain(answer.text).strip().strip("$* "))
    if (
        gold_number is not None
        and answer_number is not None
        and not (expected.boxes or expected.percent or answer.percent)
    ):
        if gold_number == answer_number:
            return "correct"
        if len(expected.text) < 9 and len(answer.text) < 16:  # longer ones may be printed floats
            return "wrong"
    try:
        with _deadline(SECONDS):
            draw_points(f"{_KEY} {expected.text} {answer.text}")
            return _compare(expected, answer)
    except _OverrunError:
        return "timeout"
    except RecursionError:
        return "unparsable"


@lru_cache(4096)
def _gold_answer(text: str) -> Answer:
    answer = find_gold(text.strip())
    return answer._replace(text=plain(answer.text).strip().strip("$").strip())


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise _OverrunError after `seconds`. Has no effect without SIGALRM or outside the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def overrun(_signal: int, _frame: FrameType | None) -> None:
        raise _OverrunError

    handler = signal.signal(signal.SIGALRM, overrun)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _compare(expected: Answer, answer: Answer) -> str:
    gold_text = ", ".join(expected.boxes) if expected.boxes else expected.text + (r"\%" if expected.percent else "")
    text = answer.text + (r"\%" if answer.percent and ("%" in gold_text or "percent" in gold_text) else "")
    if (is_same := same_choice(gold_text, answer)) is not None:
        return "correct" if is_same else "wrong"
    if (option := option_text(text)) and _compare(expected, answer._replace(text=option)) == "correct":
        return "correct"
    if words(gold_text) == words(text) and spelling(gold_text) == spelling(text):
        return "correct"
    if same_word_lists(gold_text, text):
        return "correct"
    if (gold_time := clock_time(gold_text)) and (answer_time := clock_time(text)):
        return (
            "correct"
            if gold_time[:2] == answer_time[:2]
            and (gold_time[2] == answer_time[2] or not (gold_time[2] and answer_time[2]))
            else "wrong"
        )
    gold, prediction = _tree(gold_text), _tree(text)
    if prediction is None:
        return "wrong" if gold is None or is_words(text) else "unparsable"
    if gold is None:
        return "wrong"
    candidates: list[Node | None] = [prediction]
    if gold.op in ("list", "set"):
        candidates.append(_tree(text, thousands=False))
        if answer.boxes:
            candidates.append(_tree(", ".join(answer.boxes)))
    upright = re.sub(r"(?:\s|~|\\[,;:! ])*\\mathrm\s*\{\s*([a-zA-Z]+)\s*\}", r" \1", text)
    measured = re.fullmatch(r"(.*[\d})])\s+([a-zA-Z]+(?:\s*/\s*[a-zA-Z]+)?(?:\^\{?-?\d\}?)?)", upright)
    if measured and not unknowns(gold) and unit(measured[2]):  # 12 m/s: its letters are not unknowns
        candidates.append(_tree(rf"{measured[1]}\text{{ {measured[2]}}}"))
    if (decimal := _decimal_comma(text, gold, gold=False)) is not None:
        candidates.append(decimal)
    golds = [gold]
    if (decimal := _decimal_comma(gold_text, prediction, gold=True)) is not None:
        golds.append(decimal)
    return "correct" if any(equal(g, p) for g in golds for p in candidates if p is not None) else "wrong"


def _tree(text: str, thousands: bool = True) -> Node | None:
    try:
        return read(bare(text), thousands)
    except UnreadableError:
        return None


def _decimal_comma(text: str, side: Node, gold: bool) -> Node | None:
    """Read 1000,99 as a decimal, if the other side is one number."""
    match = re.fullmatch(r"\s*\$?\s*(-?\d+),(\d+)\s*\$?\s*", text)
    if match is None or side.op not in ("number", "neg", "unit") or (gold and len(match[2]) < 2 and match[1] != "0"):
        return None
    return _tree(f"{match[1]}.{match[2]}")
