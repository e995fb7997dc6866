"""Sets of numbers: intervals, inequalities, unions. Two are the same where the same numbers lie in them."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from .names import label
from .notation import UnreadableError
from .tree import Node
from .values import constant, unknowns

MAX_ITEMS = 60  # of a list: they are compared each with each
LESS = ("<", "<=", ">", ">=")
_DOMAINS = {"mathbb R+": 0, "mathbb R": -math.inf}  # sets that have a sign of their own, and where they begin


def is_region(node: Node) -> bool:
    """Whether it may be read as a set of numbers; a pair may where it can be an interval."""
    if node.op == "relation":
        signs = node.data.split()
        if signs in (["in"], ["="]):
            return node.args[0].op == "symbol" and is_region(node.args[1])
        return all(sign in LESS for sign in signs) or signs == ["!="]
    if node.op == "list":
        names = {name for arg in node.args for name in unknowns(arg) if name not in _DOMAINS}
        return (
            len(names) < 2
            and any(map(is_region, node.args))
            and all(is_region(arg) or _is_point(arg) for arg in node.args)
            and _are_apart([arg for arg in node.args if arg.op == "tuple"])
        )
    if node.op == "tuple":
        return _is_interval(node)
    builds = node.op == "builder" and len(node.args) == 2 and node.args[0].op != "tuple"
    return node.op in ("cup", "cap", "minus") or builds or _domain(node)


def _domain(node: Node) -> bool:
    return node.op == "symbol" and node.data in _DOMAINS


def _is_point(node: Node) -> bool:
    """x = 1 among inequalities."""
    return node.op == "relation" and node.data == "=" and bool(label(node.args[0])) and not unknowns(node.args[1])


def _is_interval(node: Node) -> bool:
    """Whether a pair has its ends in order; else it is a point, and never an interval."""
    if len(node.args) != 2 or any(unknowns(arg) for arg in node.args):
        return False
    try:
        low, high = map(_end, node.args)
        return bool(low < high or (low == high and node.data == "[]"))
    except (UnreadableError, TypeError):
        return False


def _are_apart(intervals: Sequence[Node]) -> bool:
    """Whether no two of them share more than an end: (0, 3), (1, 2) are points, or two answers."""
    ends = sorted(tuple(map(_end, interval.args)) for interval in intervals)
    return all(high <= low for (_, high), (low, _) in itertools.pairwise(ends))


def same_region(gold: Node, prediction: Node) -> bool | None:
    """Compares two sets of numbers on their ends, beside and between them; None where one is no such set, or empty."""
    try:
        ends = sorted({end for node in (gold, prediction) for end in _ends(node)})
        points = [*ends, *((a + b) / 2 for a, b in itertools.pairwise(ends))]
        points += [ends[0] - 1, ends[-1] + 1, ends[0] - 1000, ends[-1] + 1000] if ends else [Fraction(0)]
        points += [end + step for end in ends for step in (Fraction(1, 10**6), -Fraction(1, 10**6))]
        inside = [(_holds(gold, point), _holds(prediction, point)) for point in points]
    except (UnreadableError, TypeError):
        return None
    if not all(map(any, zip(*inside, strict=True))):
        return None
    return all(one == other for one, other in inside)


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
    if _domain(node):
        return [Fraction(0)]
    if node.op in ("pm", "mp"):
        return [end for value in both(node) for end in _ends(value)]
    if unknowns(node):
        return []
    return [value] if abs(value := _end(node)) < 10**30 else []


def _holds(node: Node, point: Any, listed: str = "or") -> bool:
    """Whether a number lies in a set. `listed` says how a list without "and" and "or" is read."""
    if node.op == "list":
        word = node.data or ("and" if any(_narrows(arg) for arg in node.args) else listed)
        if word not in ("and", "or"):
            raise UnreadableError("and beside or")
        return (all if word == "and" else any)(_holds(arg, point) for arg in node.args)
    if node.op == "cup":
        return any(_holds(arg, point) for arg in node.args)
    if node.op == "cap":
        return all(_holds(arg, point) for arg in node.args)
    if node.op == "minus":
        return _holds(node.args[0], point) and not _holds(node.args[1], point)
    if node.op == "builder":
        return _holds(node.args[1], point, "and")
    if node.op == "relation" and node.data == "=" and _is_point(node):
        return any(_end(value) == point for value in both(node.args[1]))
    if node.op == "relation" and node.data in ("in", "="):
        return _holds(node.args[1], point)
    if _domain(node):
        return bool(point > _DOMAINS[node.data])
    if node.op == "set":
        return any(_end(value) == point for arg in node.args for value in both(arg))
    if node.op == "tuple" and _is_interval(node):
        low, high = map(_end, node.args)
        return bool(
            (low < point or (node.data[0] == "[" and low == point))
            and (point < high or (node.data[1] == "]" and point == high))
        )
    if node.op == "relation" and sum(bool(unknowns(side)) for side in node.args) == 1:
        return _satisfies(node, point)
    raise UnreadableError("no set of numbers")


def _narrows(node: Node) -> bool:
    """Whether it only leaves something out, or only says where x lies: x != 2; x in R."""
    return node.op == "relation" and (node.data == "!=" or (node.data == "in" and _domain(node.args[1])))


def _satisfies(node: Node, point: Any) -> bool:
    if node.data == "!=":
        name, value = node.args if unknowns(node.args[0]) else reversed(node.args)
        return all(_at(name, point) != _end(each) for each in both(value))
    values = [_at(side, point) for side in node.args]
    return all(_ordered(a, sign, b) for a, sign, b in zip(values, node.data.split(), values[1:], strict=False))


def both(node: Node) -> list[Node]:
    """Both values of what has a plus-minus in it; else the node alone."""
    if not any(part.op in ("pm", "mp") for part in node.walk()):
        return [node]
    return [_signed(node, plus) for plus in (True, False)]


def _signed(node: Node, plus: bool) -> Node:
    args = tuple(_signed(arg, plus) for arg in node.args)
    if node.op in ("pm", "mp"):
        return Node("add" if plus == (node.op == "pm") else "sub", args)
    return Node(node.op, args, node.data, node.number)


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
    signs = {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}
    if sign not in signs:
        raise UnreadableError("no inequality")
    return bool(signs[sign])
