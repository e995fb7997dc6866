"""Decides whether two trees are equal: lists, sets, tuples, intervals, relations, units, words."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import chain, repeat
from typing import Any

from .names import label, renamed, same_name, with_argument_names
from .notation import UnreadableError
from .regions import LESS, MAX_ITEMS, is_region, plus_minus_values, same_region
from .tree import Node
from .units import conflict, is_currency
from .values import constant, same, unknowns
from .wording import words

_EMPTY_SET_WORDS = {"nosolution", "nosolutions", "norealsolution", "norealsolutions", "none", "emptyset", "theemptyset"}
_STATING_SIGNS = {"=", "~", "in", "=="}
_FLIP = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_EMPTY_WORD = "no solution"
_PARAMETERS = frozenset("tskmnruvpq") | {"lambda", "mu"}
_INFINITY = Node("symbol", data="infty")


def equal(gold: Node, prediction: Node) -> bool:
    """Return whether two trees are equal answers."""
    gold, prediction = _with_common_letters(_unwrapped(gold), _unwrapped(prediction))
    gold, prediction = _split_tuple_relation(gold, prediction), _split_tuple_relation(prediction, gold)
    if gold == prediction:
        return True
    if "text" in (gold.op, prediction.op):
        return _same_words(gold, prediction)
    try:
        same_kind = gold.op == prediction.op == "tuple" or (
            gold.op == prediction.op == "list" and (gold.data == prediction.data or not (gold.data and prediction.data))
        )
        regions = not same_kind and is_region(gold) and is_region(prediction) and not _are_relations(gold, prediction)
        if regions and (is_same := same_region(gold, prediction)) is not None:
            return is_same
        if gold.op == "relation" or prediction.op == "relation":
            return _same_relation(gold, prediction)
        if gold.op == prediction.op and gold.op in ("cases", "row", "builder"):
            same_members = _equal_in_any_order if gold.op == "cases" else _equal_in_order
            return len(gold.args) == len(prediction.args) and same_members(gold.args, prediction.args)
        if gold.op in ("list", "set", "tuple", "pm", "mp") or prediction.op in ("list", "set", "tuple", "pm", "mp"):
            return _same_items(gold, prediction)
        if gold.op in ("cup", "cap", "minus") or prediction.op in ("cup", "cap", "minus"):
            return bool(same_region(gold, prediction))
        return _same_value(gold, prediction)
    except UnreadableError:
        return False


def _unwrapped(node: Node) -> Node:
    """Return the node without lists and sets of one item around it."""
    while node.op in ("list", "set") and len(node.args) == 1 and node.args[0].op != "set":
        node = node.args[0]
    return node


def _split_tuple_relation(node: Node, peer: Node) -> Node:
    """Convert (x, y) = (1, 2) to x = 1, y = 2 if `peer` is such a list; x != 1, 2 to x != 1, x != 2."""
    if node.op == "list" and node.args[0].op == "relation" and node.args[0].data == "!=":
        name = node.args[0].args[0]
        return replace(
            node, args=tuple(a if a.op == "relation" else Node("relation", (name, a), "!=") for a in node.args)
        )
    if node.op == "relation" and node.data == "=" and peer.op == "list" and all(map(_relation_name, peer.args)):
        names, values = node.args
        if names.op == values.op == "tuple" and len(names.args) == len(values.args):
            pairs = zip(names.args, values.args, strict=True)
            return Node("list", tuple(Node("relation", pair, "=") for pair in pairs), "and")
    return node


def _with_common_letters(gold: Node, prediction: Node) -> tuple[Node, Node]:
    """Return both trees without "k in Z" and with the gold's letters: k for n, or t for s in the point (s, 2s)."""
    if gold.op == prediction.op == "tuple":
        parameters = [unknowns(node) for node in (gold, prediction)]
        if all(len(names) == 1 and names <= _PARAMETERS for names in parameters):
            return gold, renamed(prediction, dict(zip(*reversed(parameters), strict=True)))
    (gold_list, gold_letters), (prediction_list, prediction_letters) = (
        _without_domains(gold),
        _without_domains(prediction),
    )
    if sorted(gold_letters.values()) == sorted(prediction_letters.values()):
        prediction_list = renamed(prediction_list, dict(zip(prediction_letters, gold_letters, strict=True)))
    elif gold_letters and prediction_letters:
        return gold, prediction
    return gold_list, prediction_list


