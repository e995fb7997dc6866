"""What an answer says: a tree, read from the tokens by recursive descent. Nothing is computed here. Stdlib only."""

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, reduce

from .notation import FUNCTIONS, MAX_DEPTH, Token, UnreadableError, clean, tokens
from .tree import Node, chosen, counted, number, proper, table
from .units import FACTORS, changes_value, multiplier, unit

RELATIONS = ("=", "==", "<", ">", "<=", ">=", "!=", "~", "in", "->")
_ENDS = (
    "end",
    "close",
    ",",
    ";",
    "and",
    "or",
    ")",
    "]",
    "}",
    "}}",
    "&",
    "row",
    "|",
    "rfloor",
    "rceil",
    ")>",
    "|",
    "text",
    "%",
)
_UNDONE = ("sum", "prod", "int", "lim")  # work that an answer leaves to do: it is not done here
_NAMED, _VARIED = "pqrstuvwy", "xtnz"  # letters of functions, and of what these are of: p(x), u(t)
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "sec": "arcsec", "csc": "arccsc", "cot": "arccot"}
_PROGRAM = {"binom": 2, "factorial": 1, "pow": 2, "Union": 0}  # functions of programs, and how many arguments they take
_REALS = Node("symbol", data="mathbb R")
_DEGREE = Node("degree")  # the sign alone


@lru_cache(512)
def read(text: str, thousands: bool = True) -> Node:
    """The tree of an answer's text. Raises UnreadableError where it is over the bounds or no mathematics."""
    found = tokens(clean(text, thousands))
    if len(found) == 1:
        raise UnreadableError("empty")
    parser = _Parser(found)
    tree = parser.list()
    parser.expect("end")
    return tree


def _has_number(node: Node) -> bool:
    return any(part.op in ("number", "text") or part.data in ("pi", "sqrt") for part in node.walk())


