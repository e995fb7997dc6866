"""Introspection of a user's function: its parameters, code and location."""

import dis
import functools
import inspect
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from typing import Any

NO_DEFAULT = inspect.Parameter.empty
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
BY_POSITION = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Return a function's parameters by name, or None if it has no signature, like some functions written in C."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def callee(function: Any) -> Any:
    """Return the function that a call runs: for a callable object, the `__call__` of its class."""
    return function if hasattr(function, "__code__") else getattr(type(function), "__call__", None)  # noqa: B004


def unwrap(function: Any) -> Any:
    """Return the user's function without partials and decorators."""
    while isinstance(function, functools.partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    return callee(function)


def code_of(function: Any) -> CodeType | None:
    """Return the code of the user's function, or None for a function written in C."""
    code = getattr(unwrap(function), "__code__", None)
    return code if isinstance(code, CodeType) else None


def location_of(function: Any) -> tuple[str, int]:
    """Return the file and the first line of a function; ("", 0) for a function written in C."""
    code = code_of(function)
    return (code.co_filename, code.co_firstlineno) if code else ("", 0)


def reachable_codes(code: CodeType, names: Mapping[str, Any]) -> set[CodeType]:
    """Return the code, and the code of all functions that are defined in it or that it calls in the same file.

    `names` are the global variables of `code`. Functions that are reached in this way are searched in turn.
    """
    reached, pending = set[CodeType](), [code]
    while pending:
        reached.add(current := pending.pop())
        called = [value for name in current.co_names if isinstance(value := names.get(name), FunctionType)]
        inner = [constant for constant in current.co_consts if isinstance(constant, CodeType)]
        inner += [function.__code__ for function in called if function.__code__.co_filename == code.co_filename]
        pending += [candidate for candidate in inner if candidate not in reached]
    return reached


def loaded_names(code: CodeType) -> set[str]:
    """Return the names and the string constants that the code loads."""
    loads = [step.argval for step in dis.get_instructions(code) if step.opname.startswith("LOAD")]
    return {name for load in loads for name in (load if isinstance(load, tuple) else (load,)) if isinstance(name, str)}
