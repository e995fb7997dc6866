"""Values of expressions: exact fractions where possible, else floats with as many digits as needed.

Two expressions with unknowns are equal if their values agree at random points (Schwartz 1980,
doi:10.1145/322217.322225). The points are drawn anew for each pair, from a key and the texts of the pair, so no answer
can be made to vanish at them. The points are small and large, of both signs, and in both orders. An unknown function
takes random values too, so f(x) equals f(x) but never f(y). Sums, products, integrals and limits are not carried out:
they count as unknown functions of their parts.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from itertools import chain, islice
from types import MappingProxyType
from typing import Any

import mpmath

from .notation import UnreadableError
from .tree import Node

_MAX_BITS = 20_000  # of an exact numerator or denominator
_MAX_MAGNITUDE = 1_000_000  # exponent of two
_MAX_PRECISION = 8_000  # bits
_MAX_FACTORIAL = 2_000
_MAX_LOWER = 60  # lower number of a binomial coefficient whose upper number may be any fraction
_POINTS = 8
_EXTRA_POINTS = 24  # of all sizes; used if fewer than _MIN_POINTS lie in both domains, and for _PIECEWISE
_MIN_POINTS = 3
_POSITIVE = (0, 1, 4)  # points where all unknowns are positive
_RANGES = ((1.5, 5), (0.3, 1.5), (0.3, 5), (0.3, 5), (10**3, 10**6), (10**3, 10**6), (5, 100), (5, 100))  # of points
_INTEGER_NAMES = frozenset("nmkjlN")  # unknowns that are integers
_INTEGER_RANGES = ((5, 40), (5, 40), (0, 0), (41, 900), (10**4, 10**9), (10**4, 10**9), (5, 40), (41, 900))
Number = Any  # Fraction, mpf, mpc or rows of them
_mp = mpmath.MPContext()


class _MorePrecisionError(Exception):
    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.bits = bits


def draw_points(key: str) -> None:
    """Set the key from which the random points of all later comparisons are drawn."""
    global _key  # noqa: PLW0603 - global like mpmath's precision, for one pair at a time
    if key != _key:
        _key = key
        _random_value.cache_clear()


_key = ""


def same(left: Node, right: Node) -> bool:
    """Return whether two expressions have equal values for all values of their unknowns. Raises UnreadableError."""
    bits = 200 + 4 * max(
        (len(node.data) for side in (left, right) for node in side.walk() if node.op == "number"), default=0
    )
    unknown_names = unknowns(left) | unknowns(right)
    if not unknown_names:
        return _compare_at(left, right, _Evaluation, bits)[0]
    if _has_steps(left) != _has_steps(right):  # random points miss single or distant differences
        return False
    symbols = {part.data for side in (left, right) for part in side.walk() if part.op == "symbol"}
    names = sorted(symbols & unknown_names)
    integer_names = _integer_unknowns(left) | _integer_unknowns(right)
    is_complex = any(part == Node("symbol", data="i") for side in (left, right) for part in side.walk())
    is_piecewise = any(part.data in _PIECEWISE for side in (left, right) for part in side.walk())
    decided: set[tuple[Fraction, ...]] = set()  # distinct points
    undecided = 0
    assignments = (_assignment(names, integer_names, point) for point in range(_POINTS + _EXTRA_POINTS))
    kinks = _near_kinks((left, right), integer_names, _assignment(names, integer_names, 0)) if is_piecewise else ()
    for point, values in enumerate(chain(assignments, kinks)):
        if point >= _POINTS and len(decided) >= _MIN_POINTS and not is_piecewise:
            break
        make_evaluation = partial(_Evaluation, point % _POINTS, values)
        try:
            equal, imaginary = _compare_at(left, right, make_evaluation, bits)
        except UnreadableError:  # undefined or too large at this point
            continue
        if imaginary and not (is_complex and point in _POSITIVE):
            if imaginary == 1 and point in _POSITIVE:
                return False
            undecided += equal and point in _POSITIVE
        elif not equal:
            return False
        else:
            decided.add(tuple(values.values()) or (Fraction(point),))
    return len(decided) + undecided >= (_MIN_POINTS if integer_names else 2)


def _has_steps(node: Node) -> bool:
    """Return whether a floor, ceiling, power of 0, or binomial coefficient with a large lower number has an unknown."""
    return any(bool(unknowns(part)) and _is_step(part) for part in node.walk())


def _is_step(node: Node) -> bool:
    if node.data == "binom":
        return (node.args[1].number or 0) > _MAX_LOWER
    return node.data in _STEPS or (node.op == "pow" and node.args[0].number == 0)


def _near_kinks(
    sides: Sequence[Node], integer_names: frozenset[str], values: dict[str, Fraction]
) -> Iterator[dict[str, Fraction]]:
    """Yield values of the unknowns on both sides of the zero of each linear sum inside a piecewise function."""
    calls = [part for side in sides for part in side.walk() if part.data in _PIECEWISE]
    sums = dict.fromkeys(part for call in calls for part in call.walk() if part.op in ("add", "sub"))
    for term, name in islice(
        ((term, name) for term in sums for name in values if name in unknowns(term)), _EXTRA_POINTS
    ):
        try:
            start, middle, end = (float(_Evaluation(0, values | {name: Fraction(n)}).value(term)) for n in range(3))
        except (UnreadableError, _MorePrecisionError, OverflowError, ValueError, TypeError, ZeroDivisionError):
            continue
        slope = middle - start
        if not slope or not math.isclose(slope, end - middle, rel_tol=1e-6):
            continue
        zero = -start / slope
        reach = abs(zero) / 7 or 1.0
        for value, rounded in ((zero - reach, math.floor), (zero + reach, math.ceil)):
            yield values | {name: Fraction(rounded(value) if name in integer_names else value)}


def _compare_at(left: Node, right: Node, make_evaluation: "Callable[[], _Evaluation]", bits: int) -> tuple[bool, int]:
    """Return whether two expressions are equal at a point, and how many of them are not real there."""
    for _ in range(4):
        _mp.prec = bits
        try:
            evaluation = make_evaluation()
            left_value, right_value = evaluation.value(left), evaluation.value(right)
            return _equal(left_value, right_value, evaluation), sum(
                isinstance(side, _mp.mpc) for side in (left_value, right_value)
            )
        except _MorePrecisionError as error:
            if (bits := error.bits + 64) > _MAX_PRECISION:
                break
        except (OverflowError, ValueError, TypeError, ZeroDivisionError, mpmath.libmp.NoConvergence) as error:
            raise UnreadableError("no value") from error
    raise UnreadableError("too many digits are needed")


def constant(node: Node) -> Number:
    """Return the value of an expression without unknowns, a Fraction or an mpf. Raises UnreadableError."""
    _mp.prec = 200
    try:
        return _Evaluation().value(node)
    except (_MorePrecisionError, OverflowError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UnreadableError("no value") from error


@lru_cache(1024)
def unknowns(node: Node) -> frozenset[str]:
    """Return the names in an expression that have no known value."""
    calls = [part.data for part in node.walk() if part.op == "call" and part.data not in _FUNCTIONS]
    names = [part.data for part in node.walk() if part.op == "symbol" and part.data not in _CONSTANTS]
    return frozenset(calls + names)


@lru_cache(1024)
def _integer_unknowns(node: Node) -> frozenset[str]:
    """Return the unknowns that are integers, such as those in a factorial."""
    inner = [arg for part in node.walk() if part.data in _COUNTING for arg in part.args]
    return frozenset(name for part in inner for name in unknowns(part)) | (unknowns(node) & _INTEGER_NAMES)


def is_computed(function: str) -> bool:
    """Return whether this module computes values of the function."""
    return function in _FUNCTIONS


def _equal(left: Number, right: Number, evaluation: "_Evaluation") -> bool:
    if isinstance(left, tuple) or isinstance(right, tuple):
        return (
            isinstance(left, tuple)
            and isinstance(right, tuple)
            and [len(row) for row in left] == [len(row) for row in right]
            and all(
                _equal(a, b, evaluation)
                for left_row, right_row in zip(left, right, strict=True)
                for a, b in zip(left_row, right_row, strict=True)
            )
        )
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = evaluation.rounded(left), evaluation.rounded(right)
    if left == right:
        return True
    if _mp.isinf(left) or _mp.isinf(right) or _mp.isnan(left) or _mp.isnan(right):
        return False
    small = _mp.mag(left - right)
    return bool(small < max(_mp.mag(left), _mp.mag(right), evaluation.peak) - _mp.prec * 3 // 4)


def _assignment(names: list[str], integer_names: frozenset[str], point: int) -> dict[str, Fraction]:
    """Return the values of the unknowns at a point.

    Points come in pairs: the second has the integers in reverse order and, except in the first pair, the opposite
    signs.
    """
    integers = [name for name in names if name.rstrip("'") in integer_names]
    values = [_integer_at(name, point - point % 2 if len(integers) > 1 else point) for name in integers]
    assigned = dict(zip(integers, values[:: -1 if point % 2 else 1], strict=True))
    return assigned | {name: _random_value(name, point) for name in names if name not in assigned}


def _integer_at(name: str, point: int) -> Fraction:
    low, high = _INTEGER_RANGES[point] if point < _POINTS else (1, 40)
    return Fraction(random.Random(f"{_key} {name} {point}").randint(low, high))


@lru_cache(4096)
def _random_value(name: str, point: int) -> Fraction:
    first = point if point < 2 else point - point % 2
    generator = random.Random(f"{_key} {name} {first}")
    denominator = generator.randint(1000, 9999)
    low, high = _RANGES[first] if first < _POINTS else (0.01, 10 ** generator.uniform(-1, 4))
    value = Fraction(generator.randint(int(low * denominator), int(high * denominator)), denominator)
    negative = first not in _POSITIVE and generator.random() < 0.5
    return -value if negative != (point != first) else value


class _Evaluation:
    """Evaluates expressions at one point. `peak` is the largest magnitude that cancelled in a sum."""

    def __init__(self, point: int = 0, values: Mapping[str, Fraction] = MappingProxyType({})) -> None:
        self.point, self.values, self.peak = point, values, -_MAX_MAGNITUDE

    def value(self, node: Node) -> Number:
        handler: Callable[[Node], Number] | None = getattr(self, f"on_{node.op}", None)
        if handler is None:
            raise UnreadableError(f"{node.op} has no value")
        return self.bounded(handler(node))

    def bounded(self, value: Number) -> Number:
        """Return the value. Raises UnreadableError if a fraction is too long or a magnitude exceeds the bound."""
        if isinstance(value, Fraction):
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
                raise UnreadableError("too large")
        elif not isinstance(value, tuple) and _mp.isfinite(value) and value and abs(_mp.mag(value)) > _MAX_MAGNITUDE:
            raise UnreadableError("too large")
        return value

    def rounded(self, value: Number) -> Number:
        """Convert the value to a float of the current precision. Raises _MorePrecisionError if digits would be lost."""
        if not isinstance(value, Fraction):
            return value
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        if bits > _mp.prec - 100 and value.denominator != 1:
            raise _MorePrecisionError(bits + 100)
        if value.denominator == 1 and bits > _mp.prec - 40:
            raise _MorePrecisionError(bits + 40)
        return _mp.mpf(value.numerator) / value.denominator

    def on_number(self, node: Node) -> Number:
        return node.number

    def on_symbol(self, node: Node) -> Number:
        if node.data in _CONSTANTS:
            return _CONSTANTS[node.data]()
        return self.values[node.data] if node.data in self.values else _random_value(node.data, self.point)

    def on_unit(self, node: Node) -> Number:
        return self.value(node.args[0])

    def on_percent(self, node: Node) -> Number:
        return self.multiply(self.value(node.args[0]), Fraction(1, 100))

    def on_degree(self, node: Node) -> Number:
        return self.multiply(self.value(node.args[0]), _mp.pi / 180)

    def on_base(self, node: Node) -> Number:
        base = int(node.args[1].number or 0)
        if not 2 <= base <= 36:
            raise UnreadableError("the base is not in 2 to 36")
        return Fraction(int(node.data, base))

    def on_neg(self, node: Node) -> Number:
        return self.multiply(Fraction(-1), self.value(node.args[0]))

    def on_add(self, node: Node) -> Number:
        return self.add(self.value(node.args[0]), self.value(node.args[1]))

    def on_sub(self, node: Node) -> Number:
        return self.add(self.value(node.args[0]), self.multiply(Fraction(-1), self.value(node.args[1])))

    def on_mul(self, node: Node) -> Number:
        return self.multiply(self.value(node.args[0]), self.value(node.args[1]))

    def on_div(self, node: Node) -> Number:
        return self.divide(self.value(node.args[0]), self.value(node.args[1]))

    def on_ratio(self, node: Node) -> Number:
        if len(node.args) != 2:
            raise UnreadableError("a ratio of more than two numbers")
        return self.on_div(node)

    def on_matrix(self, node: Node) -> Number:
        return tuple(tuple(self.value(item) for item in row.args) for row in node.args)

    def on_pow(self, node: Node) -> Number:
        base, exponent = (self.value(arg) for arg in node.args)
        return self.power(base, exponent)

    def on_call(self, node: Node) -> Number:
        args = [self.value(arg) for arg in node.args]
        function = _FUNCTIONS.get(node.data)
        if function is not None:
            if node.data in _MATRIX_FUNCTIONS:
                return function(self, *args)
            if any(isinstance(arg, tuple) for arg in args):
                raise UnreadableError("the function takes no matrix")
            return function(self, *args)
        return self.random_function(node.data, args)

    def on_relation(self, node: Node) -> Number:
        return self.random_function(node.data, [self.value(arg) for arg in node.args])

    def random_function(self, name: str, args: list[Number]) -> Number:
        """Return the value of an unknown function, a random polynomial, so that the value is exact."""
        total: Number = _random_value(f"{name}/{len(args)}", self.point)
        for index, arg in enumerate(args):
            linear, quadratic = (_random_value(f"{name}/{len(args)}/{index}/{n}", self.point) for n in (1, 2))
            total = self.add(total, self.multiply(arg, self.add(linear, self.multiply(quadratic, arg))))
        return total

    def add(self, left: Number, right: Number) -> Number:
        if isinstance(left, tuple) and isinstance(right, tuple):
            return tuple(
                tuple(self.add(a, b) for a, b in zip(left_row, right_row, strict=True))
                for left_row, right_row in zip(left, right, strict=True)
            )
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left + right
        left, right = self.rounded(left), self.rounded(right)
        total = left + right
        if left and right and _mp.isfinite(left) and _mp.isfinite(right):
            left_mag, right_mag = _mp.mag(left), _mp.mag(right)
            if abs(left_mag - right_mag) > _mp.prec // 2:  # the smaller one would be lost
                raise _MorePrecisionError(2 * abs(left_mag - right_mag) + 64)
            self.peak = max(
                self.peak, min(left_mag, right_mag) if not total or _mp.mag(total) < left_mag - 8 else self.peak
            )
        return total

    def multiply(self, left: Number, right: Number) -> Number:
        if isinstance(left, tuple) or isinstance(right, tuple):
            return self.multiply_matrices(left, right)
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left * right
        left, right = self.rounded(left), self.rounded(right)
        if not left or not right:
            if not _mp.isfinite(left) or not _mp.isfinite(right):
                raise UnreadableError("zero times infinity")
            return Fraction(0)
        return left * right

    def multiply_matrices(self, left: Number, right: Number) -> Number:
        if not isinstance(left, tuple):
            return tuple(tuple(self.multiply(left, item) for item in row) for row in right)
        if not isinstance(right, tuple):
            return self.multiply_matrices(right, left)
        columns = list(zip(*right, strict=True))
        return tuple(tuple(self.dot(row, column) for column in columns) for row in left)

    def dot(self, row: tuple[Number, ...], column: tuple[Number, ...]) -> Number:
        total: Number = Fraction(0)
        for a, b in zip(row, column, strict=True):
            total = self.add(total, self.multiply(a, b))
        return total

    def divide(self, left: Number, right: Number) -> Number:
        if isinstance(right, tuple):
            raise UnreadableError("division by a matrix")
        if isinstance(left, tuple):
            return self.multiply_matrices(self.divide(Fraction(1), right), left)
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left / right
        return self.rounded(left) / self.rounded(right)

    def power(self, base: Number, exponent: Number) -> Number:
        if isinstance(base, tuple) or isinstance(exponent, tuple):
            return self.matrix_power(base, exponent)
        if isinstance(exponent, Fraction):
            if isinstance(base, Fraction) and exponent.denominator == 1:
                size = max(base.numerator.bit_length(), base.denominator.bit_length())
                if abs(exponent.numerator) * size <= _MAX_BITS:
                    return base**exponent.numerator
            if isinstance(base, Fraction) and (root := _exact_power(base, exponent)) is not None:
                return root
            if exponent.denominator % 2 and not isinstance(base, _mp.mpc) and base < 0:  # the real root
                positive = self.power(-base, exponent)
                return -positive if exponent.numerator % 2 else positive
        base, exponent = self.rounded(base), self.rounded(exponent)
        if not base:
            if isinstance(exponent, _mp.mpc) or exponent <= 0:
                raise UnreadableError("zero to a power that is not positive")
            return Fraction(0)
        if not _mp.isfinite(base) or not _mp.isfinite(exponent):
            raise UnreadableError("a power of infinity")
        self.check_exponent(_mp.mag(exponent) + max(1, abs(_mp.mag(base))).bit_length())
        if exponent:
            self.require_precision(-_mp.mag(exponent))  # a power near 0 is near 1
        return base**exponent

    def matrix_power(self, base: Number, exponent: Number) -> Number:
        if not isinstance(exponent, Fraction) or exponent.denominator != 1 or not 1 <= exponent <= 20:
            raise UnreadableError("unsupported power of a matrix")
        total = base
        for _ in range(int(exponent) - 1):
            total = self.multiply_matrices(total, base)
        return total

    def require_precision(self, bits: int) -> None:
        """Raises _MorePrecisionError if an argument differs from 0, or a value from a constant, by only 2^-bits."""
        if bits > _mp.prec // 4:
            raise _MorePrecisionError(4 * bits)

    def check_exponent(self, bits: int) -> None:
        """Raises UnreadableError before a result of 2^(2^bits) is computed, if that is too large."""
        if bits > 20:
            raise UnreadableError("too large")


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """Return the exact power if the root is rational, else None."""
    if base <= 0 or exponent.denominator > 64 or abs(exponent.numerator) > 64:
        return None
    roots = []
    for part in (base.numerator, base.denominator):
        if part.bit_length() > 2000:
            return None
        root = int(_mp.nint(_mp.root(part, exponent.denominator)))
        if root**exponent.denominator != part:
            return None
        roots.append(root)
    power = Fraction(*roots) ** exponent.numerator
    return Fraction(power)


def _float_function(
    function: Callable[[Number], Number], max_magnitude: int = 4000, saturates: bool = False
) -> Callable[..., Number]:
    """Return a method of `_Evaluation` that calls `function` with a float of at most 2^`max_magnitude`.

    A function that `saturates` is within 2^-3x of a constant at x.
    """

    def apply(evaluation: _Evaluation, arg: Number) -> Number:
        arg = evaluation.rounded(arg)
        if not _mp.isfinite(arg) or (arg and _mp.mag(arg) > max_magnitude):
            raise UnreadableError("the argument is too large")
        if arg:
            evaluation.require_precision(int(3 * abs(arg)) if saturates and _mp.mag(arg) < 30 else abs(_mp.mag(arg)))
        return function(arg)

    return apply


def _log(evaluation: _Evaluation, arg: Number, base: Number = Fraction(10)) -> Number:
    value = evaluation.rounded(arg)
    if not value or not evaluation.rounded(base):
        raise UnreadableError("a logarithm of zero")
    numerator, denominator = _mp.ln(value), _mp.ln(evaluation.rounded(base))
    ratio = numerator / denominator
    if isinstance(arg, Fraction) and isinstance(base, Fraction) and arg > 0 and base > 0 and abs(_mp.nint(ratio)) < 999:
        exponent = int(_mp.nint(ratio))
        if (
            abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) < _MAX_BITS
            and base**exponent == arg
        ):
            return Fraction(exponent)
    return ratio


def _sqrt(evaluation: _Evaluation, arg: Number, index: Number = Fraction(2)) -> Number:
    return evaluation.power(arg, evaluation.divide(Fraction(1), index))


def _bounded_integer(value: Number, maximum: int) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= maximum:
        raise UnreadableError("no factorial of this value")
    return int(value)


def _factorial(evaluation: _Evaluation, arg: Number) -> Number:
    return Fraction(int(_mp.factorial(0)) if arg == 0 else _product(1, _bounded_integer(arg, _MAX_FACTORIAL)))


def _factorial2(evaluation: _Evaluation, arg: Number) -> Number:
    return Fraction(math.prod(range(_bounded_integer(arg, _MAX_FACTORIAL), 0, -2)))


def _permutations(evaluation: _Evaluation, top: Number, low: Number) -> Number:
    return Fraction(math.perm(_bounded_integer(top, _MAX_FACTORIAL), _bounded_integer(low, _MAX_FACTORIAL)))


def _cis(evaluation: _Evaluation, arg: Number) -> Number:
    return evaluation.power(_mp.e, evaluation.multiply(_mp.mpc(0, 1), arg))


def _product(low: int, high: int) -> int:
    total = 1
    for factor in range(low, high + 1):
        total *= factor
    return total


def _binom(evaluation: _Evaluation, top: Number, low: Number) -> Number:
    if isinstance(top, Fraction) and isinstance(low, Fraction) and low.denominator == 1 and 0 <= low <= _MAX_LOWER:
        total = Fraction(1)
        for n in range(int(low)):
            total *= (top - n) / (n + 1)
        return total
    n, k = _bounded_integer(top, _MAX_FACTORIAL), _bounded_integer(low, _MAX_FACTORIAL)
    return Fraction(_product(n - k + 1, n), _product(1, k)) if k <= n else Fraction(0)


def _abs(evaluation: _Evaluation, arg: Number) -> Number:
    return abs(arg)


def _floor(evaluation: _Evaluation, arg: Number) -> Number:
    return Fraction(arg.__floor__() if isinstance(arg, Fraction) else int(_mp.floor(evaluation.rounded(arg))))


def _ceil(evaluation: _Evaluation, arg: Number) -> Number:
    return -_floor(evaluation, -arg)


def _transpose(evaluation: _Evaluation, rows: Number) -> Number:
    if not isinstance(rows, tuple):
        raise UnreadableError("transpose of a value that is not a matrix")
    return tuple(zip(*rows, strict=True))


def _exp(evaluation: _Evaluation, arg: Number) -> Number:
    return evaluation.power(_mp.e, arg)


_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "log": _log, "log_": _log, "lg": _log, "exp": _exp, "sqrt": _sqrt, "sqrt_": _sqrt,
    "ln": lambda evaluation, arg: _log(evaluation, arg, _mp.e),
    "cbrt": lambda evaluation, arg: _sqrt(evaluation, arg, Fraction(3)),
    "factorial": _factorial, "binom": _binom, "abs": _abs, "lfloor": _floor, "floor": _floor, "lceil": _ceil,
    "ceil": _ceil, "transpose": _transpose, "factorial2": _factorial2, "permutations": _permutations, "cis": _cis,
    "Re": _float_function(_mp.re), "Im": _float_function(_mp.im),
}  # fmt: skip
for _name in ("sin", "cos", "tan", "cot", "sec", "csc"):
    _FUNCTIONS[_name] = _float_function(getattr(_mp, _name))
    _FUNCTIONS[f"{_name}h"] = _float_function(getattr(_mp, f"{_name}h"), 15, saturates=_name in ("tan", "cot"))
    _FUNCTIONS[f"arc{_name}"] = _float_function(getattr(_mp, f"a{_name}"))
for _name in ("sinh", "cosh", "tanh"):
    _FUNCTIONS[f"ar{_name}"] = _FUNCTIONS[f"a{_name}"] = _FUNCTIONS[f"arc{_name}"] = _float_function(
        getattr(_mp, f"a{_name}")
    )
_PIECEWISE = ("abs", "floor", "lfloor", "ceil", "lceil", "sqrt", "max", "min")  # their pieces may be small
_STEPS = ("floor", "lfloor", "ceil", "lceil", "sgn")
_COUNTING = ("factorial", "factorial2", "binom", "permutations")
_MATRIX_FUNCTIONS = ("transpose",)
_CONSTANTS: dict[str, Callable[[], Number]] = {
    "pi": lambda: +_mp.pi, "e": lambda: +_mp.e, "i": lambda: _mp.mpc(0, 1), "infty": lambda: _mp.inf,
}  # fmt: skip
