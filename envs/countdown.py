"""Countdown: combine numbers to reach a target. Includes 24: four numbers and the target 24."""

import itertools
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction

from rlora.records import Prompt, RloraError

from .generated import Generated, counts
from .rows import read_rows

TEMPLATE = (
    "Using the numbers {numbers}, make an expression that equals {target}. You may use + - * / and parentheses, "
    "and {rule}. Give the expression in <answer> </answer>, as in <answer> (1 + 2) / 3 </answer>."
)
_ALL = "you must use each number exactly once"
_SOME = "you may use each number at most once"
_SEARCH = 20_000  # steps of the search for a solution
_Term = tuple[Fraction, str]  # a value and its expression


class Countdown(Generated):
    """Solvable Countdown problems, generated from `seed`.

    `size` problems are for training, and `held_out_size` further problems are held out. `count` (2 to 8) is the number
    of numbers; "3,4" mixes both, and more numbers are harder. The numbers are from `low` to `high`, the target is from
    `target_low` to `target_high`. With `use_all`, a solution must use all numbers. For the game 24, set count = 4,
    high = 13, target_low = target_high = 24. `template` is the prompt's text, with the placeholders {numbers}, {target}
    and, if needed, {rule}. Reward: `rlora.rewards.countdown:countdown_answer`. Columns for rewards: `numbers`,
    `use_all` and `level` (the number of numbers).
    """

    def __init__(
        self,
        count: int | str | Sequence[int] = "3,4",
        low: int = 1,
        high: int = 50,
        target_low: int = 10,
        target_high: int = 99,
        use_all: bool = True,
        size: int = 2000,
        held_out_size: int = 200,
        seed: int = 0,
        template: str = TEMPLATE,
    ) -> None:
        if not 1 <= low <= high:
            raise RloraError(f"env_args.low = {low}: use an integer from 1 to env_args.high = {high}")
        if not 1 <= target_low <= target_high:
            raise RloraError(
                f"env_args.target_low = {target_low}: use an integer from 1 to env_args.target_high = {target_high}"
            )
        _check_template(template)
        self._counts, self._range = counts("count", count, 2, 8), (low, high)
        self._targets = range(target_low, target_high + 1)
        self._use_all, self._size, self._held_out_size = use_all, size, held_out_size
        self._seed, self._template = seed, template

    def solution(self, prompt: Prompt) -> str | None:
        """Return a completion that solves the problem, or None if `_SEARCH` steps of a search find none."""
        return _solution(prompt)

    def _problems(self) -> Iterator[Prompt]:
        """Combine random pairs of numbers until one is left, and keep it as the target if it is in range."""
        rng = random.Random(self._seed)
        missed = 0  # consecutive targets out of range
        while missed < 10_000:
            missed += 1
            numbers = sorted(rng.randint(*self._range) for _ in range(rng.choice(self._counts)))
            values = rng.sample(numbers, len(numbers) if self._use_all else rng.randint(2, len(numbers)))
            while len(values) > 1:
                a, b = values.pop(), values.pop()
                values.insert(rng.randrange(len(values) + 1), rng.choice(_results(a, b)))
            if values[0] in self._targets:
                missed = 0
                yield to_prompt(numbers, values[0], self._use_all, self._template)


class Game24:
    """The 1,362 solvable hands of 24, from 24.csv of Tree of Thoughts (Yao et al. 2023, arXiv:2305.10601) at `path`.

    The file's rows have `Puzzles`, such as "1 1 4 6", and `Rank` (1 is the easiest). As in the paper, ranks 901 to 1000
    are held out. `template` is as in `Countdown`. Reward: `rlora.rewards.countdown:countdown_answer`. Columns for
    rewards: `numbers`, `use_all` and `level` (the rank).
    """

    def __init__(self, path: str, template: str = TEMPLATE) -> None:
        _check_template(template)
        self._path, self._template = path, template

    def train(self) -> Sequence[Prompt]:
        return [prompt for prompt in self._prompts() if not 900 < prompt.columns["level"] <= 1000]

    def held_out(self) -> Sequence[Prompt]:
        return [prompt for prompt in self._prompts() if 900 < prompt.columns["level"] <= 1000]

    def solution(self, prompt: Prompt) -> str | None:
        """Return a completion that solves the hand, or None if `_SEARCH` steps of a search find none."""
        return _solution(prompt)

    def _prompts(self) -> Iterator[Prompt]:
        for index, row in enumerate(read_rows("env_args.path", self._path, None, "train")):
            try:
                numbers, rank = [int(number) for number in row["Puzzles"].split()], int(row["Rank"])
            except (KeyError, AttributeError, TypeError, ValueError):
                raise RloraError(
                    f"{self._path}, row {index}: {dict(row)!r}; every row needs Puzzles, such as 1 1 4 6, "
                    "and Rank, an integer: fix or remove this row"
                ) from None
            yield to_prompt(numbers, 24, True, self._template, rank)


def to_prompt(numbers: Sequence[int], target: int, use_all: bool, template: str, level: int | None = None) -> Prompt:
    """Return the prompt of a problem, with the columns that `rewards.countdown.countdown_answer` reads.

    `level` is the number of numbers by default.
    """
    text = template.replace("{numbers}", ", ".join(map(str, numbers))).replace("{target}", str(target))
    columns = {"numbers": list(numbers), "use_all": use_all, "level": level or len(numbers)}
    return Prompt(text.replace("{rule}", _ALL if use_all else _SOME), answer=target, columns=columns)


def _solution(prompt: Prompt) -> str | None:
    terms = [(Fraction(number), str(number)) for number in prompt.columns["numbers"]]
    expression = _solve(terms, Fraction(prompt.answer), prompt.columns["use_all"], itertools.count())
    return expression and f"<answer> {expression} </answer>"


def _solve(terms: Sequence[_Term], target: Fraction, use_all: bool, steps: Iterator[int]) -> str | None:
    """Find an expression of the terms that equals the target, by a depth-first search of at most `_SEARCH` steps."""
    if next(steps) > _SEARCH:
        return None
    if len(terms) == 1 or not use_all:
        expression = next((text for value, text in terms if value == target), None)
        if expression or len(terms) == 1:
            return expression
    for (i, (a, left)), (j, (b, right)) in itertools.permutations(enumerate(terms), 2):
        rest = [term for index, term in enumerate(terms) if index not in (i, j)]
        results = [(a - b, f"({left} - {right})")] + ([(a / b, f"({left} / {right})")] if b else [])
        if i < j:
            results += [(a + b, f"({left} + {right})"), (a * b, f"({left} * {right})")]
        for term in results:
            if expression := _solve([*rest, term], target, use_all, steps):
                return expression
    return None


def _results(a: int, b: int) -> list[int]:
    """Return the positive integers that an operation on two numbers gives."""
    quotients = [max(a, b) // min(a, b)] if max(a, b) % min(a, b) == 0 else []
    return [a + b, a * b, *quotients, *([abs(a - b)] if a != b else [])]


def _check_template(template: str) -> None:
    for placeholder in ("{numbers}", "{target}"):
        if placeholder not in template:
            raise RloraError(f"env_args.template = {template!r}: it needs the placeholder {placeholder}")
