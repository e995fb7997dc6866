"""The math reward: whether a completion's answer equals the gold one. The rules are in docs/rewards.md.

`answer.py` finds the answer, `exact.py` compares plain numbers; `decoration.py`, `notation.py` and `expression.py` read
the rest into trees, which `structure.py` compares and `values.py` computes.
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

_KEY = os.environ.get("RLORA_SEED", "")  # of the run, so that it repeats itself
SECONDS = 2.0  # a pair; only on the main thread


class _OverrunError(BaseException):
    """Not an Exception, so that nothing on the way takes it for its own."""


def math_answer(completion: str, answer: Any) -> str:
    """The reward function: the status of a completion, given the gold answer of its prompt."""
    if is_empty(answer):
        raise RloraError(f"answer = {answer!r} is empty; name the column that holds the answers, or drop such rows")
    return grade(answer, completion)


def grade(gold: str | int | float, prediction: str) -> str:
    """ "correct", "wrong", "unparsable" (no answer, or one over the bounds), or "timeout" after two seconds.

    `gold` may be bare, in dollars, boxed or a whole solution; `prediction` an answer or a whole completion.
    """
    if is_empty(gold):
        return "wrong"
    found = find_answer(prediction)
    if found is None or not found.text or len(found.text) > MAX_LENGTH:
        return "unparsable"
    wanted = _gold(str(gold))
    if not wanted.text:
        return "wrong"
    one, other = number(wanted.text), number(plain(found.text).strip().strip("$* "))
    if one is not None and other is not None and not (wanted.boxes or wanted.percent or found.percent):
        if one == other:
            return "correct"
        if len(wanted.text) < 9 and len(found.text) < 16:  # else it may be a float printed out
            return "wrong"
    try:
        with _deadline(SECONDS):
            draw_points(f"{_KEY} {wanted.text} {found.text}")
            return _compare(wanted, found)
    except _OverrunError:
        return "timeout"
    except RecursionError:
        return "unparsable"


@lru_cache(4096)
def _gold(text: str) -> Answer:
    found = find_gold(text.strip())
    return found._replace(text=plain(found.text).strip().strip("$").strip())


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raises _OverrunError after so long; on other threads than the main one, and without SIGALRM, never."""
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


def _compare(wanted: Answer, found: Answer) -> str:
    gold_text = ", ".join(wanted.boxes) if wanted.boxes else wanted.text + (r"\%" if wanted.percent else "")
    text = found.text + (r"\%" if found.percent and ("%" in gold_text or "percent" in gold_text) else "")
    if (same := same_choice(gold_text, found)) is not None:
        return "correct" if same else "wrong"
    if (behind := option_text(text)) and _compare(wanted, found._replace(text=behind)) == "correct":
        return "correct"
    if words(gold_text) == words(text) and spelling(gold_text) == spelling(text):
        return "correct"
    if same_word_lists(gold_text, text):
        return "correct"
    if (one := clock_time(gold_text)) and (other := clock_time(text)):
        return "correct" if one[:2] == other[:2] and (one[2] == other[2] or not (one[2] and other[2])) else "wrong"
    gold, prediction = _tree(gold_text), _tree(text)
    if prediction is None:
        return "wrong" if gold is None or is_words(text) else "unparsable"
    if gold is None:
        return "wrong"
    candidates: list[Node | None] = [prediction]
    if gold.op in ("list", "set"):
        candidates.append(_tree(text, thousands=False))
        if found.boxes:
            candidates.append(_tree(", ".join(found.boxes)))
    upright = re.sub(r"(?:\s|~|\\[,;:! ])*\\mathrm\s*\{\s*([a-zA-Z]+)\s*\}", r" \1", text)
    measured = re.fullmatch(r"(.*[\d})])\s+([a-zA-Z]+(?:\s*/\s*[a-zA-Z]+)?(?:\^\{?-?\d\}?)?)", upright)
    if measured and not unknowns(gold) and unit(measured[2]):  # 12 m/s, whose letters are no unknowns here
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


def _decimal_comma(text: str, other: Node, gold: bool) -> Node | None:
    """1000,99 as a decimal, where the other side is one number."""
    match = re.fullmatch(r"\s*\$?\s*(-?\d+),(\d+)\s*\$?\s*", text)
    if match is None or other.op not in ("number", "neg", "unit") or (gold and len(match[2]) < 2 and match[1] != "0"):
        return None
    return _tree(f"{match[1]}.{match[2]}")
