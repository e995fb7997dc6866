"""Helpers for futures."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

_Result = TypeVar("_Result")


@contextmanager
def errors_to(future: Future[Any]) -> Iterator[None]:
    """Run a block; if it raises an exception, set the exception on `future`, unless `future` is already done."""
    try:
        yield
    except Exception as error:
        if not future.done():
            future.set_exception(error)


def resolved(value: _Result) -> Future[_Result]:
    """Return a future whose result is already `value`."""
    future: Future[_Result] = Future()
    future.set_result(value)
    return future
