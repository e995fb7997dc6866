"""Reward of reasoning-gym tasks: the answer must equal the gold as text or as a decimal number."""

import math
import numbers
import re
from decimal import Decimal
from typing import Any

from rlora.records import RloraError

_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"-?(?:\d{1,30}|\d{1,3}(?:,\d{3}){1,9})(?:\.\d{1,30})?", re.ASCII)
_MAX_LENGTH = 20_000  # characters of an answer


def gym_answer(completion: str, answer: Any) -> str:
    """Return "correct" if the last <answer> </answer> after any thinking contains `answer`, else "wrong".

    Returns "unparsable" without a closed, non-empty <answer> block of at most `_MAX_LENGTH` characters. White space,
    case, thousands separators and zeros at the ends of numbers do not count. Fractions are compared as text, so 2/4 is
    wrong if the gold answer is 1/2. Raises RloraError if `answer` is neither text nor a number.
    """
    gold = _gold_text(answer)
    text = completion.rpartition("</think>")[2]
    answers = _TAGS.findall(text) if "<think>" not in text else []
    if not answers or not answers[-1].strip() or len(answers[-1]) > _MAX_LENGTH:
        return "unparsable"
    number = _number(answers[-1])
    is_equal = _normalized(answers[-1]) == _normalized(gold) or (number is not None and number == _number(gold))
    return "correct" if is_equal else "wrong"


def _gold_text(answer: Any) -> str:
    """Convert a gold answer to text."""
    if isinstance(answer, bool | str) and str(answer).strip():
        return str(answer)
    if isinstance(answer, numbers.Real | Decimal) and math.isfinite(answer):
        return format(Decimal(str(answer)), "f")
    raise RloraError(
        f"the gold answer {str(answer)[:60]!r} ({type(answer).__name__}) is neither text nor a number; make the "
        "env return a finite number, or text that is not empty"
    )


def _normalized(text: str) -> str:
    """Fold case, collapse white space, and remove white space at the ends and around brackets and commas."""
    return re.sub(r" ?([\[\](),]) ?", r"\1", " ".join(text.casefold().split()))


def _number(text: str) -> Decimal | None:
    return Decimal(text.strip().replace(",", "")) if _NUMBER.fullmatch(text.strip()) else None
