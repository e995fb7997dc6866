"""Sets of numbers: intervals, inequalities, unions. Two sets are equal if they contain the same numbers."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from .names import label
from .notation import UnreadableError
from .tree import Node
from .values import constant, unknowns

MAX_ITEMS = 60  # per list; items are compared pairwise
LESS = ("<", "<=", ">", ">=")
_DOMAINS = {"mathbb R+": 0, "mathbb R": -math.inf}  # named sets and their lower ends


def is_region(node: Node) -> bool:
    """Return whether a node can be read as a set of numbers, as a pair can if it can be an interval."""
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
            and _are_disjoint([arg for arg in node.args if arg.op == "tuple"])
        )
    if node.op == "tuple":
        return _is_interval(node)
    builds = node.op == "builder" and len(node.args) == 2 and node.args[0].op != "tuple"
    return node.op in ("cup", "cap", "minus") or builds or _is_domain(node)


def _is_domain(node: Node) -> bool:
    return node.op == "symbol" and node.data in _DOMAINS


def _is_point(node: Node) -> bool:
    """Return whether a node is a point among inequalities, such as x = 1."""
    return node.op == "relation" and node.data == "=" and bool(label(node.args[0])) and not unknowns(node.args[1])


def _is_interval(node: Node) -> bool:
    """Return whether a pair has its ends in order. Otherwise the pair is a point, never an interval."""
    if len(node.args) != 2 or any(unknowns(arg) for arg in node.args):
        return False
    try:
        low, high = map(_endpoint, node.args)
        return bool(low < high or (low == high and node.data == "[]"))
    except (UnreadableError, TypeError):
        return False


def _are_disjoint(intervals: Sequence[Node]) -> bool:
    """Return whether no two intervals share more than an end: (0, 3), (1, 2) are points or two answers."""
    ends = sorted(tuple(map(_endpoint, interval.args)) for interval in intervals)
    return all(high <= low for (_, high), (low, _) in itertools.pairwise(ends))


def same_region(gold: Node, prediction: Node) -> bool | None:
    """Compare two sets of numbers at, beside and between their ends. None if a set is empty or not a set of numbers."""
    try:
        ends = sorted({end for node in (gold, prediction) for end in _endpoints(node)})
        points = [*ends, *((a + b) / 2 for a, b in itertools.pairwise(ends))]
        points += [ends[0] - 1, ends[-1] + 1, ends[0] - 1000, ends[-1] + 1000] if ends else [Fraction(0)]
        points += [end + step for end in ends for step in (Fraction(1, 10**6), -Fraction(1, 10**6))]
        inside = [(_contains(gold, point), _contains(prediction, point)) for point in points]
    except (UnreadableError, TypeError):
        return None
    if not all(map(any, zip(*inside, strict=True))):
        return None
    return all(in_gold == in_prediction for in_gold, in_prediction in inside)


def _endpoint(node: Node) -> Any:
    value = constant(node)
    if isinstance(value, Fraction):
        return value
    rounded = float(value)
    return rounded if math.isinf(rounded) else Fraction(rounded)


def _endpoints(node: Node) -> list[Any]:
    if node.op == "relation" and node.data in ("in", "="):
        return _endpoints(node.args[1])
    if node.op == "builder":
        return _endpoints(node.args[1])
    if node.op in ("cup", "cap", "minus", "list", "set", "tuple", "relation") and len(node.args) <= MAX_ITEMS:
        return [end for arg in node.args for end in _endpoints(arg)]
    if _is_domain(node):
        return [Fraction(0)]
    if node.op in ("pm", "mp"):
        return [end for value in plus_minus_values(node) for end in _endpoints(value)]
    if unknowns(node):
        return []
    return [value] if abs(value := _endpoint(node)) < 10**30 else []


def _contains(node: Node, point: Any, default: str = "or") -> bool:
    """Return whether a set contains a number. `default` joins lists that have neither "and" nor "or"."""
    if node.op == "list":
        conjunction = node.data or ("and" if any(_only_restricts(arg) for arg in node.args) else default)
        if conjunction not in ("and", "or"):
            raise UnreadableError("a list with both 'and' and 'or'")
        return (all if conjunction == "and" else any)(_contains(arg, point) for arg in node.args)
    if node.op == "cup":
        return any(_contains(arg, point) for arg in node.args)
    if node.op == "cap":
        return all(_contains(arg, point) for arg in node.args)
    if node.op == "minus":
        return _contains(node.args[0], point) and not _contains(node.args[1], point)
    if node.op == "builder":
        return _contains(node.args[1], point, "and")
    if node.op == "relation" and node.data == "=" and _is_point(node):
        return any(_endpoint(value) == point for value in plus_minus_values(node.args[1]))
    if node.op == "relation" and node.data in ("in", "="):
        return _contains(node.args[1], point)
    if _is_domain(node):
        return bool(point > _DOMAINS[node.data])
    if node.op == "set":
        return any(_endpoint(value) == point for arg in node.args for value in plus_minus_values(arg))
    if node.op == "tuple" and _is_interval(node):
        low, high = map(_endpoint, node.args)
        return bool(
            (low < point or (node.data[0] == "[" and low == point))
            and (point < high or (node.data[1] == "]" and point == high))
        )
    if node.op == "relation" and sum(bool(unknowns(side)) for side in node.args) == 1:
        return _satisfies(node, point)
    raise UnreadableError("not a set of numbers")


def _only_restricts(node: Node) -> bool:
    """Return whether a relation only excludes numbers or only states the domain of x: x != 2; x in R."""
    return node.op == "relation" and (node.data == "!=" or (node.data == "in" and _is_domain(node.args[1])))


def _satisfies(node: Node, point: Any) -> bool:
    if node.data == "!=":
        name, value = node.args if unknowns(node.args[0]) else reversed(node.args)
        return all(_side_value(name, point) != _endpoint(excluded) for excluded in plus_minus_values(value))
    values = [_side_value(side, point) for side in node.args]
    return all(_is_ordered(a, sign, b) for a, sign, b in zip(values, node.data.split(), values[1:], strict=False))


def plus_minus_values(node: Node) -> list[Node]:
    """Return both values of a node that contains a plus-minus; else the node alone."""
    if not any(part.op in ("pm", "mp") for part in node.walk()):
        return [node]
    return [_with_sign(node, plus) for plus in (True, False)]


def _with_sign(node: Node, plus: bool) -> Node:
    args = tuple(_with_sign(arg, plus) for arg in node.args)
    if node.op in ("pm", "mp"):
        return Node("add" if plus == (node.op == "pm") else "sub", args)
    return Node(node.op, args, node.data, node.number)


def _side_value(side: Node, point: Any) -> Any:
    """Return the value of a side of a relation; `point` for the unknown x, the absolute value of `point` for |x|."""
    if not unknowns(side):
        return _endpoint(side)
    if side.op == "call" and side.data == "abs" and side.args[0].op == "symbol":
        return abs(point)
    if label(side):
        return point
    raise UnreadableError("the relation is not solved for its unknown")


def _is_ordered(left: Any, sign: str, right: Any) -> bool:
    signs = {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}
    if sign not in signs:
        raise UnreadableError("not an inequality")
    return bool(signs[sign])
