"""Parses the tokens of an answer into a tree by recursive descent. Nothing is computed here. Stdlib only."""

import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache, reduce

from .notation import FUNCTIONS, MAX_DEPTH, Token, UnreadableError, clean, tokens
from .tree import Node, called_binomial, indexed_binomial, is_integer_fraction, number, table
from .units import FACTORS, changes_value, multiplier, unit

RELATIONS = ("=", "==", "<", ">", "<=", ">=", "!=", "~", "in", "->")
_END_KINDS = (
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
_UNEVALUATED = ("sum", "prod", "int", "lim")  # operations that are not carried out
_FUNCTION_LETTERS, _ARGUMENT_LETTERS = "pqrstuvwy", "xtnz"  # as in p(x), u(t)
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "sec": "arcsec", "csc": "arccsc", "cot": "arccot"}
_PROGRAM_FUNCTIONS = {"binom": 2, "factorial": 1, "pow": 2, "Union": 0}  # program function -> number of arguments
_REALS = Node("symbol", data="mathbb R")
_DEGREE = Node("degree")  # the bare sign


@lru_cache(512)
def read(text: str, thousands: bool = True) -> Node:
    """Parse an answer's text into a tree. Raises UnreadableError if it exceeds the bounds or is not mathematics."""
    token_list = tokens(clean(text, thousands))
    if len(token_list) == 1:
        raise UnreadableError("empty")
    parser = _Parser(token_list)
    tree = parser.list()
    parser.expect("end")
    return tree


def _has_number(node: Node) -> bool:
    return any(part.op in ("number", "text") or part.data in ("pi", "sqrt") for part in node.walk())


