"""Conversion of the return values and exceptions of reward functions: to numbers, and to text for errors."""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any


class FaultError(Exception):
    """A reward function can't be called, or returned an invalid value.

    The message states the fault and the fix. It starts with a verb, to which the function's name is prepended.
    """


def as_list(result: Any, count: int) -> list[Any]:
    """Convert a returned list, array or tensor to a list of `count` values. Raises FaultError for any other value."""
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, Sequence) or isinstance(result, str):
        raise FaultError(f"returned {show(result)}; return a list with one reward per completion")
    if len(result) != count:
        raise FaultError(
            f"returned {len(result)} rewards for {count} completions; return one reward per completion, in order"
        )
    return list(result)


def value_at(value: Any, index: int) -> Any:
    """Return the logged value of the episode at `index`: an item of a list or tensor, or a number for all episodes."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value[index] if index < len(value) else None
    return value


def as_number(value: Any) -> float | None:
    """Convert a finite Python, NumPy or torch number to a float. Returns None for any other value."""
    try:
        value = value.item() if hasattr(value, "item") else value
        number = float(value) if isinstance(value, (numbers.Real, Decimal)) else math.nan
    except Exception:  # an array of several numbers, or an integer too large for a float
        return None
    return number if math.isfinite(number) else None


def is_nan(value: Any) -> bool:
    """Return whether a Python, NumPy or torch number is NaN."""
    value = value.item() if hasattr(value, "item") else value
    return isinstance(value, numbers.Real | Decimal) and math.isnan(value)


def not_none(values: Iterable[float | None]) -> list[float]:
    """Return the values that are not None."""
    return [value for value in values if value is not None]


def as_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers among the values as floats, by name."""
    return {name: number for name, value in values.items() if (number := as_number(value)) is not None}


def show(value: Any) -> str:
    """Return the text of a value for an error message: its repr, or only its type if the value can be large."""
    if isinstance(value, str):
        return repr(value)  # not shortened: the worker does that, after it has masked secrets
    return (
        repr(value)
        if value is None or isinstance(value, (bool, float))
        else f"an object of type {type(value).__name__}"
    )


def error_text(error: BaseException) -> str:
    """Return an exception's type and message. The worker shortens the text, after it has masked secrets."""
    try:
        message = str(error)
    except Exception:  # raised by the exception's own __str__
        message = ""
    return f"{type(error).__name__}: {message}".encode("utf-8", "backslashreplace").decode().strip()
