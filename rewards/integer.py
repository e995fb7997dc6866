"""The plainest verifiable reward: the last integer in the completion is the answer."""

import numbers
import re
from contextlib import suppress
from decimal import Decimal
from typing import Any

from rlora.records import RloraError

_INTEGER = re.compile(r"(?<!\d)(?<!\d\.)-?\d+(?:,\d{3})*(?:\.0+)?(?!\.?\d)", re.ASCII)
_GOLD = re.compile(r"([-+\u2212\uff0d\uff0b]?)\s?(\d{1,3}(?:,\d{3})+|\d+)(?:\.0*)?")  # digits of any script
_MINUS = "-\u2212\uff0d"
_LONGEST = 100  # digits and separators; the text is a model's, and int() of a very long one is slow or refused


def last_integer(text: str) -> int | None:
    """The last integer in `text`; thousands separators and zeros behind a point are allowed, decimals are none."""
    found = _INTEGER.findall(text)
    return int(found[-1].partition(".")[0].replace(",", "")) if found and len(found[-1]) <= _LONGEST else None


def gold_integer(gold: Any, name: str = "answer") -> int:
    """A gold answer as an integer, which text may be. Raises RloraError that calls it `name` where it is none."""
    if type(gold) is int:
        return gold
    if isinstance(gold, str) and len(gold) <= _LONGEST and (found := _GOLD.fullmatch(gold.strip())):
        value = int(found[2].replace(",", ""))
        return -value if found[1] and found[1] in _MINUS else value
    if isinstance(gold, numbers.Real | Decimal) and not isinstance(gold, bool):
        with suppress(ValueError, OverflowError):  # of NaN and infinity
            if int(gold) == gold:  # type: ignore[arg-type]
                return int(gold)  # type: ignore[arg-type]
    raise RloraError(
        f"the gold {name} {str(gold)[:60]!r} ({type(gold).__name__}) is no integer; let the env give one, or text that "
        "is one and nothing else (env_args.answer_after cuts it out of a whole solution)"
    )


def integer_answer(completion: str, answer: Any) -> float:
    """1 where the last integer of the completion is `answer`, an integer or its text, else 0.

    Raises RloraError where `answer` is none.
    """
    return float(last_integer(completion) == gold_integer(answer))