def _without_domains(node: Node) -> tuple[Node, dict[str, str]]:
    """Return the claims of a list without "x in R", and the letters that it declares integers, with their sets."""
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
    gold_words, prediction_words = (
        _EMPTY_WORD if words(n.data) in _EMPTY_SET_WORDS or n == Node("set") else words(n.data)
        for n in (gold, prediction)
    )
    if gold.op != "text" or prediction.op != "text":
        symbol = gold if gold.op == "symbol" else prediction
        return bool(gold_words == prediction_words) and (symbol.op == "symbol" or gold_words == _EMPTY_WORD)
    return bool(gold_words == prediction_words)


def _same_value(gold: Node, prediction: Node) -> bool:
    gold_unit, prediction_unit = _unit_text(gold), _unit_text(prediction)
    if gold_unit and prediction_unit and conflict(gold_unit, prediction_unit):
        return False
    if prediction.op == "unit" and gold.op != "unit" and unknowns(gold) != unknowns(prediction):
        return False
    gold, prediction = _without_unit(gold), _without_unit(prediction)
    bases = [_base(node) for node in (gold, prediction)]
    if any(bases):
        return _same_digits(gold, prediction, *bases)
    if gold.op == "ratio" and prediction.op == "ratio":
        numbers = [part for node in (gold, prediction) for part in node.args if part.op == "number"]
        if any(part.number == 0 or re.match(r"0\d", part.data) for part in numbers):  # 3:0, or a time of day
            return False
        return len(gold.args) == len(prediction.args) and all(
            same(Node("div", (a, gold.args[0])), Node("div", (b, prediction.args[0])))
            for a, b in zip(gold.args[1:], prediction.args[1:], strict=True)
        )
    return same(gold, prediction) or _same_rounded(gold, prediction)


def _unit_text(node: Node) -> str:
    return node.data if node.op == "unit" else "deg" if node.op == "degree" else ""


def _without_unit(node: Node) -> Node:
    while node.op in ("unit", "degree"):
        node = node.args[0]
    if node.op == "mul" and node.args[0].op == "text" and is_currency(node.args[0].data):  # currency first
        node = node.args[1]
    return node


def _base(node: Node) -> int:
    node = node.args[0] if node.op == "neg" else node
    return int(node.args[1].number or 0) if node.op == "base" else 0


def _same_digits(gold: Node, prediction: Node, gold_base: int, prediction_base: int) -> bool:
    """Compare digits. A number without a base is in the gold's base. A base other than the gold's (or ten) is wrong."""
    if (prediction_base or gold_base) != (gold_base or 10):
        return False
    digits = [node.args[0] if node.op == "base" else node for node in (gold, prediction)]
    return same(*digits)


def _same_rounded(gold: Node, prediction: Node) -> bool:
    """Return whether one is a float that rounds the other: a gold of 8 or more digits, a prediction of 15 or more."""
    for decimal, exact, min_digits in ((gold, prediction, 8), (prediction, gold, 15)):
        negative = decimal.op == "neg"
        inner = decimal.args[0] if negative else decimal
        digits = inner.data.replace(".", "").lstrip("0")
        if inner.op != "number" or "." not in inner.data or len(digits) < min_digits or unknowns(exact):
            continue
        if exact.op == "number" and exact.data:  # two decimals are compared exactly
            continue
        resolution = Fraction(1, 10 ** len(inner.data.partition(".")[2]))
        value = constant(exact)
        stated = -inner.number if negative and inner.number is not None else inner.number
        if isinstance(value, Fraction) and stated is not None and abs(value - stated) < resolution:
            return True
    return False


# ---- lists ----


def _items(node: Node) -> list[Node]:
    """Return the members of a list or set; a plus-minus gives two values."""
    members = node.args if node.op in ("list", "set") else (node,)
    values = [value for member in members for value in plus_minus_values(member)]
    if len(values) > MAX_ITEMS:
        raise UnreadableError("the list is too long")
    return values


