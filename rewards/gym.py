"""Whether an answer is the one of a reasoning-gym task: the same text, or the same decimal number."""

import math
import numbers
import re
from decimal import Decimal
from typing import Any

from rlora.records import RloraError

_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"-?(?:\d{1,30}|\d{1,3}(?:,\d{3}){1,9})(?:\.\d{1,30})?", re.ASCII)
_LONGEST = 20_000  # characters of an answer


def gym_answer(completion: str, answer: Any) -> str:
    """A status: "correct" where the last <answer> </answer> after any thinking holds `answer`.

    White space and case do not count, nor do thousands separators and zeros at the ends of numbers. A fraction is text:
    where one has to be reduced the unreduced one is wrong. `answer` is text, or a number in place of its text. Raises
    RloraError where it is neither.
    """
    gold = _gold(answer)
    text = completion.rpartition("</think>")[2]
    given = _TAGS.findall(text) if "<think>" not in text else []
    if not given or not given[-1].strip() or len(given[-1]) > _LONGEST:
        return "unparsable"
    number = _number(given[-1])
    same = _plain(given[-1]) == _plain(gold) or (number is not None and number == _number(gold))
    return "correct" if same else "wrong"


def _gold(answer: Any) -> str:
    """A gold answer as text."""
    if isinstance(answer, bool | str) and str(answer).strip():
        return str(answer)
    if isinstance(answer, numbers.Real | Decimal) and math.isfinite(answer):
        return format(Decimal(str(answer)), "f")
    raise RloraError(
        f"the gold answer {str(answer)[:60]!r} ({type(answer).__name__}) is neither text nor a number; let the env "
        "give one of them"
    )


def _plain(text: str) -> str:
    """Without what does not count: white space at the ends and beside brackets and commas, and its kind and amount."""
    return re.sub(r" ?([\[\](),]) ?", r"\1", " ".join(text.casefold().split()))


def _number(text: str) -> Decimal | None:
    return Decimal(text.strip().replace(",", "")) if _NUMBER.fullmatch(text.strip()) else None
