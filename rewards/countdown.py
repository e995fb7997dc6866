"""Reward of Countdown problems: an expression over the problem's numbers must equal the target.

The expression is parsed, never evaluated as code.
"""

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
_MAX_LENGTH = 200  # characters; this also bounds numbers, and keeps parentheses within the parser's own depth limit
_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_ANSWER_IS = re.compile(r".*\banswer(?:\s+is)?\s*[:=]?", re.IGNORECASE)


def countdown_answer(completion: str, answer: Any, numbers: Any, use_all: bool = True) -> str:
    """Return "correct" if the completion's expression equals `answer` and uses `numbers` as required, else "wrong".

    Returns "unparsable" without a valid expression. The expression is in the last <answer> </answer>, else in the last
    \\boxed{}, else in the last line, after the word "answer"; text in <think> </think> is ignored. An expression
    consists of + - * / (typographic and LaTeX signs too), parentheses and integers. The target can follow it, as in
    "= 24". Each of `numbers` can be used once, and must be used if `use_all` is true. `answer` and `numbers` can be
    text, as in data sets ("24", "[3, 3, 8, 8]"). Raises RloraError if `answer` or an item of `numbers` is not an
    integer, and if `use_all` is not a bool.
    """
    target, available = gold_integer(answer), Counter(_read_numbers(numbers))
    if not isinstance(use_all, bool):
        raise RloraError(f"use_all = {use_all!r}: not a bool; use true or false in the column `use_all`")
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
    uses_numbers = used == available if use_all else used <= available
    return "correct" if uses_numbers and value == target else "wrong"


def _read_numbers(numbers: Any) -> list[int]:
    """Return the numbers of a problem, from a list of integers or of their texts, or from the text of such a list."""
    if isinstance(numbers, str):
        numbers = numbers.strip().strip("[](){}").replace(",", " ").split()
    elif not isinstance(numbers, Iterable):
        numbers = [numbers]
    integers = [gold_integer(item.strip("'\"") if isinstance(item, str) else item, "number") for item in numbers]
    if not integers:
        raise RloraError(
            "numbers: the problem has none; make the env return a column `numbers` with a list of integers"
        )
    return integers


def _candidate(completion: str) -> str:
    """Return the text of the expression with ASCII operators; empty if there is none."""
    text = completion.rpartition("</think>")[2]
    if "<think>" in text:  # unclosed
        return ""
    tags = _TAGS.findall(text)
    box = text.rfind("\\boxed{")
    if tags:
        text = tags[-1]
    elif box >= 0:
        text = text[box + len("\\boxed{") :].partition("}")[0]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        text = _ANSWER_IS.sub("", lines[-1][-4 * _MAX_LENGTH :]) if lines else ""
    if len(text) > 4 * _MAX_LENGTH:
        return ""
    for command, sign in _LATEX.items():
        text = text.replace(command, sign)
    return " ".join(text.translate(_SIGNS).split()).rstrip(".")


def _parse(text: str) -> ast.expr | None:
    """Parse an expression. Returns None if it is invalid, too long or contains other characters."""
    text = text.strip()
    if len(text) > _MAX_LENGTH or not _EXPRESSION.fullmatch(text):
        return None
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, used: Counter[int]) -> Fraction | None:
    """Compute an expression, and count its numbers in `used`. None if it is invalid. Raises ZeroDivisionError."""
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
