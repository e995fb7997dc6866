"""Sums, differences and products of integers, generated from a seed."""

import itertools
import random
from collections.abc import Iterator, Sequence

from rlora.records import Prompt, RloraError

from .generated import Generated, counts

_OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


class Arithmetic:
    """All problems "What is a + b?" with integers a and b from `low` to `high`. The answer is an integer.

    `operator` is +, - or *. `held_out_share` of the pairs, selected by `seed`, are held out. A pair is held out in both
    orders, so that training on 4 + 3 does not reveal 3 + 4.
    """

    def __init__(
        self, low: int = 1, high: int = 20, operator: str = "+", held_out_share: float = 0.25, seed: int = 0
    ) -> None:
        if operator not in _OPERATORS:
            raise RloraError(f"env_args.operator = {operator!r}: use one of {' '.join(_OPERATORS)}")
        if low > high:
            raise RloraError(
                f"env_args.low = {low}: above env_args.high = {high}; lower env_args.low or raise env_args.high"
            )
        if not 0 <= held_out_share < 1:
            raise RloraError(f"env_args.held_out_share = {held_out_share}: use a number from 0 to less than 1")
        pairs = list(itertools.combinations_with_replacement(range(low, high + 1), 2))
        random.Random(seed).shuffle(pairs)
        count = round(len(pairs) * held_out_share)
        self._train, self._held_out = (
            [_prompt(a, operator, b) for x, y in part for a, b in sorted({(x, y), (y, x)})]
            for part in (pairs[count:], pairs[:count])
        )

    def train(self) -> Sequence[Prompt]:
        return self._train

    def held_out(self) -> Sequence[Prompt]:
        return self._held_out


def _prompt(a: int, operator: str, b: int) -> Prompt:
    return Prompt(f"What is {a} {operator} {b}?", answer=_OPERATORS[operator](a, b))


class GradedArithmetic(Generated):
    """Problems such as "What is 12 + 7 * 35?", generated from `seed`. The answer is an integer.

    `size` problems are for training, and `held_out_size` further problems are held out. `digits` (1 to 9) is the number
    of digits of each number, and `terms` (2 to 9) is the count of numbers; "1,2" mixes both values. `operators` is one
    or more of +-*, with the usual precedence. Columns for rewards: `digits`, `terms`, and `level` (1 for two numbers of
    one digit, plus 1 for each further digit and number).
    """

    def __init__(
        self,
        digits: int | str | Sequence[int] = "1,2,3",
        terms: int | str | Sequence[int] = "2,3",
        operators: str = "+-*",
        size: int = 2000,
        held_out_size: int = 200,
        seed: int = 0,
    ) -> None:
        self._digits, self._terms = counts("digits", digits, 1, 9), counts("terms", terms, 2, 9)
        if not operators or not set(operators) <= set(_OPERATORS):
            raise RloraError(
                f"env_args.operators = {operators!r}: use one or more of {' '.join(_OPERATORS)}, without spaces"
            )
        self._operators, self._seed = operators, seed
        self._size, self._held_out_size = size, held_out_size

    def _problems(self) -> Iterator[Prompt]:
        rng = random.Random(self._seed)
        while True:
            digits, terms = rng.choice(self._digits), rng.choice(self._terms)
            text, value = expression(rng, digits, terms, self._operators)
            columns = {"digits": digits, "terms": terms, "level": digits + terms - 2}
            yield Prompt(f"What is {text}?", answer=value, columns=columns)


def expression(rng: random.Random, digits: int, terms: int, operators: str) -> tuple[str, int]:
    """Generate an expression of `terms` numbers with `digits` digits each. Returns its text and its value."""
    first, *rest = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(terms))
    text, total, product = str(first), 0, first  # total: the sum of all terms before the last product
    for number in rest:
        sign = rng.choice(operators)
        text = f"{text} {sign} {number}"
        if sign == "*":
            product *= number
        else:
            total, product = total + product, number if sign == "+" else -number
    return text, total + product
