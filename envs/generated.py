"""What envs share that take several values in one argument, or make their problems up."""

import itertools
from collections.abc import Iterator, Sequence

from rlora.records import Prompt, RloraError


def listed(value: object) -> list[str]:
    """Of "a, b", as a config gives several, or of a sequence of them: each as text."""
    each = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    return [str(part).strip() for part in each if str(part).strip()]


def counts(name: str, given: int | str | Sequence[int], low: int, high: int) -> list[int]:
    """The integers of "2,3", 2 or [2, 3]. Raises RloraError for others than `low` to `high`."""
    parts = listed(given)
    if not parts or not all(part.isdecimal() and low <= int(part) <= high for part in parts):
        raise RloraError(f'env_args.{name} = {given!r}: use {low} to {high}, or several of them, as "{low},{low + 1}"')
    return [int(part) for part in parts]


def distinct(problems: Iterator[Prompt], size: int, held_out_size: int) -> list[Prompt]:
    """The first so many that differ in their texts. Raises RloraError where there are not so many."""
    if size < 1 or held_out_size < 0:
        raise RloraError(f"env_args.size = {size}, held_out_size = {held_out_size}: use 1 or more, and 0 or more")
    wanted = size + held_out_size
    found: dict[str, Prompt] = {}
    for prompt in itertools.islice(problems, 100 * wanted):
        found.setdefault(str(prompt.text), prompt)
        if len(found) == wanted:
            return list(found.values())
    raise RloraError(
        f"env_args.size = {size}, held_out_size = {held_out_size}: only {len(found)} different problems were found; "
        "lower one of them, or allow harder problems"
    )


class Generated:
    """An env whose prompts are made: the first of them are held out."""

    _size: int
    _held_out_size: int

    def train(self) -> Sequence[Prompt]:
        return self._prompts()[self._held_out_size :]

    def held_out(self) -> Sequence[Prompt]:
        return self._prompts()[: self._held_out_size]

    def _prompts(self) -> list[Prompt]:
        return distinct(self._problems(), self._size, self._held_out_size)

    def _problems(self) -> Iterator[Prompt]:
        """Problems without end, the same each time."""
        raise NotImplementedError
