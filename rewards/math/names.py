r"""Names on the left of a relation: some may be dropped (x = 7, f(x) = 7), others may not (\ln x = 7, -x = 7)."""

import re
from dataclasses import replace

from .tree import Node
from .units import changes_value
from .values import is_computed, unknowns
from .wording import words

_CONSTANTS = ("pi", "e", "i", "infty")
_SETS = tuple(f"mathbb {letter}" for letter in "NZQRC")
_PROBABILITIES = tuple(Node("symbol", data=name) for name in ("P", "E", "mathbb P", "mathbb E"))
_DERIVATIVE = re.compile(r"d|partial")
_SHAPES = ("angle", "triangle", "square", "odot", "measuredangle", "m")
_CONJUGATED = ("z", "w")  # \bar z is the conjugate, \bar x is a mean


def label(node: Node) -> str:
    """Return the name on a side of a relation; empty for a product, a known function, a power or a number."""
    match node.op:
        case "symbol":
            return "" if node.data in _CONSTANTS or node.data[:8] in _SETS else node.data
        case "text":
            return "" if changes_value(node.data) else words(node.data)
        case "unit":  # letters followed by words
            suffix = "" if changes_value(node.data) else words(node.data)
            return suffix and label(node.args[0]) and f"{label(node.args[0])} {suffix}"
        case "tuple" | "ratio":
            labels = [label(arg) for arg in node.args]
            return f"{node.op} {' '.join(labels)}" if all(labels) else ""
        case "call":
            return _call_label(node)
        case "mul" | "div" | "cap" | "cup" | "index":
            return _product_label(node)
    return ""


def _call_label(node: Node) -> str:
    if node.data == "abs":  # |AB| is a length
        return label(node.args[0]) if node.args[0].op == "mul" else ""
    if is_computed(node.data) or node.data in ("arg", "sgn", "transpose"):
        return ""
    if node.data in ("bar", "overline") and node.args[0].data in _CONJUGATED:
        return ""
    return f"{node.data} {' '.join(part.data or str(part.number) for arg in node.args for part in arg.walk())}"


def _product_label(node: Node) -> str:
    """Return the name in a product: points (AB), an angle, P(A and B), words among letters; empty if there is none."""
    order, head = derivative(node)
    if head:
        return f"{node.op} {order} {head}"
    leaves = [part for part in node.walk() if not part.args]
    texts = [part for part in leaves if part.op == "text"]
    letters = [part.data for part in leaves if part.op == "symbol"]
    all_points = all(letter.partition("_")[0].isupper() or letter in _SHAPES for letter in letters)
    is_probability = node.op == "mul" and _first_factor(node) in _PROBABILITIES
    if any(changes_value(part.data) for part in texts):
        return ""
    if is_probability:
        is_name = all_points or any(part.op == "relation" for part in node.walk())
    else:
        is_name = (all_points or bool(texts)) and len(letters) + len(texts) == len(leaves)
    return f"{node.op} {' '.join(part.data for part in leaves)}" if is_name else ""


def _first_factor(node: Node) -> Node:
    while node.op == "mul":
        node = node.args[0]
    return node


def derivative(node: Node) -> tuple[int, str]:
    """Return how often a named function is differentiated (-1 for an inverse), and the name of the function."""
    if node.op == "call":
        marks = node.data.count("'")
        if node.data in ("prime", "dot", "ddot"):
            inner, head = derivative(node.args[0])
            head = head or (node.args[0].data if node.args[0].op == "symbol" else "")
            return inner + 1 + (node.data == "ddot"), head
        return (-1 if "^-1" in node.data else marks), re.split(r"['^_(]", node.data)[0]
    if node.op == "mul" and (applied := _applied_derivative(node)) is not None:
        return applied
    if node.op == "div":
        tops, lows = ([part for part in arg.walk() if not part.args] for arg in node.args)
        if tops and lows and _DERIVATIVE.fullmatch(tops[0].data) and _DERIVATIVE.fullmatch(lows[0].data):
            powers = [int(part.number or 1) for part in tops if part.op == "number"]
            names = [part.data for part in tops[1:] if part.op == "symbol"]
            return (powers[0] if powers else 1), (names[0] if names else "d")
    return 0, ""


