"""Reward of the calculator agent. The agent must state the answer itself: a tool result does not count."""

from typing import Any

from .integer import gold_integer, last_integer


def answered(completion: str, answer: Any) -> str:
    """Return "correct" if the last integer after the tool's last result is `answer`, else "wrong".

    Returns "unparsable" if there is no integer. Tool results end with >>. Text up to the last >> is ignored, and so is
    a call (<<) that got no result. If the tool was not called, the whole text counts. Raises RloraError if `answer` is
    not an integer.
    """
    gold = gold_integer(answer)
    value = last_integer(completion.rpartition(">>")[2].partition("<<")[0])
    if value is None:
        return "unparsable"
    return "correct" if value == gold else "wrong"
