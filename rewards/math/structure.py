"""When two trees say the same: lists, sets, tuples, intervals, relations, units, words."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import chain, repeat
from typing import Any

from .names import label, renamed, same_name, with_names_of
from .notation import UnreadableError
from .regions import LESS, MAX_ITEMS, both, is_region, same_region
from .tree import Node
from .units import conflict, is_currency
from .values import constant, same, unknowns
from .wording import words

_EMPTY = {"nosolution", "nosolutions", "norealsolution", "norealsolutions", "none", "emptyset", "theemptyset"}
_STATING = {"=", "~", "in", "=="}
_FLIP = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_EMPTY_WORD = "no solution"
_PARAMETERS = frozenset("tskmnruvpq") | {"lambda", "mu"}
_INFINITY = Node("symbol", data="infty")


def equal(gold: Node, prediction: Node) -> bool:
    """Whether two trees say the same."""
    gold, prediction = _same_letters(_bare(gold), _bare(prediction))
    gold, prediction = _unzipped(gold, prediction), _unzipped(prediction, gold)
    if gold == prediction:
        return True
    if "text" in (gold.op, prediction.op):
        return _same_words(gold, prediction)
    try:
        alike = gold.op == prediction.op == "tuple" or (
            gold.op == prediction.op == "list" and (gold.data == prediction.data or not (gold.data and prediction.data))
        )
        regions = not alike and is_region(gold) and is_region(prediction) and not _are_relations(gold, prediction)
        if regions and (found := same_region(gold, prediction)) is not None:
            return found
        if gold.op == "relation" or prediction.op == "relation":
            return _same_relation(gold, prediction)
        if gold.op == prediction.op and gold.op in ("cases", "row", "builder"):
            same_members = _matched if gold.op == "cases" else _in_order
            return len(gold.args) == len(prediction.args) and same_members(gold.args, prediction.args)
        if gold.op in ("list", "set", "tuple", "pm", "mp") or prediction.op in ("list", "set", "tuple", "pm", "mp"):
            return _same_items(gold, prediction)
        if gold.op in ("cup", "cap", "minus") or prediction.op in ("cup", "cap", "minus"):
            return bool(same_region(gold, prediction))
        return _same_value(gold, prediction)
    except UnreadableError:
        return False


def _bare(node: Node) -> Node:
    """Without what adds nothing: a list or set of one."""
    while node.op in ("list", "set") and len(node.args) == 1 and node.args[0].op != "set":
        node = node.args[0]
    return node


def _unzipped(node: Node, other: Node) -> Node:
    """(x, y) = (1, 2) as x = 1, y = 2 beside such a list; x != 1, 2 as x != 1, x != 2."""
    if node.op == "list" and node.args[0].op == "relation" and node.args[0].data == "!=":
        name = node.args[0].args[0]
        return replace(
            node, args=tuple(a if a.op == "relation" else Node("relation", (name, a), "!=") for a in node.args)
        )
    if node.op == "relation" and node.data == "=" and other.op == "list" and all(map(_name, other.args)):
        names, values = node.args
        if names.op == values.op == "tuple" and len(names.args) == len(values.args):
            pairs = zip(names.args, values.args, strict=True)
            return Node("list", tuple(Node("relation", pair, "=") for pair in pairs), "and")
    return node


def _same_letters(gold: Node, prediction: Node) -> tuple[Node, Node]:
    """Without "k in Z", with one letter for what is called k here and n there, as for t in the point (t, 2t)."""
    if gold.op == prediction.op == "tuple":
        letters = [unknowns(node) for node in (gold, prediction)]
        if all(len(each) == 1 and each <= _PARAMETERS for each in letters):
            return gold, renamed(prediction, dict(zip(*reversed(letters), strict=True)))
    (ours, wholes), (theirs, others) = _without_domains(gold), _without_domains(prediction)
    if sorted(wholes.values()) == sorted(others.values()):
        theirs = renamed(theirs, dict(zip(others, wholes, strict=True)))
    elif wholes and others:
        return gold, prediction
    return ours, theirs


def _without_domains(node: Node) -> tuple[Node, dict[str, str]]:
    """The claims of a list without "x in R", and the letters that it says are whole numbers, and of which kind."""
    if node.op != "list":
        return node, {}
    domains = {item.args[0].data: item.args[1].data for item in node.args if _is_domain(item)}
    letters = {letter: numbers for letter, numbers in domains.items() if numbers[:8] in ("mathbb Z", "mathbb N")}
    claims = tuple(item for item in node.args if not _is_domain(item))
    if not domains or not claims:
        return node, {}
    return (claims[0] if len(claims) == 1 else replace(node, args=claims)), letters


def _is_domain(node: Node) -> bool:
    if node.op != "relation" or node.data != "in":
        return False
    letter, numbers = node.args
    return letter.op == numbers.op == "symbol" and numbers.data[:8] in ("mathbb Z", "mathbb N", "mathbb R")


def _same_words(gold: Node, prediction: Node) -> bool:
    one, other = (
        _EMPTY_WORD if words(n.data) in _EMPTY or n == Node("set") else words(n.data) for n in (gold, prediction)
    )
    if gold.op != "text" or prediction.op != "text":
        symbol = gold if gold.op == "symbol" else prediction
        return bool(one == other) and (symbol.op == "symbol" or one == _EMPTY_WORD)
    return bool(one == other)


def _same_value(gold: Node, prediction: Node) -> bool:
    gold_unit, unit = _unit(gold), _unit(prediction)
    if gold_unit and unit and conflict(gold_unit, unit):
        return False
    if prediction.op == "unit" and gold.op != "unit" and unknowns(gold) != unknowns(prediction):
        return False
    gold, prediction = _without_unit(gold), _without_unit(prediction)
    bases = [_base(node) for node in (gold, prediction)]
    if any(bases):
        return _same_digits(gold, prediction, *bases)
    if gold.op == "ratio" and prediction.op == "ratio":
        numbers = [part for node in (gold, prediction) for part in node.args if part.op == "number"]
        if any(part.number == 0 or re.match(r"0\d", part.data) for part in numbers):  # 3:0, or a time of the day
            return False
        return len(gold.args) == len(prediction.args) and all(
            same(Node("div", (a, gold.args[0])), Node("div", (b, prediction.args[0])))
            for a, b in zip(gold.args[1:], prediction.args[1:], strict=True)
        )
    return same(gold, prediction) or _same_rounded(gold, prediction)


def _unit(node: Node) -> str:
    return node.data if node.op == "unit" else "deg" if node.op == "degree" else ""


def _without_unit(node: Node) -> Node:
    while node.op in ("unit", "degree"):
        node = node.args[0]
    if node.op == "mul" and node.args[0].op == "text" and is_currency(node.args[0].data):  # before its amount
        node = node.args[1]
    return node


def _base(node: Node) -> int:
    node = node.args[0] if node.op == "neg" else node
    return int(node.args[1].number or 0) if node.op == "base" else 0


def _same_digits(gold: Node, prediction: Node, base: int, other: int) -> bool:
    """A number without a base is in the gold's; another base than the gold's (ten, if it has none) is wrong."""
    if (other or base) != (base or 10):
        return False
    digits = [node.args[0] if node.op == "base" else node for node in (gold, prediction)]
    return same(*digits)


def _same_rounded(gold: Node, prediction: Node) -> bool:
    """A float printed out: a gold of 8 digits or more, or a prediction of 15 or more, stands for what rounds to it."""
    for decimal, exact, least in ((gold, prediction, 8), (prediction, gold, 15)):
        negative = decimal.op == "neg"
        inner = decimal.args[0] if negative else decimal
        digits = inner.data.replace(".", "").lstrip("0")
        if inner.op != "number" or "." not in inner.data or len(digits) < least or unknowns(exact):
            continue
        if exact.op == "number" and exact.data:  # two decimals are equal or they are not
            continue
        place = Fraction(1, 10 ** len(inner.data.partition(".")[2]))
        value = constant(exact)
        stated = -inner.number if negative and inner.number is not None else inner.number
        if isinstance(value, Fraction) and stated is not None and abs(value - stated) < place:
            return True
    return False


# ---- lists ----


def _items(node: Node) -> list[Node]:
    """The members of a list or set, with both values of every plus-minus."""
    members = node.args if node.op in ("list", "set") else (node,)
    found = [value for member in members for value in both(member)]
    if len(found) > MAX_ITEMS:
        raise UnreadableError("a list too long")
    return found


def _same_items(gold: Node, prediction: Node) -> bool:
    if "tuple" in (gold.op, prediction.op):
        one, other = (gold, prediction) if gold.op == "tuple" else (prediction, gold)
        return other.op in ("list", "matrix", "tuple") and _same_tuple(one, other)
    ones, others = _items(gold), _items(prediction)
    names, theirs = [_name(item) for item in ones], [_name(item) for item in others]
    if len(set(names)) == len(names) > 1 and all(names) and not any(theirs):
        return len(ones) == len(others) and _in_order(ones, others)  # x = 1, y = 2 against 1, 2
    if all(names) and sorted(names) == sorted(theirs):
        ours, groups = _groups(ones), _groups(others)
        return len(ours) == len(groups) and all(any(map(_same_group, repeat(one), groups)) for one in ours)
    if names and names[0] and not any(names[1:]):  # a = 4, -8, -10
        ones[0] = ones[0].args[-1]
    if theirs and theirs[0] and not any(theirs[1:]):
        others[0] = others[0].args[-1]
    if gold.op == "set":
        return _cover(ones, others) and _cover(others, ones)
    if prediction.op == "set" or all(item.op == "tuple" for item in ones):  # a member that comes again adds nothing
        others = [item for n, item in enumerate(others) if not any(equal(item, before) for before in others[:n])]
    return len(ones) == len(others) and _matched(ones, others)


def _groups(items: list[Node]) -> list[dict[str, Node]]:
    """x = 1, y = 2, x = 3, y = 4 as two groups: a name that comes again begins another."""
    groups: list[dict[str, Node]] = [{}]
    for item in items:
        if _name(item) in groups[-1]:
            groups.append({})
        groups[-1][_name(item)] = item
    return groups


def _same_group(one: dict[str, Node], other: dict[str, Node]) -> bool:
    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


def _cover(ones: list[Node], others: list[Node]) -> bool:
    return all(any(equal(one, other) for other in others) for one in ones)


def _in_order(ones: Iterable[Node], others: Iterable[Node]) -> bool:
    return all(map(equal, ones, others))


def _matched(ones: Sequence[Node], others: Sequence[Node]) -> bool:
    """Whether each has one of the others to itself."""
    left = list(others)
    for one in ones:
        place = next((n for n, other in enumerate(left) if equal(one, other)), None)
        if place is None:
            return False
        del left[place]
    return not left


def _same_tuple(one: Node, other: Node) -> bool:
    """Members in order. Brackets count for two members (intervals), and not beside a bare list or a vector."""
    if other.op == "matrix":
        rows = [row.args for row in other.args]
        if all(arg.op == "tuple" for arg in one.args) and one.data == "[]":
            theirs = [arg.args for arg in one.args]
            return [len(r) for r in rows] == [len(r) for r in theirs] and all(map(_in_order, rows, theirs))
        flat = [item for row in rows for item in row] if len(rows) == 1 or len(rows[0]) == 1 else []
        return len(flat) == len(one.args) and _in_order(flat, one.args)
    if len(one.args) != len(other.args):
        return False
    if (
        other.op == "tuple"
        and one.data != other.data
        and not (len(one.args) > 2 and {one.data, other.data} == {"()", "[]"})
    ):
        return False
    if other.op == "list" and "or" in other.data:
        return False
    if other.op == "list" and (one.data not in ("()", "[]") or _INFINITY in chain(*(arg.walk() for arg in one.args))):
        return False  # an interval without brackets does not say which of its ends belong to it
    if other.op == "list" and any(map(_name, other.args)):  # y = 2, x = 1 as (1, 2); x = 1, x = 2 are two values
        names = {_name(arg) for arg in other.args} - {""}
        return len(names) == len(other.args) and _in_order(one.args, sorted(other.args, key=_name))
    return _in_order(one.args, other.args)


# ---- relations ----


def _name(node: Node) -> str:
    """The name on the left of `x = 5`, `f(x) = ...`, `x in S`; empty where there is none."""
    if node.op != "relation" or not set(node.data.split()) <= _STATING:
        return ""
    return label(node.args[0])


def _stated(node: Node) -> Node | None:
    """What `x = ... = 5` or `2 + 3 = 5` gives; None for other relations. Of an approximation what is approximated.

    Only a name may stand before the values: ln x = 7 gives nothing. Of several values the last one counts.
    """
    signs, sides = node.data.split(), list(node.args)
    if not set(signs) <= _STATING or ("in" in signs and sides[0].op == "tuple"):
        return None
    if set(signs) == {"="} and all(map(_is_number, sides)) and not all(equal(sides[0], side) for side in sides[1:]):
        return None  # 7 = 8
    named = bool(label(sides[0]))
    while signs and signs[-1] == "~" and (len(sides) > 2 or not named):
        signs.pop(), sides.pop()
    if not named and not (len(sides) > 2 and label(sides[-2])) and not all(map(_is_value, sides)):
        is_turned = len(sides) == 2 and sides[1].op == "symbol" and not unknowns(sides[0])  # 5 = x
        return sides[0] if is_turned else None
    return sides[-1]


def _is_value(node: Node) -> bool:
    """Whether it has neither unknowns nor words in it."""
    return not unknowns(node) and all(part.op != "text" for part in node.walk())


def _is_number(node: Node) -> bool:
    return _is_value(node) and node.op != "unit"


def _same_relation(gold: Node, prediction: Node) -> bool:
    value = _stated(gold) if gold.op == "relation" else gold
    if prediction.op != "relation":
        return value is not None and gold.op == "relation" and equal(value, prediction)
    theirs = _stated(prediction)
    if gold.op != "relation":
        return theirs is not None and equal(gold, theirs)
    if value is not None and theirs is not None:
        ours, other = gold.args[0], prediction.args[0]
        if label(ours) and label(other):
            if not same_name(ours, other):
                return _same_permuted(gold, prediction) or _proportional(gold, prediction)
            theirs = with_names_of(ours, other, theirs)
        if equal(value, theirs):
            return True
    return _proportional(gold, prediction) and (value is None or bool(unknowns(value)))


def _same_permuted(gold: Node, prediction: Node) -> bool:
    """(y, x) = (2, 1) as (x, y) = (1, 2)."""
    sides = [side for node in (gold, prediction) for side in node.args]
    if len(sides) != 4 or any(side.op != "tuple" or len(side.args) != len(sides[0].args) for side in sides):
        return False
    ours, theirs = (
        dict(zip(map(label, names.args), values.args, strict=True)) for names, values in (sides[:2], sides[2:])
    )
    return ours.keys() == theirs.keys() and all(equal(ours[name], theirs[name]) for name in ours)


def _are_relations(gold: Node, prediction: Node) -> bool:
    """Whether two inequalities are no sets of numbers: of other unknowns, or one a multiple of the other."""
    inequalities = gold.op == prediction.op == "relation" and {*gold.data.split(), *prediction.data.split()} <= {*LESS}
    return inequalities and (unknowns(gold) != unknowns(prediction) or _proportional(gold, prediction))


def _proportional(gold: Node, prediction: Node) -> bool:
    """Whether the differences of the sides are multiples of each other, and the signs agree with the factor's."""
    ours, theirs = gold.data.split(), prediction.data.split()
    if len(ours) != len(theirs):
        return False
    if len(ours) > 1:
        flipped = [_FLIP.get(sign, sign) for sign in reversed(theirs)]
        return (ours == theirs and _in_order(gold.args, prediction.args)) or (
            ours == flipped and _in_order(gold.args, reversed(prediction.args))
        )
    one, other = (Node("sub", node.args[:2]) for node in (gold, prediction))
    names = unknowns(one)
    if not names or names != unknowns(other) or ours[0] in ("in", "->", "~"):
        return ours == theirs and _in_order(gold.args, prediction.args)
    ratio = Node("div", (one, other))
    factor = _factor(ratio)
    if factor is None or not 0 < abs(factor) < math.inf:  # y \infty = 2x is no multiple of y = 2x
        return False
    if ours[0] in LESS:
        return theirs[0] == (ours[0] if factor > 0 else _FLIP[ours[0]])
    return ours == theirs


def _factor(ratio: Node) -> Any:
    """The value of an expression that does not depend on its unknowns, else None."""
    try:
        value = constant(ratio)
        if isinstance(value, Fraction) and same(ratio, Node("number", number=value)):
            return value
        shifted = renamed(ratio, {name: f"{name}'" for name in unknowns(ratio)})
        return value if same(ratio, shifted) else None
    except (UnreadableError, TypeError):
        return None
