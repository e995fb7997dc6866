"""Whether an expression makes the target of a Countdown problem out of its numbers. It is parsed, never evaluated."""

import ast
import operator
import re
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from rlora.records import RloraError

from .integer import gold_integer

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_SIGNS = str.maketrans(
    "\N{MULTIPLICATION SIGN}\N{MULTIPLICATION X}\N{MIDDLE DOT}\N{ASTERISK OPERATOR}"
    "\N{DIVISION SIGN}\N{DIVISION SLASH}\N{MINUS SIGN}\N{EN DASH}[]$",
    "****//--() ",
)
_LATEX = {"\\times": "*", "\\cdot": "*", "\\div": "/", "\\left": " ", "\\right": " "}
_EXPRESSION = re.compile(r"[\d+\-*/() ]+", re.ASCII)
_LONGEST = 200  # characters: then no number is longer, and parentheses are no deeper than the parser's own limit
_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_ANSWER_IS = re.compile(r".*\banswer(?:\s+is)?\s*[:=]?", re.IGNORECASE)


def countdown_answer(completion: str, answer: Any, numbers: Any, use_all: bool = True) -> str:
    """A status: "correct" where the completion's expression equals `answer` and uses `numbers` as it should.

    The expression stands in the last <answer> </answer>, else in the last \\boxed{}, else in the last line, after the
    word "answer". It has + - * / (or the signs that print and LaTeX have for them), parentheses and integers. Each of
    `numbers` may stand there once, and must where `use_all` is set. "= 24" may follow it. What stands in
    <think> </think> does not count. `answer` and `numbers` may be text, as data sets hold them ("24", "[3, 3, 8, 8]").
    Raises RloraError where one is no integer.
    """
    target, given = gold_integer(answer), Counter(_given(numbers))
    if not isinstance(use_all, bool):
        raise RloraError(f"use_all = {use_all!r}: give true or false")
    left, equals, right = _candidate(completion).partition("=")
    if equals and right.strip() != str(target):
        return "wrong" if re.fullmatch(r"\s*-?\d+\s*", right) else "unparsable"
    tree = _parse(left)
    used: Counter[int] = Counter()
    try:
        value = None if tree is None else _value(tree, used)
    except ZeroDivisionError:
        return "wrong"
    if value is None:
        return "unparsable"
    fair = used == given if use_all else used <= given
    return "correct" if fair and value == target else "wrong"


def _given(numbers: Any) -> list[int]:
    """The numbers of a problem: a list of integers or of their texts, or a text with such a list in it."""
    if isinstance(numbers, str):
        numbers = numbers.strip().strip("[](){}").replace(",", " ").split()
    elif not isinstance(numbers, Iterable):
        numbers = [numbers]
    found = [gold_integer(each.strip("'\"") if isinstance(each, str) else each, "number") for each in numbers]
    if not found:
        raise RloraError("numbers: the problem has none; let the env give each prompt a column `numbers`, a list")
    return found


def _candidate(completion: str) -> str:
    """The text of the expression, with plain signs; "" where there is none."""
    text = completion.rpartition("</think>")[2]
    if "<think>" in text:  # it has not ended
        return ""
    tags = _TAGS.findall(text)
    box = text.rfind("\\boxed{")
    if tags:
        text = tags[-1]
    elif box >= 0:
        text = text[box + len("\\boxed{") :].partition("}")[0]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        text = _ANSWER_IS.sub("", lines[-1][-4 * _LONGEST :]) if lines else ""
    if len(text) > 4 * _LONGEST:
        return ""
    for command, sign in _LATEX.items():
        text = text.replace(command, sign)
    return " ".join(text.translate(_SIGNS).split()).rstrip(".")


def _parse(text: str) -> ast.expr | None:
    """The tree of an expression; None where it is too long or holds anything but digits and signs."""
    text = text.strip()
    if len(text) > _LONGEST or not _EXPRESSION.fullmatch(text):
        return None
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, used: Counter[int]) -> Fraction | None:
    """What it comes to, and in `used` its numbers; None where it is no expression. Raises ZeroDivisionError."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        used[node.value] += 1
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand, used)
        return None if inner is None else -inner
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, used), _value(node.right, used)
        return None if left is None or right is None else _OPERATORS[type(node.op)](left, right)
    return None
