"""math-verify as a reward, for figures that compare with published ones: `pip install 'rlora[math-verify]'`.

`rlora.rewards.equivalence:math_answer` takes fewer wrong answers for right ones, and needs nothing installed.
"""

import functools
import importlib
import logging
import numbers
import threading
from decimal import Decimal
from typing import Any

from rlora.records import RloraError

_SECONDS = 3  # to read a text, and to compare: all within `scoring.deadline` as it is by default
_KEPT = 4096  # golds, parsed: each is compared with every completion of its prompt


def answer(completion: str, answer: Any) -> str:
    """A status: "correct" where `verify(parse(gold), parse(completion))`, with the library's own extraction configs.

    A gold without dollars and box is put into dollars, as LaTeX is only looked for there. Raises RloraError where
    math-verify is not installed, or reads nothing in the gold.
    """
    gold = _read_gold(_text(answer))
    given = _read(completion)
    if not given:
        return "unparsable"
    seconds = _SECONDS if _may_ring() else None
    return "correct" if _library().verify(list(gold), given, timeout_seconds=seconds) else "wrong"


@functools.cache
def _library() -> Any:
    try:
        library = importlib.import_module("math_verify")
    except ImportError as error:
        raise RloraError(
            f"reward = 'rlora.rewards.math_verify:answer': math-verify can't be imported ({error}); run "
            "`pip install 'rlora[math-verify]'`, or use rlora.rewards.equivalence:math_answer"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of each text that takes too long
    return library


def _may_ring() -> bool:
    """Whether its timeouts, which are alarms, work here: on the main thread, where reward functions are called."""
    return threading.current_thread() is threading.main_thread()


def _read(text: str) -> list[Any]:
    read: list[Any] = _library().parse(text, parsing_timeout=_SECONDS if _may_ring() else None)
    return read


@functools.lru_cache(_KEPT)
def _read_gold(text: str) -> tuple[Any, ...]:
    read = _read(text if "$" in text or "boxed" in text or "\\(" in text or "\\[" in text else f"${text}$")
    if not read:
        raise RloraError(f"the gold answer {text[:60]!r}: math-verify reads nothing in it; let the env give another")
    return tuple(read)


def _text(gold: Any) -> str:
    """A gold answer as text."""
    is_number = isinstance(gold, numbers.Number | Decimal) and not isinstance(gold, bool)
    if not (is_number or isinstance(gold, str)) or str(gold).strip().lower() in ("", "nan"):
        raise RloraError(
            f"the gold answer {str(gold)[:60]!r} ({type(gold).__name__}) is neither text nor a number; let the env "
            "give one of them"
        )
    return str(gold)