class _Parser:
    """Recursive descent: each method consumes tokens and returns the node of one grammar rule."""

    def __init__(self, token_list: list[Token]) -> None:
        self.tokens, self.position, self.depth = token_list, 0, 0
        self.bars_end = False  # whether a bar only closes: in an absolute value, and before the bar of a set

    @property
    def kind(self) -> str:
        return self.tokens[self.position].kind

    @property
    def text(self) -> str:
        return self.tokens[self.position].text

    def next(self) -> Token:
        token = self.tokens[self.position]
        self.position += token.kind != "end"
        return token

    def take(self, *kinds: str) -> str:
        """Consume the next token if its kind is one of these, and return the kind; else return an empty string."""
        return self.next().kind if self.kind in kinds else ""

    def expect(self, *kinds: str) -> str:
        if self.kind not in kinds:
            raise UnreadableError(f"{self.text!r} instead of {kinds[0]!r}")
        return self.next().kind

    # ---- lists, relations, sets ----

    def list(self) -> Node:
        """Parse items between `,`, `;`, "and", "or". If there are both `;` and `,`, the `;` separate groups."""
        groups: list[list[Node]] = [[]]
        words = ""
        while self.kind not in ("end", "close", ")", "]", "}}", "}", ")>", "row", "&"):
            if kind := self.take(",", ";", "and", "or"):
                words += kind if kind in ("and", "or") and kind not in words else ""
                if kind == ";" and groups[-1]:
                    groups.append([])
                continue
            groups[-1].append(self.relation())
            if self.kind not in _END_KINDS:
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
            raise UnreadableError("brackets are nested too deeply")
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
            if right.op == "unit":  # the unit of the whole sum
                left = replace(right, args=(Node(operator, (left, right.args[0])),))
            else:
                left = Node(operator, (left, right))
        return left

    def product(self) -> Node:
        left = self.signed()
        while self.kind not in _END_KINDS or (self.kind == "|" and not self.bars_end):
            if kind := self.take("*", "/"):
                left = Node("mul" if kind == "*" else "div", (left, self.signed()))
            elif self.kind in ("+", "-", "pm", "mp", ":", "cup", "cap", "minus", *RELATIONS):
                break
            elif self.kind == "number" and left.op == "number":
                left = self.mixed(left)
            else:
                right = self.power()
                is_integer = left.op == "number" and left.number is not None and left.number.denominator == 1
                left = Node("add" if is_integer and is_integer_fraction(right) else "mul", (left, right))
        return self.unit(left)

    def mixed(self, integer: Node) -> Node:
        """Parse a mixed number such as 3 1/2, starting at its second number."""
        ahead = [token.kind for token in self.tokens[self.position : self.position + 3]]
        if ahead[:2] != ["number", "/"] or ahead[2:] != ["number"] or "." in integer.data:
            raise UnreadableError("two numbers in a row")
        top, _, low = self.atom(), self.next(), self.atom()
        return Node("add", (integer, Node("div", (top, low))))

    def unit(self, value: Node) -> Node:
        """Parse the words after a value: its unit, with powers."""
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
            raise UnreadableError("words after a name")
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
        """Parse the operand of a leading sign: a mixed number, else one power."""
        value = self.power()
        if value.op == "number" and value.number is not None and value.number.denominator == 1:
            if self.kind == "command" and self.text in ("frac", "dfrac", "tfrac", "cfrac"):
                position, saved_tokens = self.position, list(self.tokens)
                if is_integer_fraction(right := self.power()):
                    return Node("add", (value, right))
                self.position, self.tokens = position, saved_tokens
            elif self.kind == "number":
                return self.mixed(value)
        return value

    def power(self) -> Node:
        token = self.tokens[self.position]
        base = self.postfix(self.atom())
        if self.take("^"):
            base = self.apply_exponent(base, self.exponent())
        return indexed_binomial(token.text, base)

    def apply_exponent(self, base: Node, exponent: Node) -> Node:
        if exponent == _DEGREE:
            return self.postfix(Node("degree", (base,)))
        if exponent.op == "symbol" and exponent.data in ("T", "top", "prime", "'"):
            return self.postfix(Node("call", (base,), "transpose" if exponent.data != "prime" else "prime"))
        return self.postfix(Node("pow", (base, exponent)))

    def exponent(self) -> Node:
        """Parse the exponent after ^: a group or one token. ^ is right-associative."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError("brackets are nested too deeply")
        if self.kind == "command" and self.text in ("circ", "prime", "top", "intercal"):
            name = self.next().text
            node = _DEGREE if name == "circ" else Node("symbol", data="T" if name == "intercal" else name)
        elif self.kind == "{" and self.tokens[self.position + 1][:2] == ("command", "circ"):
            self.next(), self.next()
            self.expect("}")
            node = _DEGREE
        elif self.kind in ("+", "-"):
            sign = self.next().kind
            node = Node("neg", (self.power(),)) if sign == "-" else self.power()
        else:
            node = self.atom()
            if self.take("^"):
                node = Node("pow", (node, self.exponent()))
        if any(part == _DEGREE for arg in node.args for part in arg.walk()):
            raise UnreadableError("a degree sign inside an exponent")
        self.depth -= 1
        return node

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
        """Parse a number's base, or the index of a name: a_1 is a separate name, a_k and F_{n-1} are functions."""
        index = self.index()
        if value.op == "number":
            if index.op != "number" or "." in value.data + index.data:
                raise UnreadableError("the base is not a number")
            return Node("base", (value, index), value.data)
        if value.op == "symbol":
            if index.op in ("number", "text") or (index.op == "symbol" and len(value.data) > 1):
                return Node("symbol", data=f"{value.data}_{index.data or index.number}")
            return Node("call", (index,), f"{value.data}_")
        return Node("call", (value, index), "index")

    def index(self) -> Node:
        r"""Parse the index after _: a group or one token; a word for S_{\min}."""
        kinds = [token.kind for token in self.tokens[self.position : self.position + 3]]
        if kinds[:1] == ["name"] and self.text in FUNCTIONS:
            return Node("text", data=self.next().text)
        if kinds == ["{", "name", "}"] and self.tokens[self.position + 1].text in FUNCTIONS:
            _, name, _ = self.next(), self.next(), self.next()
            return Node("text", data=name.text)
        return self.atom()

    # ---- atoms ----

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > 3 * MAX_DEPTH:
            raise UnreadableError("brackets are nested too deeply")
        token = self.next()
        handler: Callable[[Token], Node] | None = getattr(self, _ATOMS.get(token.kind, ""), None)
        if handler is None:
            raise UnreadableError(f"{token.text!r} instead of a value")
        node = handler(token)
        self.depth -= 1
        return node

    def parse_number(self, token: Token) -> Node:
        if "." in token.text and self.kind == "command" and self.text in ("overline", "bar", "dot", "overbar"):
            return self.repeating(token.text)
        return Node("number", data=token.text, number=Fraction(token.text.rstrip(".")))

    def repeating(self, head: str) -> Node:
        r"""Parse the repeating digits of 0.1\overline{6}, under the bar, or of 0.\dot{1}4\dot{2}, between the dots."""
        is_dotted = self.next().text == "dot"
        digits = self.digits()
        if is_dotted:
            middle = self.next().text if self.kind == "number" and self.text.isdecimal() else ""
            if self.kind == "command" and self.text == "dot":
                self.next()
                digits += middle + self.digits()
            elif middle:
                raise UnreadableError("digits after the repeating ones")
        decimals = len(head.partition(".")[2])
        tail = Fraction(int(digits), 10**decimals * (10 ** len(digits) - 1))
        return number(Fraction(head.rstrip(".") or 0) + tail)

    def digits(self) -> str:
        inner = self.group_or_sign()
        if inner.op != "number" or not inner.data.isdecimal():
            raise UnreadableError("no digits under a bar")
        return inner.data

    def parse_letter(self, token: Token) -> Node:
        if token.text in "fghFGH":
            name = token.text + self.marks()
            if self.kind == "(" and not self.tokens[self.position].spaced:
                return self.call(name)
            value = Node("symbol", data=token.text)
            for _ in range(name.count("'")):
                value = Node("call", (value,), "prime")
            return value
        if self.kind == "(" and not self.tokens[self.position].spaced:
            argument = self.tokens[self.position + 1]
            kinds = [following.kind for following in self.tokens[self.position + 2 : self.position + 4]]
            if token.text == "C" and "," in kinds:
                return self.call("C")
            if kinds[:1] == [")"] and (
                token.text.isupper() or (token.text in _FUNCTION_LETTERS and argument.text in _ARGUMENT_LETTERS)
            ):
                return self.call(token.text)
        return Node("symbol", data=token.text)

    def marks(self) -> str:
        """Parse the marks between the name of a function and its arguments: f', f^{-1}."""
        marks = ""
        while self.take("'"):
            marks += "'"
        ahead = [token.text for token in self.tokens[self.position : self.position + 6]]
        if ahead == ["^", "{", "-", "1", "}", "("]:
            self.position += 5
            marks += "^-1"
        return marks

    def call(self, name: str) -> Node:
        self.expect("(")
        inner = self.list()
        self.expect(")")
        args = inner.args if inner.op == "list" else (inner,)
        return called_binomial(Node("call", args, f"{name}()"))

    def parse_name(self, token: Token) -> Node:
        name = token.text
        if name in _UNEVALUATED:
            return self.unevaluated(name)
        if name in FUNCTIONS:
            return self.function(name)
        if name in _PROGRAM_FUNCTIONS:
            return self.program_function(name)
        return Node("symbol", data=name)

    def program_function(self, name: str) -> Node:
        """Parse a function of Python or sympy with its arguments in brackets."""
        args = self.call(name).args
        if name == "Union" and args:
            return reduce(lambda left, right: Node("cup", (left, right)), args)
        if len(args) != _PROGRAM_FUNCTIONS[name]:
            raise UnreadableError(f"{name} with {len(args)} arguments")
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
        call = Node("call", (*args, base) if base is not None else args, name + ("_" if base is not None else ""))
        return call if exponent is None else Node("pow", (call, exponent))

    def arguments(self, name: str) -> tuple[Node, ...]:
        """Parse arguments in brackets; without brackets, the factors up to the next sign or function: sin 2x cos y."""
        if self.kind == "(" or (self.kind == "{" and name != "sqrt"):
            closing = ")" if self.next().kind == "(" else "}"
            inner = self.list()
            self.expect(closing)
            return inner.args if inner.op == "list" else (inner,)
        if name == "sqrt":
            return (self.group_or_sign(),)
        argument = self.power() if self.kind not in ("+", "-") else self.signed()
        while self.kind in ("number", "letter", "name", "/") or (self.kind == "command" and self.text == "frac"):
            if self.kind == "name" and self.text in FUNCTIONS:
                break
            argument = (
                Node("div", (argument, self.power())) if self.take("/") else Node("mul", (argument, self.power()))
            )
        return (argument,)

    def unevaluated(self, name: str) -> Node:
        """Parse a sum, product, integral or limit with its bounds. It is not carried out."""
        bounds = []
        for _ in range(2):
            if self.take("_", "^"):
                bounds.append(self.group_or_sign())
        return Node("call", (*bounds, self.product()), name)

    def group_or_sign(self) -> Node:
        r"""Parse an argument of a command: {...} or one token; one digit of a number (\frac12)."""
        if self.kind == "number" and len(self.text) > 1:
            token = self.tokens[self.position]
            self.tokens[self.position] = Token("number", token.text[1:], False)
            if not token.text[0].isdigit() or not re.match(r"\d", token.text[1:]):
                self.tokens[self.position] = token
                return self.atom()
            return Node("number", data=token.text[0], number=Fraction(token.text[0]))
        if self.kind in ("letter", "name", "number", "{", "command", "(", "text"):
            return self.atom()
        raise UnreadableError("an argument is missing")

    def parse_command(self, token: Token) -> Node:
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
        r"""Parse the letter and sign in \mathbb{R+}, or a letter without braces."""
        if not self.take("{"):
            return self.next().text
        name = ""
        while self.kind in ("letter", "+", "-", "*", "number"):
            name += self.next().text
        self.expect("}")
        return name

    def parse_text(self, token: Token) -> Node:
        return Node("text", data=token.text)

    def parse_brace(self, token: Token) -> Node:
        inner = self.list()
        self.expect("}")
        return inner

    def parse_set(self, token: Token) -> Node:
        if self.take("}}"):
            return Node("set")
        position, saved_tokens = self.position, list(self.tokens)  # \frac12 splits its token
        outer, self.bars_end = self.bars_end, True
        first = self.sum() if self.kind != "(" else self.relation()
        domain = self.sum() if self.take("in") else _REALS
        self.bars_end = outer
        if self.take(":", "|"):
            condition = self.list()
            self.expect("}}")
            return Node("builder", (first, condition) if domain == _REALS else (first, condition, domain))
        self.position, self.tokens = position, saved_tokens
        inner = self.list()
        self.expect("}}")
        return Node("set", inner.args if inner.op == "list" else (inner,))

    def parse_bracket(self, token: Token) -> Node:
        """Parse a group, a tuple or an interval; tuples and intervals keep their brackets."""
        inner = self.list()
        closing = self.expect({"<(": ")>"}.get(token.kind, ")"), "]")
        items = inner.args if inner.op == "list" else (inner,)
        if len(items) == 1 and ((token.kind, closing) == ("(", ")") or inner.op == "matrix"):
            return inner
        brackets = "()" if token.kind == "<(" else token.kind + closing
        return Node("tuple", items, brackets)

    def parse_bar(self, token: Token) -> Node:
        outer, self.bars_end = self.bars_end, True
        inner = self.relation()
        self.expect("|")
        self.bars_end = outer
        return Node("call", (inner,), "abs")

    def parse_floor(self, token: Token) -> Node:
        inner = self.relation()
        self.expect("r" + token.kind[1:])
        return Node("call", (inner,), token.kind[1:])

    def parse_matrix(self, token: Token) -> Node:
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
                    raise UnreadableError("the rows are not a table")
        self.expect("close")
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) != 1:
            raise UnreadableError("the rows are not a table")
        return table(token.text, rows)

    def parse_equation(self, token: Token) -> Node:
        self.expect("(")
        inner = self.list()
        self.expect(")")
        if len(inner.args) != 2:
            raise UnreadableError("Eq without two arguments")
        if not any(part.op == "symbol" for part in inner.walk()):
            raise UnreadableError("an equation of numbers")
        return Node("relation", inner.args, "=")


_ATOMS = {
    "number": "parse_number", "letter": "parse_letter", "name": "parse_name", "command": "parse_command",
    "text": "parse_text", "{": "parse_brace", "{{": "parse_set", "(": "parse_bracket", "[": "parse_bracket",
    "<(": "parse_bracket", "|": "parse_bar", "lfloor": "parse_floor", "lceil": "parse_floor", "begin": "parse_matrix",
    "Eq": "parse_equation",
}  # fmt: skip
