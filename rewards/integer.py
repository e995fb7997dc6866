"""The simplest verifiable reward: the last integer in the completion is the answer."""

import numbers
import re
from contextlib import suppress
from decimal import Decimal
from typing import Any

from rlora.records import RloraError

_MINUS = "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"  # hyphens, dashes and minus signs
_SIGN = rf"[{_MINUS}+\uff0b]"
_DIGITS = r"(?>\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # of any script, with thousands separators or without
_INTEGER = re.compile(rf"({_SIGN}?)\s?({_DIGITS})(?:\.0*)?")
_BASE = r"\s?(?:\\times|\\cdot|[*x\u00d7\u00b7])\s?10\s?(?:\^|\*\*)"
_NUMBER = re.compile(  # a number and everything attached to it
    rf"""
    (?P<before>\^\s?\{{?\s?{_SIGN}?|(?<=\w)_\{{?|(?<=[\d)])\*\*{_SIGN}?|\u221a|\\sqrt\s?\{{?  # power, index, root
      |\\[cdt]?frac\s?\{{(?:[^{{}}]{{0,100}}\}}\s?\{{)?|(?<![\w.])\.)?
    (?P<sign>(?:(?<!\d){_SIGN}(?:\\?[$\u20ac\u00a3\u00a5])?)?)(?P<digits>{_DIGITS})(?P<zeros>(?>(?:\.0+(?!\d))?))
    (?P<behind>\.?\d+(?:\.\d+)*(?:[eE]{_SIGN}?\d+)? | [eE]{_SIGN}?\d+ | \s?\\?[%\uff05\u2030] | (?:/\d+)+
      | \s?\^(?!\s?\{{?\s?\\circ)\s?\{{?\s?{_SIGN}?\d* | \*\*{_SIGN}?[\d(]\d* | {_BASE}\s?\{{?\s?{_SIGN}?\d+
      | [\u00b2\u00b3\u00b9\u2070-\u209c]+ | _\{{?\d+ | \s?(?:\\pi|\u03c0|\\sqrt|\u221a))?
    """,
    re.VERBOSE,
)
_SPACED_SIGN = re.compile(rf"(=\s?{_SIGN})\s(?=\d)")
_MAX_DIGITS = 100  # with separators; int() of very long text is slow or raises, and the text comes from a model


def last_integer(text: str) -> int | None:
    """Return the last integer in `text`, or None if there is none.

    Thousands separators and zeros after the decimal point are allowed. Decimals, and numbers with a power, a percent
    sign, an exponent of ten or the like are not integers.
    """
    if len(text) <= _MAX_DIGITS and (match := _INTEGER.fullmatch(text.strip())):
        return _value(match[1], match[2])
    matches = _NUMBER.finditer(_SPACED_SIGN.sub(r"\1", text))
    integers = [number for number in matches if number["before"] is None and number["behind"] is None]
    if not integers or len(integers[-1]["digits"]) > _MAX_DIGITS:
        return None
    return _value(integers[-1]["sign"], integers[-1]["digits"])


def _value(sign: str, digits: str) -> int:
    value = int(digits.replace(",", ""))
    return -value if sign and sign[0] in _MINUS else value


def gold_integer(gold: Any, name: str = "answer") -> int:
    """Convert a gold answer, an integer or its text, to an integer.

    Raises RloraError for any other value. `name` says in the error what the value is.
    """
    if type(gold) is int:
        return gold
    if isinstance(gold, str) and len(gold) <= _MAX_DIGITS and (match := _INTEGER.fullmatch(gold.strip())):
        return _value(match[1], match[2])
    if isinstance(gold, numbers.Real | Decimal) and not isinstance(gold, bool):
        with suppress(ValueError, OverflowError):  # NaN and infinity
            if int(gold) == gold:  # type: ignore[arg-type]
                return int(gold)  # type: ignore[arg-type]
    raise RloraError(
        f"the gold {name} {str(gold)[:60]!r} ({type(gold).__name__}) is not an integer: make the env return one, or "
        "its text and nothing else (env_args.answer_after of rlora.envs.table extracts it from a full solution)"
    )


def integer_answer(completion: str, answer: Any) -> float:
    """Return 1 if the last integer of the completion equals `answer` (an integer or its text), else 0.

    Raises RloraError if `answer` is not an integer.
    """
    return float(last_integer(completion) == gold_integer(answer))
