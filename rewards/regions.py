"""Sets of numbers: intervals, inequalities, unions. Two are the same where the same numbers lie in them."""

import itertools
import math
from fractions import Fraction
from typing import Any

from .expression import Node
from .notation import UnreadableError
from .values import constant, unknowns
from .wording import words

MAX_ITEMS = 60  # of a list: they are compared each with each
LESS = ("<", "<=", ">", ">=")


def is_region(node: Node) -> bool:
    if node.op == "relation":
        signs = node.data.split()
        return all(sign in LESS for sign in signs) or (signs in (["in"], ["="]) and is_region(node.args[1]))
    if node.op == "list":
        return all(arg.op == "relation" and is_region(arg) for arg in node.args)
    if node.op in ("cup", "cap", "minus", "builder") or (node.op == "tuple" and len(node.args) == 2):
        return True
    return node.op == "symbol" and node.data == "mathbb R"


def same_region(gold: Node, prediction: Node) -> bool | None:
    """Compares two sets of numbers on their ends, beside and between them; None where one is not such a set."""
    try:
        ends = sorted({end for node in (gold, prediction) for end in _ends(node)})
        points = [*ends, *((a + b) / 2 for a, b in itertools.pairwise(ends))]
        points += [ends[0] - 1, ends[-1] + 1, ends[0] - 1000, ends[-1] + 1000] if ends else [Fraction(0)]
        points += [end + step for end in ends for step in (Fraction(1, 10**6), -Fraction(1, 10**6))]
        return all(_holds(gold, point) == _holds(prediction, point) for point in points)
    except (UnreadableError, TypeError):
        return None


def _end(node: Node) -> Any:
    value = constant(node)
    if isinstance(value, Fraction):
        return value
    rounded = float(value)
    return rounded if math.isinf(rounded) else Fraction(rounded)


def _ends(node: Node) -> list[Any]:
    if node.op == "relation" and node.data in ("in", "="):
        return _ends(node.args[1])
    if node.op == "builder":
        return _ends(node.args[1])
    if node.op in ("cup", "cap", "minus", "list", "set", "tuple", "relation") and len(node.args) <= MAX_ITEMS:
        return [end for arg in node.args for end in _ends(arg)]
    if unknowns(node):
        return []
    return [value] if abs(value := _end(node)) < 10**30 else []


def _holds(node: Node, point: Any) -> bool:
    """Whether a number lies in a set."""
    if node.op in ("cup", "list"):
        if node.op == "list" and node.data == "and":
            return all(_holds(arg, point) for arg in node.args)
        return any(_holds(arg, point) for arg in node.args)
    if node.op == "cap":
        return all(_holds(arg, point) for arg in node.args)
    if node.op == "minus":
        return _holds(node.args[0], point) and not _holds(node.args[1], point)
    if node.op == "builder" or (node.op == "relation" and node.data in ("in", "=")):
        return _holds(node.args[1], point)
    if node.op == "symbol" and node.data == "mathbb R":
        return True
    if node.op == "set":
        return any(_end(arg) == point for arg in node.args)
    if node.op == "tuple" and len(node.args) == 2:
        low, high = map(_end, node.args)
        return bool(
            (low < point or (node.data[0] == "[" and low == point))
            and (point < high or (node.data[1] == "]" and point == high))
        )
    if node.op == "relation" and sum(bool(unknowns(side)) for side in node.args) == 1:
        values = [_at(side, point) for side in node.args]
        return all(_ordered(a, sign, b) for a, sign, b in zip(values, node.data.split(), values[1:], strict=False))
    raise UnreadableError("no set of numbers")


def label(node: Node) -> str:
    """The name that a side of a relation is; empty where it is none."""
    if node.op == "symbol":
        return node.data
    if node.op == "text":
        return words(node.data)
    if any(part.op in ("number", "add", "sub", "pow", "relation", "set") for part in node.walk()) and node.op != "call":
        return ""
    if node.op == "tuple" and not all(label(arg) for arg in node.args):
        return ""
    if node.op == "call" and node.data in ("abs",) and not unknowns(node):
        return ""
    labels = "".join(part.data for part in node.walk() if part.op in ("symbol", "call", "text"))
    return f"{node.op} {labels}" if unknowns(node) or "text" in node.op else ""


def _at(side: Node, point: Any) -> Any:
    """A side of a relation: its value, the point where it is the name, its size where it is the name's."""
    if not unknowns(side):
        return _end(side)
    if side.op == "call" and side.data == "abs" and side.args[0].op == "symbol":
        return abs(point)
    if label(side):
        return point
    raise UnreadableError("a relation that is not solved")


def _ordered(left: Any, sign: str, right: Any) -> bool:
    return bool({"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[sign])
