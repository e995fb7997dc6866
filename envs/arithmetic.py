"""Sums, differences or products of two integers, made from a seed."""

import itertools
import random
from collections.abc import Sequence

from rlora.records import Prompt, RloraError

_OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


class Arithmetic:
    """ "What is a + b?" for all a, b in low..high, a quarter of them held out.

    A pair of operands is held out in both orders: 3 + 4 is not learned from 4 + 3.
    """

    def __init__(
        self, low: int = 1, high: int = 20, operator: str = "+", held_out_share: float = 0.25, seed: int = 0
    ) -> None:
        if operator not in _OPERATORS:
            raise RloraError(f"env_args.operator = {operator!r}: use one of {' '.join(_OPERATORS)}")
        if low > high:
            raise RloraError(f"env_args.low = {low}: it is above env_args.high = {high}; lower it")
        if not 0 <= held_out_share < 1:
            raise RloraError(f"env_args.held_out_share = {held_out_share}: use a share from 0 to below 1")
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
