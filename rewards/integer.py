"""The plainest verifiable reward: the last integer in the completion is the answer."""

import re

_INTEGER = re.compile(r"(?<!\d)(?<!\d\.)-?\d+(?:,\d{3})*(?!\.?\d)", re.ASCII)
_LONGEST = 100  # digits and separators; the text is a model's, and int() of a very long one is slow or refused


def last_integer(text: str) -> int | None:
    """The last integer in `text`; thousands separators are allowed, decimals are not integers."""
    found = _INTEGER.findall(text)
    return int(found[-1].replace(",", "")) if found and len(found[-1]) <= _LONGEST else None


def integer_answer(completion: str, answer: int) -> float:
    """1 where the last integer of the completion is `answer`, else 0."""
    return float(last_integer(completion) == answer)
