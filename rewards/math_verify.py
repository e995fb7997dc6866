"""math-verify as a reward, for comparison with published results: `pip install 'rlora[math-verify]'`.

`rlora.rewards.equivalence:math_answer` accepts fewer wrong answers and needs no extra package.
"""

import functools
import importlib
import logging
import numbers
import threading
from decimal import Decimal
from typing import Any

from rlora.records import RloraError

_SECONDS = 3  # per parse and per comparison; together they fit into the default `scoring.deadline`
_CACHED_GOLDS = 4096  # parsed golds; each is compared with every completion of its prompt


def answer(completion: str, answer: Any) -> str:
    """Return "correct" if `verify(parse(gold), parse(completion))` is true, else "wrong".

    Returns "unparsable" if math-verify parses nothing from the completion. The library's default extraction configs are
    used. A gold answer without dollars and box is wrapped in dollars, because math-verify looks for LaTeX only there.
    Raises RloraError if math-verify can't be imported, or parses nothing from the gold answer.
    """
    gold = _parse_gold(_gold_text(answer))
    prediction = _parse(completion)
    if not prediction:
        return "unparsable"
    seconds = _SECONDS if _alarms_work() else None
    return "correct" if _library().verify(list(gold), prediction, timeout_seconds=seconds) else "wrong"


@functools.cache
def _library() -> Any:
    try:
        library = importlib.import_module("math_verify")
    except ImportError as error:
        raise RloraError(
            f"reward = 'rlora.rewards.math_verify:answer': math-verify can't be imported ({error}); run "
            "`pip install 'rlora[math-verify]'`, or use rlora.rewards.equivalence:math_answer"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns about every text that takes too long
    return library


def _alarms_work() -> bool:
    """Return whether math-verify's timeouts work: alarms need the main thread, on which workers call rewards."""
    return threading.current_thread() is threading.main_thread()


def _parse(text: str) -> list[Any]:
    parsed: list[Any] = _library().parse(text, parsing_timeout=_SECONDS if _alarms_work() else None)
    return parsed


@functools.lru_cache(_CACHED_GOLDS)
def _parse_gold(text: str) -> tuple[Any, ...]:
    parsed = _parse(text if "$" in text or "boxed" in text or "\\(" in text or "\\[" in text else f"${text}$")
    if not parsed:
        raise RloraError(
            f"the gold answer {text[:60]!r}: math-verify parses nothing from this text; make the env return a number "
            "or LaTeX"
        )
    return tuple(parsed)


def _gold_text(gold: Any) -> str:
    """Convert a gold answer to text."""
    is_number = isinstance(gold, numbers.Number | Decimal) and not isinstance(gold, bool)
    if not (is_number or isinstance(gold, str)) or str(gold).strip().lower() in ("", "nan"):
        raise RloraError(
            f"the gold answer {str(gold)[:60]!r} ({type(gold).__name__}) is neither text nor a number; make the "
            "env return a number, or text that is not empty"
        )
    return str(gold)
