r"""Values of LaTeX, computed without the grader, to prove that an attack changes the value of a gold.

It reads the notation of MATH answers: numbers, fractions, roots, powers, names, functions, `N_b` in a base. Other texts
have no known value: None. Units and dollars are dropped. k, m and n are natural numbers.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache

import mpmath
from mpmath import mp, mpc, mpf

_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle)(?![a-z])|\\[!,;: ]|\\phantom\s*-|~|\\?\$"
    r"|\\(?:text|mbox|textnormal)\{[^{}]*\}(?:\^\{?\d\}?)?"
)
_DEGREE = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:,(?:\\!)*|\{,\})\d{3})+(?!\d)")
_TOKEN = re.compile(r"°|\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\\%|[-+*/^_!()|{}\[\]]|[A-Za-z]")
_FUNCTIONS: Mapping[str, Callable[[mpc], mpc]] = {
    **{rf"\{name}": getattr(mpmath, name) for name in "sin cos tan cot sec csc sinh cosh tanh ln exp".split()},
    **{rf"\arc{name}": getattr(mpmath, f"a{name}") for name in ("sin", "cos", "tan")},
}
_NAMES = [*"abcdghjlopqrstuvwxyzABCDFGHKLMNPQRSTXYZ", r"\alpha", r"\beta", r"\theta", r"\phi", r"\lambda", r"\omega"]
_POINTS = [
    {
        **{name: mpf(start + 37 * index % 101) / 29 - shift for index, name in enumerate(_NAMES)},
        **{"k": mpf(natural), "m": mpf(natural + 3), "n": mpf(natural + 4)},
    }
    for start, shift, natural in ((11, 0, 2), (5, 2, 5), (23, 0.5, 3), (70, 4, 1))
]
_ERRORS = (
    KeyError,
    IndexError,
    ValueError,
    ZeroDivisionError,
    OverflowError,
    TypeError,
    mpmath.libmp.NoConvergence,
)


def differ(left: str, right: str) -> bool:
    """Whether the values of two texts are known and differ at some point, with a degree as 1 and as pi/180."""
    degrees = (mpf(1), mpf("0.0174532925199432957692")) if "circ" in left else (mpf(1),)
    return all(_differ(*(_values(text, degree) for text in (left, right))) for degree in degrees)


def proportional(left: str, right: str) -> bool:
    """Whether two expressions are equal up to a factor; True if a value is unknown or 0."""
    values = [*zip(_values(left), _values(right), strict=True)]
    if any(not a or not b for a, b in values):
        return True
    with mp.workdps(40):
        ratios = [a / b for a, b in values if a is not None and b is not None]
        return all(abs(ratio - ratios[0]) < mpf(10) ** -20 * abs(ratio) for ratio in ratios)


def number(text: str) -> mpc | None:
    """The value of a text without unknowns, or None."""
    return value(text, {})


def value(text: str, unknowns: Mapping[str, mpf], degree: mpf | None = None) -> mpc | None:
    text = _DROPPED.sub(" ", _DEGREE.sub("°", joined(text)))
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\\(?:cdot|times)(?![a-z])", "*", text))
    if not text.strip() or _TOKEN.sub("", text).strip():
        return None
    try:
        with mp.workdps(40):
            parser = _Parser(_TOKEN.findall(text), unknowns, mpf(1) if degree is None else degree)
            result = mpc(parser.sum())
            return result if not parser.tokens and mpmath.isfinite(result) else None
    except _ERRORS:
        return None


def joined(text: str) -> str:
    """The text without thousands separators."""
    return _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)


@lru_cache(4096)
def _values(text: str, degree: mpf | None = None) -> list[mpc | None]:
    return [value(text, point, degree) for point in _POINTS]


def _differ(left_values: list[mpc | None], right_values: list[mpc | None]) -> bool:
    """Whether all values are known and differ where the left one is real, or anywhere if it never is."""
    pairs = [(a, b) for a, b in zip(left_values, right_values, strict=True) if a is not None and b is not None]
    if len(pairs) < len(left_values):
        return False
    with mp.workdps(40):
        real = [(a, b) for a, b in pairs if abs(a.imag) < mpf(10) ** -30]
        return any(abs(a - b) > mpf(10) ** -25 * max(1, abs(a)) for a, b in real or pairs)


class _Parser:
    """Recursive descent over tokens; `tokens[0]` is the next one."""

    def __init__(self, tokens: list[str], unknowns: Mapping[str, mpf], degree: mpf) -> None:
        self.tokens, self.unknowns, self.degree = tokens, unknowns, degree
        self._open_bars = 0

    def sum(self) -> mpc:
        total = mpc(0) if self._next_is("+", "-") else self._product()
        while self._next_is("+", "-"):
            sign = -1 if self.tokens.pop(0) == "-" else 1
            total += sign * self._product()
        return total

    def _next_is(self, *tokens: str) -> bool:
        return bool(self.tokens) and self.tokens[0] in tokens

    def _accept(self, token: str) -> bool:
        return self._next_is(token) and bool(self.tokens.pop(0))

    def _expect(self, token: str) -> None:
        if self.tokens.pop(0) != token:
            raise ValueError(token)

    def _product(self) -> mpc:
        total = self._power()
        while self.tokens and not self._next_is("+", "-", ")", "}", "]", r"\rfloor", r"\rceil"):
            if self._next_is("|") and self._open_bars:
                break
            if self._accept("*"):
                total *= self._signed()
            elif self._accept("/"):
                total /= self._signed()
            else:
                total *= self._power()
        return total

    def _signed(self) -> mpc:
        return -self._power() if self._accept("-") else self._power()

    def _power(self) -> mpc:
        base = self._atom()
        while self._next_is("^", "!", "°", r"\%"):
            token = self.tokens.pop(0)
            if token == "^":
                exponent = self._argument()
                base = mpc(0) if base == 0 and exponent.real > 0 else mpc(mpmath.power(base, exponent))
            elif token == "!":
                base = mpmath.factorial(base)
            else:
                base *= self.degree if token == "°" else mpf(1) / 100
        return base

    def _argument(self) -> mpc:
        """A group or one token; the first digit of a number."""
        if self._next_is("{"):
            return self._group("{", "}")
        if self.tokens[0][0].isdigit() and len(self.tokens[0]) > 1:
            digit, self.tokens[0] = self.tokens[0][0], self.tokens[0][1:]
            return mpc(digit)
        return self._atom()

    def _group(self, opening: str, closing: str) -> mpc:
        self._expect(opening)
        bars, self._open_bars = self._open_bars, 0
        result = self.sum()
        self._open_bars = bars
        self._expect(closing)
        return result

    def _atom(self) -> mpc:
        token = self.tokens[0]
        if token in "({":
            return self._group(token, {"(": ")", "{": "}"}[token])
        self.tokens.pop(0)
        if token[0].isdigit() or token[0] == ".":
            return self._digits(token)
        if token == "|":
            self._open_bars += 1
            result = mpc(abs(self.sum()))
            self._open_bars -= 1
            self._expect("|")
            return result
        if token.startswith("\\") and token not in self.unknowns:
            return self._command(token)
        if self._next_is("_") or (token in "fgh" and self._next_is("(")):
            raise ValueError("a name with an index, or a function")
        return {"i": mpc(0, 1), "e": mpc(mpmath.e)}.get(token) or mpc(self.unknowns[token])

    def _command(self, token: str) -> mpc:
        if token == r"\pi":
            return mpc(mpmath.pi)
        if token == r"\frac":
            return self._argument() / self._argument()
        if token == r"\binom":
            return mpmath.binomial(self._argument(), self._argument())
        if token == r"\sqrt":
            degree = self._group("[", "]") if self._next_is("[") else mpc(2)
            return _root(self._argument(), degree)
        if token in (r"\lfloor", r"\lceil"):
            inside = self.sum()
            self._expect(token.replace(r"\l", r"\r"))
            return mpc(mpmath.floor(inside) if "floor" in token else mpmath.ceil(inside))
        if token == r"\log":
            self._expect("_")
            base = self._argument()
            return mpmath.log(self._function_argument()) / mpmath.log(base)
        power = self._argument() if self._accept("^") else mpc(1)
        if power.real < 0:
            raise ValueError("inverse or reciprocal")
        return mpmath.power(_FUNCTIONS[token](self._function_argument()), power)

    def _digits(self, token: str) -> mpc:
        if self._accept("_"):
            return mpc(int(token, int(self._argument().real)))
        if self._next_is(r"\frac") and "." not in token:
            tokens = list(self.tokens)
            fraction = self._atom()
            text = "".join(tokens[: len(tokens) - len(self.tokens)])
            is_mixed = re.fullmatch(r"\\frac[{}\d]+", text) is not None
            return mpc(token) + fraction if is_mixed else mpc(token) * fraction
        return mpc(token)

    def _function_argument(self) -> mpc:
        """The argument of a function: a group, or the factors up to the next sign or function."""
        if self._next_is("(", "{"):
            return self._power()
        total = self._power()
        while self.tokens and (self.tokens[0][0].isalnum() or self._next_is(r"\pi", r"\frac", r"\sqrt", *_NAMES)):
            total *= self._power()
        return total


def _root(inside: mpc, degree: mpc) -> mpc:
    """The real root if there is one, else the principal root."""
    if inside == 0:
        return inside
    if inside.imag == 0 and inside.real < 0 and degree.imag == 0 and degree.real % 2 == 1:
        return -mpmath.power(-inside, 1 / degree)
    return mpc(mpmath.power(inside, 1 / degree))
