"""Helpers for futures."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

_Result = TypeVar("_Result")


@contextmanager
def errors_to(future: Future[Any]) -> Iterator[None]:
    """Set an error of the block on `future` instead of raising it."""
    try:
        yield
    except Exception as error:
        if not future.done():
            future.set_exception(error)


def resolved(value: _Result) -> Future[_Result]:
    """A future that already has its result."""
    future: Future[_Result] = Future()
    future.set_result(value)
    return future
