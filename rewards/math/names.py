r"""Names on the left of a relation: which may be dropped (x = 7, f(x) = 7), and which may not (\ln x = 7, -x = 7)."""

import re
from dataclasses import replace

from .tree import Node
from .units import changes_value
from .values import is_computed, unknowns
from .wording import words

_CONSTANTS = ("pi", "e", "i", "infty")
_SETS = tuple(f"mathbb {letter}" for letter in "NZQRC")
_CHANCES = tuple(Node("symbol", data=name) for name in ("P", "E", "mathbb P", "mathbb E"))
_DERIVATIVE = re.compile(r"d|partial")
_SHAPES = ("angle", "triangle", "square", "odot", "measuredangle", "m")
_CONJUGATED = ("z", "w")  # \bar z is the conjugate, \bar x a mean


def label(node: Node) -> str:
    """The name that a side of a relation is; empty where it is none: a product, a known function, a power, a number."""
    match node.op:
        case "symbol":
            return "" if node.data in _CONSTANTS or node.data[:8] in _SETS else node.data
        case "text":
            return "" if changes_value(node.data) else words(node.data)
        case "unit":  # words, and letters behind them
            behind = "" if changes_value(node.data) else words(node.data)
            return behind and label(node.args[0]) and f"{label(node.args[0])} {behind}"
        case "tuple" | "ratio":
            labels = [label(arg) for arg in node.args]
            return f"{node.op} {' '.join(labels)}" if all(labels) else ""
        case "call":
            return _label_of_call(node)
        case "mul" | "div" | "cap" | "cup" | "index":
            return _label_of_product(node)
    return ""


def _label_of_call(node: Node) -> str:
    if node.data == "abs":  # |AB| is a length
        return label(node.args[0]) if node.args[0].op == "mul" else ""
    if is_computed(node.data) or node.data in ("arg", "sgn", "transpose"):
        return ""
    if node.data in ("bar", "overline") and node.args[0].data in _CONJUGATED:
        return ""
    return f"{node.data} {' '.join(part.data or str(part.number) for arg in node.args for part in arg.walk())}"


def _label_of_product(node: Node) -> str:
    """Of points (AB), an angle, a probability P(A and B), or words among letters; a product of variables is no name."""
    order, head = derivative(node)
    if head:
        return f"{node.op} {order} {head}"
    leaves = [part for part in node.walk() if not part.args]
    text = [part for part in leaves if part.op == "text"]
    letters = [part.data for part in leaves if part.op == "symbol"]
    points = all(letter.partition("_")[0].isupper() or letter in _SHAPES for letter in letters)
    chance = node.op == "mul" and _first(node) in _CHANCES
    if any(changes_value(part.data) for part in text):
        return ""
    if chance:
        is_name = points or any(part.op == "relation" for part in node.walk())
    else:
        is_name = (points or bool(text)) and len(letters) + len(text) == len(leaves)
    return f"{node.op} {' '.join(part.data for part in leaves)}" if is_name else ""


def _first(node: Node) -> Node:
    while node.op == "mul":
        node = node.args[0]
    return node


def derivative(node: Node) -> tuple[int, str]:
    """How often what a name names was differentiated, -1 for an inverse, and of which function."""
    if node.op == "call":
        marks = node.data.count("'")
        if node.data in ("prime", "dot", "ddot"):
            inner, head = derivative(node.args[0])
            head = head or (node.args[0].data if node.args[0].op == "symbol" else "")
            return inner + 1 + (node.data == "ddot"), head
        return (-1 if "^-1" in node.data else marks), re.split(r"['^_(]", node.data)[0]
    if node.op == "mul" and (of_call := _applied(node)) is not None:
        return of_call
    if node.op == "div":
        tops, lows = ([part for part in arg.walk() if not part.args] for arg in node.args)
        if tops and lows and _DERIVATIVE.fullmatch(tops[0].data) and _DERIVATIVE.fullmatch(lows[0].data):
            powers = [int(part.number or 1) for part in tops if part.op == "number"]
            names = [part.data for part in tops[1:] if part.op == "symbol"]
            return (powers[0] if powers else 1), (names[0] if names else "d")
    return 0, ""


