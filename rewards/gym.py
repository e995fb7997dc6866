"""Whether an answer is the one of a reasoning-gym task: the same text, or the same decimal number."""

import re
from decimal import Decimal

_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"-?(?:\d{1,30}|\d{1,3}(?:,\d{3}){1,9})(?:\.\d{1,30})?", re.ASCII)
_LONGEST = 20_000  # characters of an answer


def gym_answer(completion: str, answer: str) -> str:
    """A status: "correct" where the last <answer> </answer> after any thinking holds `answer`.

    White space and case do not count, nor do thousands separators and zeros at the ends of numbers. A fraction is text:
    where one has to be reduced the unreduced one is wrong.
    """
    text = completion.rpartition("</think>")[2]
    given = _TAGS.findall(text) if "<think>" not in text else []
    if not given or not given[-1].strip() or len(given[-1]) > _LONGEST:
        return "unparsable"
    number = _number(given[-1])
    same = _plain(given[-1]) == _plain(answer) or (number is not None and number == _number(answer))
    return "correct" if same else "wrong"


def _plain(text: str) -> str:
    """Without what does not count: white space at the ends and beside brackets and commas, and its kind and amount."""
    return re.sub(r" ?([\[\](),]) ?", r"\1", " ".join(text.casefold().split()))


def _number(text: str) -> Decimal | None:
    return Decimal(text.strip().replace(",", "")) if _NUMBER.fullmatch(text.strip()) else None
