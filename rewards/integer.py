"""The plainest verifiable reward: the last integer in the completion is the answer."""

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
_NUMBER = re.compile(  # with all that touches it
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
_LONGEST = 100  # digits and separators; the text is a model's, and int() of a very long one is slow or refused


def last_integer(text: str) -> int | None:
    """The last integer in `text`; thousands separators and zeros behind a point are allowed.

    A decimal, and a number with a power, a percent sign, an exponent of ten or the like, is no integer.
    """
    if len(text) <= _LONGEST and (whole := _INTEGER.fullmatch(text.strip())):
        return _value(whole[1], whole[2])
    numbers = _NUMBER.finditer(_SPACED_SIGN.sub(r"\1", text))
    integers = [each for each in numbers if each["before"] is None and each["behind"] is None]
    if not integers or len(integers[-1]["digits"]) > _LONGEST:
        return None
    return _value(integers[-1]["sign"], integers[-1]["digits"])


def _value(sign: str, digits: str) -> int:
    value = int(digits.replace(",", ""))
    return -value if sign and sign[0] in _MINUS else value


def gold_integer(gold: Any, name: str = "answer") -> int:
    """A gold answer as an integer, which text may be. Raises RloraError that calls it `name` where it is none."""
    if type(gold) is int:
        return gold
    if isinstance(gold, str) and len(gold) <= _LONGEST and (found := _INTEGER.fullmatch(gold.strip())):
        return _value(found[1], found[2])
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
