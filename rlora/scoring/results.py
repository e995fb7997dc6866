"""What a reward function returned or raised: numbers, and their text in an error."""

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any


class FaultError(Exception):
    """A function can't be called, or has returned what it may not. Its text says what, and what to do."""


def listed(result: Any, count: int) -> list[Any]:
    """A returned list, array or tensor of `count` values."""
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, Sequence) or isinstance(result, str):
        raise FaultError(f"returned {show(result)}; let it return a list, one reward for each completion")
    if len(result) != count:
        raise FaultError(
            f"returned {len(result)} rewards for {count} completions; let it return one for each, in order"
        )
    return list(result)


def at_place(value: Any, place: int) -> Any:
    """What is logged of one episode: a number that holds for all, or its own in a list or tensor."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value[place] if place < len(value) else None
    return value


def as_number(value: Any) -> float | None:
    """A finite number, of Python, numpy or torch, as a float; None of anything else."""
    try:
        value = value.item() if hasattr(value, "item") else value
        number = float(value) if isinstance(value, (numbers.Real, Decimal)) else math.nan
    except Exception:  # of several numbers, or one beyond floats
        return None
    return number if math.isfinite(number) else None


def is_nan(value: Any) -> bool:
    value = value.item() if hasattr(value, "item") else value
    return isinstance(value, numbers.Real | Decimal) and math.isnan(value)


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def as_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: number for name, value in values.items() if (number := as_number(value)) is not None}


def show(value: Any) -> str:
    """A value in an error's text; of what may be large or strange only its type."""
    if isinstance(value, str):
        return repr(value)  # whole: the worker cuts it, after it has veiled secrets
    return (
        repr(value)
        if value is None or isinstance(value, (bool, float))
        else f"an object of type {type(value).__name__}"
    )


def said(error: BaseException) -> str:
    """An exception's type and message, whole: the worker cuts it, after it has veiled secrets."""
    try:
        message = str(error)
    except Exception:  # of its own __str__
        message = ""
    return f"{type(error).__name__}: {message}".encode("utf-8", "backslashreplace").decode().strip()