def _same_items(gold: Node, prediction: Node) -> bool:
    if "tuple" in (gold.op, prediction.op):
        tuple_node, other_node = (gold, prediction) if gold.op == "tuple" else (prediction, gold)
        return other_node.op in ("list", "matrix", "tuple") and _same_tuple(tuple_node, other_node)
    golds, predictions = _items(gold), _items(prediction)
    gold_names, names = [_relation_name(item) for item in golds], [_relation_name(item) for item in predictions]
    # x = 1, y = 2 against 1, 2
    if len(set(gold_names)) == len(gold_names) > 1 and all(gold_names) and not any(names):
        return len(golds) == len(predictions) and _equal_in_order(golds, predictions)
    if all(gold_names) and sorted(gold_names) == sorted(names):
        gold_groups, groups = _name_groups(golds), _name_groups(predictions)
        return len(gold_groups) == len(groups) and all(any(map(_same_group, repeat(g), groups)) for g in gold_groups)
    if gold_names and gold_names[0] and not any(gold_names[1:]):  # a = 4, -8, -10
        golds[0] = golds[0].args[-1]
    if names and names[0] and not any(names[1:]):
        predictions[0] = predictions[0].args[-1]
    if gold.op == "set":
        return _covers(golds, predictions) and _covers(predictions, golds)
    if prediction.op == "set" or all(item.op == "tuple" for item in golds):  # repeated members do not count
        predictions = [
            item for n, item in enumerate(predictions) if not any(equal(item, earlier) for earlier in predictions[:n])
        ]
    return len(golds) == len(predictions) and _equal_in_any_order(golds, predictions)


def _name_groups(items: list[Node]) -> list[dict[str, Node]]:
    """Split x = 1, y = 2, x = 3, y = 4 into two groups: a repeated name starts a new group."""
    groups: list[dict[str, Node]] = [{}]
    for item in items:
        if _relation_name(item) in groups[-1]:
            groups.append({})
        groups[-1][_relation_name(item)] = item
    return groups


def _same_group(left: dict[str, Node], right: dict[str, Node]) -> bool:
    return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)


def _covers(candidates: list[Node], items: list[Node]) -> bool:
    return all(any(equal(candidate, item) for item in items) for candidate in candidates)


def _equal_in_order(left: Iterable[Node], right: Iterable[Node]) -> bool:
    return all(map(equal, left, right))


def _equal_in_any_order(items: Sequence[Node], candidates: Sequence[Node]) -> bool:
    """Return whether the items match the candidates one to one."""
    remaining = list(candidates)
    for item in items:
        index = next((n for n, candidate in enumerate(remaining) if equal(item, candidate)), None)
        if index is None:
            return False
        del remaining[index]
    return not remaining


def _same_tuple(node: Node, candidate: Node) -> bool:
    """Compare members in order. Brackets matter for two members (intervals), but not beside a list or a vector."""
    if candidate.op == "matrix":
        rows = [row.args for row in candidate.args]
        if all(arg.op == "tuple" for arg in node.args) and node.data == "[]":
            members = [arg.args for arg in node.args]
            return [len(r) for r in rows] == [len(r) for r in members] and all(map(_equal_in_order, rows, members))
        flat = [item for row in rows for item in row] if len(rows) == 1 or len(rows[0]) == 1 else []
        return len(flat) == len(node.args) and _equal_in_order(flat, node.args)
    if len(node.args) != len(candidate.args):
        return False
    if (
        candidate.op == "tuple"
        and node.data != candidate.data
        and not (len(node.args) > 2 and {node.data, candidate.data} == {"()", "[]"})
    ):
        return False
    if candidate.op == "list" and "or" in candidate.data:
        return False
    if candidate.op == "list" and (
        node.data not in ("()", "[]") or _INFINITY in chain(*(arg.walk() for arg in node.args))
    ):
        return False  # a list does not state which ends belong to an interval
    if candidate.op == "list" and any(
        map(_relation_name, candidate.args)
    ):  # y = 2, x = 1 as (1, 2); x = 1, x = 2 are two values
        names = {_relation_name(arg) for arg in candidate.args} - {""}
        return len(names) == len(candidate.args) and _equal_in_order(
            node.args, sorted(candidate.args, key=_relation_name)
        )
    return _equal_in_order(node.args, candidate.args)


# ---- relations ----


def _relation_name(node: Node) -> str:
    """Return the name on the left of `x = 5`, `f(x) = ...` or `x in S`; empty if there is none."""
    if node.op != "relation" or not set(node.data.split()) <= _STATING_SIGNS:
        return ""
    return label(node.args[0])