def _applied(node: Node) -> tuple[int, str] | None:
    r"""Of \frac{d}{dx} f and of y'(x)."""
    order, head = derivative(node.args[0])
    if not order:
        return None
    names = [part.data for part in node.args[1].walk() if part.op == "symbol"]
    return order, names[0] if head == "d" and names else head


def same_name(gold: Node, prediction: Node) -> bool:
    """Whether two sides may name the same; y and f(x) may, x and y, f and f', a_n and a_{n+1} may not."""
    if len({_variable(gold), _variable(prediction)} - {""}) > 1:  # df/dx and df/dy
        return False
    if label(gold) == label(prediction):
        return True
    if derivative(gold)[0] != derivative(prediction)[0]:
        return False
    if gold.op != prediction.op and any(
        inner.op == "symbol" and inner in outer.walk() for inner, outer in ((gold, prediction), (prediction, gold))
    ):  # x and f(x)
        return False
    if gold.op == prediction.op == "tuple":
        ours, theirs = [label(arg) for arg in gold.args], [label(arg) for arg in prediction.args]
        return sorted(ours) != sorted(theirs)
    (one, index), (other, index2) = _head(gold), _head(prediction)
    if one and other and one.casefold() != other.casefold():
        if gold.op != prediction.op or ("y" in (one, other) and any(n.data.endswith("()") for n in (gold, prediction))):
            return True  # y and f(x)
        return (one.isupper() or other.isupper()) and bool(index or index2)  # S_min and A
    if gold.op == prediction.op == "call":
        return len(gold.args) == len(prediction.args) and _renamed_by(gold, prediction) is not None
    if {gold.op, prediction.op} == {"call", "symbol"} and (index or index2):
        return not (gold.data.endswith("_") or prediction.data.endswith("_"))  # a_n is not a_1
    return not (index and index2 and index != index2)


def _variable(node: Node) -> str:
    r"""That by which \frac{df}{dx} differentiates; empty where it is not said."""
    order, head = derivative(node)
    return [part.data for part in node.args[1].walk()][-1] if node.op == "div" and order and head else ""


def _head(node: Node) -> tuple[str, str]:
    """The letter of a name, and its index."""
    if node.op == "symbol":
        head, _, index = node.data.partition("_")
        return (head if len(head) == 1 else ""), index
    head = derivative(node)[1] if node.op in ("call", "div", "mul") else ""
    return (head if len(head) == 1 else ""), ""


def _renamed_by(gold: Node, prediction: Node) -> dict[str, str] | None:
    """Which letters of one function's arguments are which of the other's; None where these are no letters alone."""
    if gold.args == prediction.args:
        return {}
    pairs = list(zip(gold.args, prediction.args, strict=False))
    if not all(a.op == b.op == "symbol" and label(a) and label(b) for a, b in pairs):
        return None
    return {b.data: a.data for a, b in pairs}


def with_names_of(gold: Node, named: Node, value: Node) -> Node:
    """`value` of the function `named` with the letters of the function `gold`: g of f(m) = g(m) as it is of f(n)."""
    applied = all(node.op == "call" and node.data.endswith(("()", "_")) for node in (gold, named))
    if not applied or len(gold.args) != len(named.args):
        return value
    return renamed(value, _renamed_by(gold, named) or {})


def renamed(node: Node, names: dict[str, str]) -> Node:
    """With other letters for some of its unknowns; one that is in the way gets a name of its own."""
    if not names:
        return node
    if node.op == "symbol" and unknowns(node):
        taken = node.data in names.values() and node.data not in names
        return replace(node, data=names.get(node.data, f"{node.data}'" if taken else node.data))
    data = names.get(node.data, node.data) if node.op == "call" else node.data
    return replace(node, args=tuple(renamed(arg, names) for arg in node.args), data=data)
