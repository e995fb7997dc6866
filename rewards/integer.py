"""The plainest verifiable reward: the last integer in the completion is the answer."""

import re

_INTEGER = re.compile(r"-?\d+(?:,\d{3})*(?!\.?\d)", re.ASCII)


def last_integer(text: str) -> int | None:
    """The last integer in `text`; thousands separators are allowed, decimals are not integers."""
    found = _INTEGER.findall(text)
    return int(found[-1].replace(",", "")) if found else None


def integer_answer(completion: str, answer: int) -> float:
    """1 where the last integer of the completion is `answer`, else 0."""
    return float(last_integer(completion) == answer)