def _stated_value(node: Node) -> Node | None:
    """Return the value that `x = ... = 5` or `2 + 3 = 5` states (not its approximation); None for other relations.

    Only a name may precede the values: ln x = 7 states none. The last of several values counts.
    """
    signs, sides = node.data.split(), list(node.args)
    if not set(signs) <= _STATING_SIGNS or ("in" in signs and sides[0].op == "tuple"):
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
    """Return whether a node contains neither unknowns nor words."""
    return not unknowns(node) and all(part.op != "text" for part in node.walk())


def _is_number(node: Node) -> bool:
    return _is_value(node) and node.op != "unit"


def _same_relation(gold: Node, prediction: Node) -> bool:
    gold_value = _stated_value(gold) if gold.op == "relation" else gold
    if prediction.op != "relation":
        return gold_value is not None and gold.op == "relation" and equal(gold_value, prediction)
    prediction_value = _stated_value(prediction)
    if gold.op != "relation":
        return prediction_value is not None and equal(gold, prediction_value)
    if gold_value is not None and prediction_value is not None:
        gold_left, prediction_left = gold.args[0], prediction.args[0]
        if label(gold_left) and label(prediction_left):
            if not same_name(gold_left, prediction_left):
                return _same_permuted(gold, prediction) or _proportional(gold, prediction)
            prediction_value = with_argument_names(gold_left, prediction_left, prediction_value)
        if equal(gold_value, prediction_value):
            return True
    return _proportional(gold, prediction) and (gold_value is None or bool(unknowns(gold_value)))


def _same_permuted(gold: Node, prediction: Node) -> bool:
    """Return whether both state the same values in a different order: (y, x) = (2, 1) and (x, y) = (1, 2)."""
    sides = [side for node in (gold, prediction) for side in node.args]
    if len(sides) != 4 or any(side.op != "tuple" or len(side.args) != len(sides[0].args) for side in sides):
        return False
    gold_values, prediction_values = (
        dict(zip(map(label, names.args), values.args, strict=True)) for names, values in (sides[:2], sides[2:])
    )
    return gold_values.keys() == prediction_values.keys() and all(
        equal(gold_values[name], prediction_values[name]) for name in gold_values
    )


def _are_relations(gold: Node, prediction: Node) -> bool:
    """Return whether inequalities are compared as relations, not as sets: unknowns differ, or both are proportional."""
    inequalities = gold.op == prediction.op == "relation" and {*gold.data.split(), *prediction.data.split()} <= {*LESS}
    return inequalities and (unknowns(gold) != unknowns(prediction) or _proportional(gold, prediction))


def _proportional(gold: Node, prediction: Node) -> bool:
    """Return whether the differences of the sides are multiples of each other, and the signs fit the factor."""
    gold_signs, prediction_signs = gold.data.split(), prediction.data.split()
    if len(gold_signs) != len(prediction_signs):
        return False
    if len(gold_signs) > 1:
        flipped = [_FLIP.get(sign, sign) for sign in reversed(prediction_signs)]
        return (gold_signs == prediction_signs and _equal_in_order(gold.args, prediction.args)) or (
            gold_signs == flipped and _equal_in_order(gold.args, reversed(prediction.args))
        )
    gold_difference, prediction_difference = (Node("sub", node.args[:2]) for node in (gold, prediction))
    names = unknowns(gold_difference)
    if not names or names != unknowns(prediction_difference) or gold_signs[0] in ("in", "->", "~"):
        return gold_signs == prediction_signs and _equal_in_order(gold.args, prediction.args)
    ratio = Node("div", (gold_difference, prediction_difference))
    factor = _factor(ratio)
    if factor is None or not 0 < abs(factor) < math.inf:  # y \infty = 2x is not a multiple of y = 2x
        return False
    if gold_signs[0] in LESS:
        return prediction_signs[0] == (gold_signs[0] if factor > 0 else _FLIP[gold_signs[0]])
    return gold_signs == prediction_signs


def _factor(ratio: Node) -> Any:
    """Return the value of an expression that does not depend on its unknowns; else None."""
    try:
        value = constant(ratio)
        if isinstance(value, Fraction) and same(ratio, Node("number", number=value)):
            return value
        shifted = renamed(ratio, {name: f"{name}'" for name in unknowns(ratio)})
        return value if same(ratio, shifted) else None
    except (UnreadableError, TypeError):
        return None
