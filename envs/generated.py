"""Helpers of envs: arguments with several values, and generated problems."""

import itertools
from collections.abc import Iterator, Sequence

from rlora.records import Prompt, RloraError


def listed(value: object) -> list[str]:
    """Return the values of "a, b" (the form in a config), of a sequence, or of a single value, as a list of strings."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    return [str(part).strip() for part in parts if str(part).strip()]


def counts(name: str, value: int | str | Sequence[int], low: int, high: int) -> list[int]:
    """Return the integers of "2,3", 2 or [2, 3] as a list.

    Raises RloraError, which names the argument `name`, if a value is not an integer from `low` to `high`.
    """
    parts = listed(value)
    if not parts or not all(part.isdecimal() and low <= int(part) <= high for part in parts):
        raise RloraError(
            f'env_args.{name} = {value!r}: use {low} to {high}, or several values such as "{low},{low + 1}"'
        )
    return [int(part) for part in parts]


def distinct(problems: Iterator[Prompt], size: int, held_out_size: int) -> list[Prompt]:
    """Return the first `size` + `held_out_size` problems with distinct texts.

    Raises RloraError if `problems` has too few, or if the first 100 times as many problems have too few distinct texts.
    """
    if size < 1 or held_out_size < 0:
        raise RloraError(
            f"env_args.size = {size}, env_args.held_out_size = {held_out_size}: use 1 or more for env_args.size, and 0 "
            "or more for env_args.held_out_size"
        )
    count = size + held_out_size
    problems_by_text: dict[str, Prompt] = {}
    for prompt in itertools.islice(problems, 100 * count):
        problems_by_text.setdefault(str(prompt.text), prompt)
        if len(problems_by_text) == count:
            return list(problems_by_text.values())
    raise RloraError(
        f"env_args.size = {size}, env_args.held_out_size = {held_out_size}: only {len(problems_by_text)} distinct "
        "problems were found; lower env_args.size or env_args.held_out_size, or allow more kinds of problems by the "
        "other env_args"
    )


class Generated:
    """Base class of envs with generated prompts. The first `_held_out_size` prompts are held out.

    A subclass sets `_size` and `_held_out_size`, and defines `_problems`.
    """

    _size: int
    _held_out_size: int

    def train(self) -> Sequence[Prompt]:
        return self._prompts()[self._held_out_size :]

    def held_out(self) -> Sequence[Prompt]:
        return self._prompts()[: self._held_out_size]

    def _prompts(self) -> list[Prompt]:
        return distinct(self._problems(), self._size, self._held_out_size)

    def _problems(self) -> Iterator[Prompt]:
        """Yield problems, without an end if possible. A seed determines them."""
        raise NotImplementedError