def _applied_derivative(node: Node) -> tuple[int, str] | None:
    r"""Return the derivative in \frac{d}{dx} f or y'(x), as `derivative` does; None for other nodes."""
    order, head = derivative(node.args[0])
    if not order:
        return None
    names = [part.data for part in node.args[1].walk() if part.op == "symbol"]
    return order, names[0] if head == "d" and names else head


def same_name(gold: Node, prediction: Node) -> bool:
    """Return whether two sides can name the same value. y and f(x) can; x and y, f and f', a_n and a_{n+1} can't."""
    if len({_derivative_variable(gold), _derivative_variable(prediction)} - {""}) > 1:  # df/dx and df/dy
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
        gold_labels, prediction_labels = [label(arg) for arg in gold.args], [label(arg) for arg in prediction.args]
        return sorted(gold_labels) != sorted(prediction_labels)
    (gold_letter, gold_index), (prediction_letter, prediction_index) = (
        _letter_and_index(gold),
        _letter_and_index(prediction),
    )
    if gold_letter and prediction_letter and gold_letter.casefold() != prediction_letter.casefold():
        if gold.op != prediction.op or (
            "y" in (gold_letter, prediction_letter) and any(n.data.endswith("()") for n in (gold, prediction))
        ):
            return True  # y and f(x)
        return (gold_letter.isupper() or prediction_letter.isupper()) and bool(
            gold_index or prediction_index
        )  # S_min and A
    if gold.op == prediction.op == "call":
        return len(gold.args) == len(prediction.args) and _argument_renaming(gold, prediction) is not None
    if {gold.op, prediction.op} == {"call", "symbol"} and (gold_index or prediction_index):
        return not (gold.data.endswith("_") or prediction.data.endswith("_"))  # a_n is not a_1
    return not (gold_index and prediction_index and gold_index != prediction_index)


def _derivative_variable(node: Node) -> str:
    r"""Return the variable of the derivative \frac{df}{dx}; empty if it is not stated."""
    order, head = derivative(node)
    return [part.data for part in node.args[1].walk()][-1] if node.op == "div" and order and head else ""


def _letter_and_index(node: Node) -> tuple[str, str]:
    """Return the letter of a name and its index."""
    if node.op == "symbol":
        head, _, index = node.data.partition("_")
        return (head if len(head) == 1 else ""), index
    head = derivative(node)[1] if node.op in ("call", "div", "mul") else ""
    return (head if len(head) == 1 else ""), ""


def _argument_renaming(gold: Node, prediction: Node) -> dict[str, str] | None:
    """Map the prediction's argument letters to the gold's. Returns None if some arguments are not letters."""
    if gold.args == prediction.args:
        return {}
    pairs = list(zip(gold.args, prediction.args, strict=False))
    if not all(a.op == b.op == "symbol" and label(a) and label(b) for a, b in pairs):
        return None
    return {b.data: a.data for a, b in pairs}


def with_argument_names(gold: Node, named: Node, value: Node) -> Node:
    """Rename the arguments of `named` in `value` as in `gold`: 2m of f(m) = 2m becomes 2n for f(n)."""
    applied = all(node.op == "call" and node.data.endswith(("()", "_")) for node in (gold, named))
    if not applied or len(gold.args) != len(named.args):
        return value
    return renamed(value, _argument_renaming(gold, named) or {})


def renamed(node: Node, names: dict[str, str]) -> Node:
    """Rename the unknowns of a node. An unknown whose name is then taken gets a prime."""
    if not names:
        return node
    if node.op == "symbol" and unknowns(node):
        taken = node.data in names.values() and node.data not in names
        return replace(node, data=names.get(node.data, f"{node.data}'" if taken else node.data))
    data = names.get(node.data, node.data) if node.op == "call" else node.data
    return replace(node, args=tuple(renamed(arg, names) for arg in node.args), data=data)
