"""The syntax tree of an answer, and the meaning of some combinations of nodes. Stdlib only."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from .notation import UnreadableError


@dataclass(frozen=True)
class Node:
    """An operator and its arguments. `data` is a name, brackets, separators or a unit."""

    op: str
    args: tuple["Node", ...] = ()
    data: str = ""
    number: Fraction | None = None

    def walk(self) -> Iterator["Node"]:
        """Yields this node and its descendants."""
        yield self
        for arg in self.args:
            yield from arg.walk()


def number(value: Fraction | int) -> Node:
    return Node("number", number=Fraction(value))


def table(environment: str, rows: list[list[Node]]) -> Node:
    """Convert a table to a matrix, a single value, a list (a system of equations) or the cases of a function."""
    system = all(row[0].op == "relation" for row in rows)
    if len(rows[0]) == 1 and (system or len(rows) == 1):
        return rows[0][0] if len(rows) == 1 else Node("list", tuple(row[0] for row in rows), "and")
    row_nodes = tuple(Node("row", tuple(row)) for row in rows)
    if environment in ("cases", "aligned", "align", "array") and len(rows[0]) == 2 and _condition(rows[0][1]):
        return Node("cases", row_nodes)
    if environment in ("cases", "aligned", "align"):
        raise UnreadableError("the rows are not a table")
    matrix = Node("matrix", row_nodes)
    return Node("call", (matrix,), "det") if environment == "vmatrix" else matrix


def _condition(node: Node) -> bool:
    return any(part.op in ("relation", "text") for part in node.walk())


def indexed_binomial(letter: str, node: Node) -> Node:
    """Convert C_n^k to a binomial coefficient; A_n^k and P_n^k of numbers to the number of permutations."""
    if letter not in ("C", "A", "P") or node.op != "pow":
        return node
    base, low = node.args
    top = number(int(base.data[2:])) if base.op == "symbol" and base.data[2:].isdecimal() else base.args[:1]
    top = top[0] if isinstance(top, tuple) and len(top) else top
    if not isinstance(top, Node) or base.data[:2] != f"{letter}_":
        return node
    if top.number is not None and low.number is not None and not 0 <= low.number <= top.number:
        return node
    if letter == "C":
        return Node("call", (top, low), "binom")
    return Node("call", (top, low), "permutations") if top.number is not None and low.number is not None else node


def called_binomial(node: Node) -> Node:
    """Convert C(n, k) to a binomial coefficient. C(1, 2) stays a point."""
    if node.data != "C()" or len(node.args) != 2:
        return node
    top, low = (arg.number for arg in node.args)
    is_point = top is not None and low is not None and not 0 <= low <= top
    return node if is_point else Node("call", node.args, "binom")


def is_integer_fraction(node: Node) -> bool:
    r"""Return whether a node is \frac of two integers, as in a mixed number."""
    return (
        node.op == "div"
        and node.data == "frac"
        and all(arg.op == "number" and arg.number is not None and arg.number.denominator == 1 for arg in node.args)
    )
