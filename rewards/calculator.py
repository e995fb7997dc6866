"""The reward of the calculator agent: an answer has to be given, and what the tool has said does not count as one."""

from typing import Any

from .integer import gold_integer, last_integer


def answered(completion: str, answer: Any) -> str:
    """A status: "correct" where the last integer after the last result of the tool is `answer`.

    The tool's results end with >>, so what stands before the last of these, and in a call that has got no result, is no
    answer. Where the tool was not called the whole text counts. Raises RloraError where `answer` is no integer.
    """
    gold = gold_integer(answer)
    given = last_integer(completion.rpartition(">>")[2].partition("<<")[0])
    if given is None:
        return "unparsable"
    return "correct" if given == gold else "wrong"