class _Parser:
    def __init__(self, found: list[Token]) -> None:
        self.tokens, self.at, self.depth = found, 0, 0
        self.bars_end = False  # whether a bar can't begin an absolute value: within one, and before that of a set

    @property
    def kind(self) -> str:
        return self.tokens[self.at].kind

    @property
    def text(self) -> str:
        return self.tokens[self.at].text

    def next(self) -> Token:
        token = self.tokens[self.at]
        self.at += token.kind != "end"
        return token

    def take(self, *kinds: str) -> str:
        """The next token's kind if it is one of these, and past it; else an empty string."""
        return self.next().kind if self.kind in kinds else ""

    def expect(self, *kinds: str) -> str:
        if self.kind not in kinds:
            raise UnreadableError(f"{self.text!r} where {kinds[0]!r} should be")
        return self.next().kind

    # ---- lists, relations, sets ----

    def list(self) -> Node:
        """Items between `,`, `;`, "and", "or"; where both `;` and `,` stand, `;` divides first."""
        groups: list[list[Node]] = [[]]
        words = ""
        while self.kind not in ("end", "close", ")", "]", "}}", "}", ")>", "row", "&"):
            if kind := self.take(",", ";", "and", "or"):
                words += kind if kind in ("and", "or") and kind not in words else ""
                if kind == ";" and groups[-1]:
                    groups.append([])
                continue
            groups[-1].append(self.relation())
            if self.kind not in _ENDS:
                raise UnreadableError(f"{self.text!r} after an item")
        groups = [group for group in groups if group]
        if not groups:
            raise UnreadableError("empty")
        if all(len(group) == 1 for group in groups):
            groups = [[item for group in groups for item in group]]
        lists = [group[0] if len(group) == 1 else Node("list", tuple(group), words) for group in groups]
        return lists[0] if len(lists) == 1 else Node("list", tuple(lists), words)

    def relation(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("too deep")
        sides, signs = [self.sets()], []
        while self.kind in RELATIONS:
            signs.append(self.next().kind)
            sides.append(self.sets())
        self.depth -= 1
        return sides[0] if not signs else Node("relation", tuple(sides), " ".join(signs))

    def sets(self) -> Node:
        left = self.ratio()
        while kind := self.take("cup", "cap", "minus"):
            left = Node(kind, (left, self.ratio()))
        return left

    def ratio(self) -> Node:
        parts = [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else Node("ratio", tuple(parts))

    # ---- arithmetic ----

    def sum(self) -> Node:
        left = self.product()
        while kind := self.take("+", "-", "pm", "mp"):
            right = self.product()
            operator = "minus" if right.op == "set" else {"+": "add", "-": "sub"}.get(kind, kind)
            if right.op == "unit":  # of the whole sum
                left = replace(right, args=(Node(operator, (left, right.args[0])),))
            else:
                left = Node(operator, (left, right))
        return left

    def product(self) -> Node:
        left = self.signed()
        while self.kind not in _ENDS or (self.kind == "|" and not self.bars_end):
            if kind := self.take("*", "/"):
                left = Node("mul" if kind == "*" else "div", (left, self.signed()))
            elif self.kind in ("+", "-", "pm", "mp", ":", "cup", "cap", "minus", *RELATIONS):
                break
            elif self.kind == "number" and left.op == "number":
                left = self.mixed(left)
            else:
                right = self.power()
                whole = left.op == "number" and left.number is not None and left.number.denominator == 1
                left = Node("add" if whole and proper(right) else "mul", (left, right))
        return self.unit(left)

    def mixed(self, whole: Node) -> Node:
        """3 1/2, from its second number on."""
        ahead = [token.kind for token in self.tokens[self.at : self.at + 3]]
        if ahead[:2] != ["number", "/"] or ahead[2:] != ["number"] or "." in whole.data:
            raise UnreadableError("two numbers in a row")
        top, _, low = self.atom(), self.next(), self.atom()
        return Node("add", (whole, Node("div", (top, low))))

    def unit(self, value: Node) -> Node:
        """Words behind a value: its unit, with powers."""
        words = ""
        while (
            self.kind == "text"
            or (words and self.kind in ("^", "/", "}", "letter", "*"))
            or (words.endswith((" ^", " ^ {", " ^ -", " ^ { -")) and self.kind in ("{", "-", "number"))
        ):
            words += " " + self.next().text
        if (factor := multiplier(words)) > 1:
            value = Node("mul", (value, number(factor)))
        if words and value.op in ("symbol", "mul") and unit(words) is None and not _has_number(value):
            raise UnreadableError("words behind a name")
        if changes_value(words) or words.strip(" .").lower() in FACTORS:
            raise UnreadableError("words that change a value")
        return Node("unit", (value,), words) if words else value

    def signed(self) -> Node:
        signs = []
        while kind := self.take("+", "-", "pm", "mp"):
            signs.append(kind)
            if len(signs) > MAX_DEPTH:
                raise UnreadableError("too many signs")
        if not signs:
            return self.power()
        value = self.signed_product()
        for kind in reversed(signs):
            if kind != "+":
                value = Node("neg", (value,)) if kind == "-" else Node(kind, (number(0), value))
        return value

    def signed_product(self) -> Node:
        """What a leading sign covers: a mixed number as a whole, else one power."""
        value = self.power()
        if value.op == "number" and value.number is not None and value.number.denominator == 1:
            if self.kind == "command" and self.text in ("frac", "dfrac", "tfrac", "cfrac"):
                at, kept = self.at, list(self.tokens)
                if proper(right := self.power()):
                    return Node("add", (value, right))
                self.at, self.tokens = at, kept
            elif self.kind == "number":
                return self.mixed(value)
        return value

    def power(self) -> Node:
        token = self.tokens[self.at]
        base = self.postfix(self.atom())
        if self.take("^"):
            base = self.raised(base, self.exponent())
        return chosen(token.text, base)

    def raised(self, base: Node, exponent: Node) -> Node:
        if exponent == _DEGREE:
            return self.postfix(Node("degree", (base,)))
        if exponent.op == "symbol" and exponent.data in ("T", "top", "prime", "'"):
            return self.postfix(Node("call", (base,), "transpose" if exponent.data != "prime" else "prime"))
        return self.postfix(Node("pow", (base, exponent)))

    def exponent(self) -> Node:
        """What stands after ^: a group, or one sign; ^ is right-associative."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("too deep")
        if self.kind == "command" and self.text in ("circ", "prime", "top", "intercal"):
            name = self.next().text
            found = _DEGREE if name == "circ" else Node("symbol", data="T" if name == "intercal" else name)
        elif self.kind == "{" and self.tokens[self.at + 1][:2] == ("command", "circ"):
            self.next(), self.next()
            self.expect("}")
            found = _DEGREE
        elif self.kind in ("+", "-"):
            sign = self.next().kind
            found = Node("neg", (self.power(),)) if sign == "-" else self.power()
        else:
            found = self.atom()
            if self.take("^"):
                found = Node("pow", (found, self.exponent()))
        if any(part == _DEGREE for arg in found.args for part in arg.walk()):
            raise UnreadableError("a degree sign within an exponent")
        self.depth -= 1
        return found

    def postfix(self, value: Node) -> Node:
        for _ in range(MAX_DEPTH):
            if self.take("!"):
                value = Node("call", (value,), "factorial2" if self.take("!") else "factorial")
            elif self.take("%"):
                value = Node("percent", (value,))
            elif self.kind == "text" and self.text.lower() in ("percent", "percentage", "pct"):
                self.next()
                value = Node("percent", (value,))
            elif self.take("degree"):
                value = Node("degree", (value,))
            elif self.take("'"):
                value = Node("call", (value,), "prime")
            elif self.take("_"):
                value = self.subscript(value)
            else:
                return value
        raise UnreadableError("too many postfixes")

    def subscript(self, value: Node) -> Node:
        """A number's base, or the index of a name: a_1 is a name of its own, a_k and F_{n-1} are functions."""
        index = self.index()
        if value.op == "number":
            if index.op != "number" or "." in value.data + index.data:
                raise UnreadableError("a base that is no number")
            return Node("base", (value, index), value.data)
        if value.op == "symbol":
            if index.op in ("number", "text") or (index.op == "symbol" and len(value.data) > 1):
                return Node("symbol", data=f"{value.data}_{index.data or index.number}")
            return Node("call", (index,), f"{value.data}_")
        return Node("call", (value, index), "index")

    def index(self) -> Node:
        r"""What stands below: a group, or one sign; of S_{\min} a word."""
        kinds = [token.kind for token in self.tokens[self.at : self.at + 3]]
        if kinds[:1] == ["name"] and self.text in FUNCTIONS:
            return Node("text", data=self.next().text)
        if kinds == ["{", "name", "}"] and self.tokens[self.at + 1].text in FUNCTIONS:
            _, name, _ = self.next(), self.next(), self.next()
            return Node("text", data=name.text)
        return self.atom()

    # ---- atoms ----

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > 3 * MAX_DEPTH:
            raise UnreadableError("too deep")
        token = self.next()
        handler: Callable[[Token], Node] | None = getattr(self, _ATOMS.get(token.kind, ""), None)
        if handler is None:
            raise UnreadableError(f"{token.text!r} where a value should be")
        found = handler(token)
        self.depth -= 1
        return found

    def a_number(self, token: Token) -> Node:
        if "." in token.text and self.kind == "command" and self.text in ("overline", "bar", "dot", "overbar"):
            return self.repeating(token.text)
        return Node("number", data=token.text, number=Fraction(token.text.rstrip(".")))

    def repeating(self, head: str) -> Node:
        r"""0.1\overline{6}: the digits under the bar repeat; so do those from one dot to another, 0.\dot{1}4\dot{2}."""
        is_dotted = self.next().text == "dot"
        digits = self.digits()
        if is_dotted:
            between = self.next().text if self.kind == "number" and self.text.isdecimal() else ""
            if self.kind == "command" and self.text == "dot":
                self.next()
                digits += between + self.digits()
            elif between:
                raise UnreadableError("digits behind those that go on")
        places = len(head.partition(".")[2])
        tail = Fraction(int(digits), 10**places * (10 ** len(digits) - 1))
        return number(Fraction(head.rstrip(".") or 0) + tail)

    def digits(self) -> str:
        inner = self.group_or_sign()
        if inner.op != "number" or not inner.data.isdecimal():
            raise UnreadableError("a bar over no digits")
        return inner.data

    def a_letter(self, token: Token) -> Node:
        if token.text in "fghFGH":
            name = token.text + self.marks()
            if self.kind == "(" and not self.tokens[self.at].spaced:
                return self.call(name)
            value = Node("symbol", data=token.text)
            for _ in range(name.count("'")):
                value = Node("call", (value,), "prime")
            return value
        if self.kind == "(" and not self.tokens[self.at].spaced:
            inner = self.tokens[self.at + 1]
            kinds = [each.kind for each in self.tokens[self.at + 2 : self.at + 4]]
            if token.text == "C" and "," in kinds:
                return self.call("C")
            if kinds[:1] == [")"] and (token.text.isupper() or (token.text in _NAMED and inner.text in _VARIED)):
                return self.call(token.text)
        return Node("symbol", data=token.text)

    def marks(self) -> str:
        """What stands between the name of a function and its arguments: f', f^{-1}."""
        found = ""
        while self.take("'"):
            found += "'"
        ahead = [token.text for token in self.tokens[self.at : self.at + 6]]
        if ahead == ["^", "{", "-", "1", "}", "("]:
            self.at += 5
            found += "^-1"
        return found

    def call(self, name: str) -> Node:
        self.expect("(")
        inner = self.list()
        self.expect(")")
        args = inner.args if inner.op == "list" else (inner,)
        return counted(Node("call", args, f"{name}()"))

    def a_name(self, token: Token) -> Node:
        name = token.text
        if name in _UNDONE:
            return self.undone(name)
        if name in FUNCTIONS:
            return self.function(name)
        if name in _PROGRAM:
            return self.of_program(name)
        return Node("symbol", data=name)

    def of_program(self, name: str) -> Node:
        """A function of Python or sympy, with its arguments in brackets."""
        args = self.call(name).args
        if name == "Union" and args:
            return reduce(lambda left, right: Node("cup", (left, right)), args)
        if len(args) != _PROGRAM[name]:
            raise UnreadableError(f"{name} of {len(args)}")
        return Node("pow", args) if name == "pow" else Node("call", args, name)

    def function(self, name: str) -> Node:
        base = exponent = None
        if name == "sqrt" and self.kind == "[":
            self.next()
            base = self.relation()
            self.expect("]")
        for _ in range(2):
            if self.take("_"):
                base = self.atom()
            elif self.take("^"):
                exponent = self.exponent()
        if exponent == _DEGREE:
            raise UnreadableError("a degree sign on a function")
        if exponent is not None and exponent.op == "neg" and exponent.args[0].number == 1:
            name, exponent = _INVERSE.get(name, name), None
        args = self.arguments(name)
        found = Node("call", (*args, base) if base is not None else args, name + ("_" if base is not None else ""))
        return found if exponent is None else Node("pow", (found, exponent))

    def arguments(self, name: str) -> tuple[Node, ...]:
        """In brackets; or, without, the factors up to the next sign or function: sin 2x cos y."""
        if self.kind == "(" or (self.kind == "{" and name != "sqrt"):
            closing = ")" if self.next().kind == "(" else "}"
            inner = self.list()
            self.expect(closing)
            return inner.args if inner.op == "list" else (inner,)
        if name == "sqrt":
            return (self.group_or_sign(),)
        found = self.power() if self.kind not in ("+", "-") else self.signed()
        while self.kind in ("number", "letter", "name", "/") or (self.kind == "command" and self.text == "frac"):
            if self.kind == "name" and self.text in FUNCTIONS:
                break
            found = Node("div", (found, self.power())) if self.take("/") else Node("mul", (found, self.power()))
        return (found,)

    def undone(self, name: str) -> Node:
        """A sum, product, integral or limit, with its bounds as they stand."""
        bounds = []
        for _ in range(2):
            if self.take("_", "^"):
                bounds.append(self.group_or_sign())
        return Node("call", (*bounds, self.product()), name)

    def group_or_sign(self) -> Node:
        r"""An argument of a command: {...}, or one sign; of a number one digit (\frac12)."""
        if self.kind == "number" and len(self.text) > 1:
            token = self.tokens[self.at]
            self.tokens[self.at] = Token("number", token.text[1:], False)
            if not token.text[0].isdigit() or not re.match(r"\d", token.text[1:]):
                self.tokens[self.at] = token
                return self.atom()
            return Node("number", data=token.text[0], number=Fraction(token.text[0]))
        if self.kind in ("letter", "name", "number", "{", "command", "(", "text"):
            return self.atom()
        raise UnreadableError("an argument is missing")

    def a_command(self, token: Token) -> Node:
        name = token.text
        if name in ("frac", "dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"):
            return Node("div", (self.group_or_sign(), self.group_or_sign()), "frac")
        if name in ("binom", "dbinom", "tbinom"):
            return Node("call", (self.group_or_sign(), self.group_or_sign()), "binom")
        if name in ("infty", "emptyset", "varnothing"):
            return Node("symbol", data="infty") if name == "infty" else Node("set")
        if name == "mathbb":
            return Node("symbol", data=f"mathbb {self.braced()}")
        if name in ("overline", "bar", "vec", "hat", "tilde", "overrightarrow", "widehat", "underline", "dot"):
            inner = self.group_or_sign()
            return inner if name in ("vec", "hat", "overrightarrow", "underline") else Node("call", (inner,), name)
        if name in ("pmod", "bmod", "mod"):
            raise UnreadableError("a modulus")
        return Node("symbol", data=name)

    def braced(self) -> str:
        r"""The letter and the sign in \mathbb{R+}, or the letter that stands there alone."""
        if not self.take("{"):
            return self.next().text
        found = ""
        while self.kind in ("letter", "+", "-", "*", "number"):
            found += self.next().text
        self.expect("}")
        return found

    def a_text(self, token: Token) -> Node:
        return Node("text", data=token.text)

    def a_brace(self, token: Token) -> Node:
        inner = self.list()
        self.expect("}")
        return inner

    def a_set(self, token: Token) -> Node:
        if self.take("}}"):
            return Node("set")
        at, kept = self.at, list(self.tokens)  # \frac12 divides its token
        before, self.bars_end = self.bars_end, True
        first = self.sum() if self.kind != "(" else self.relation()
        domain = self.sum() if self.take("in") else _REALS
        self.bars_end = before
        if self.take(":", "|"):
            condition = self.list()
            self.expect("}}")
            return Node("builder", (first, condition) if domain == _REALS else (first, condition, domain))
        self.at, self.tokens = at, kept
        inner = self.list()
        self.expect("}}")
        return Node("set", inner.args if inner.op == "list" else (inner,))

    def a_bracket(self, token: Token) -> Node:
        """A group, a tuple or an interval: the brackets are kept."""
        inner = self.list()
        closing = self.expect({"<(": ")>"}.get(token.kind, ")"), "]")
        items = inner.args if inner.op == "list" else (inner,)
        if len(items) == 1 and ((token.kind, closing) == ("(", ")") or inner.op == "matrix"):
            return inner
        brackets = "()" if token.kind == "<(" else token.kind + closing
        return Node("tuple", items, brackets)

    def a_bar(self, token: Token) -> Node:
        before, self.bars_end = self.bars_end, True
        inner = self.relation()
        self.expect("|")
        self.bars_end = before
        return Node("call", (inner,), "abs")

    def a_floor(self, token: Token) -> Node:
        inner = self.relation()
        self.expect("r" + token.kind[1:])
        return Node("call", (inner,), token.kind[1:])

    def a_matrix(self, token: Token) -> Node:
        rows: list[list[Node]] = [[]]
        while self.kind not in ("close", "end"):
            if self.take("row"):
                rows.append([])
            elif not self.take("&", ","):
                if (self.kind == "command" and self.text == "hline") or (
                    self.kind == "text" and self.text.strip(" ,").lower() in ("if", "when", "for", "where")
                ):
                    self.next()
                    continue
                rows[-1].append(self.relation())
                if self.kind not in ("&", "row", "close", ","):
                    raise UnreadableError("a matrix that is no table")
        self.expect("close")
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) != 1:
            raise UnreadableError("a matrix that is no table")
        return table(token.text, rows)

    def an_equation(self, token: Token) -> Node:
        self.expect("(")
        inner = self.list()
        self.expect(")")
        if len(inner.args) != 2:
            raise UnreadableError("Eq of other than two")
        if not any(part.op == "symbol" for part in inner.walk()):
            raise UnreadableError("an equation of numbers")
        return Node("relation", inner.args, "=")


_ATOMS = {
    "number": "a_number", "letter": "a_letter", "name": "a_name", "command": "a_command", "text": "a_text",
    "{": "a_brace", "{{": "a_set", "(": "a_bracket", "[": "a_bracket", "<(": "a_bracket", "|": "a_bar",
    "lfloor": "a_floor", "lceil": "a_floor", "begin": "a_matrix", "Eq": "an_equation",
}  # fmt: skip
