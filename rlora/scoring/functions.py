"""A user's function as Python sees it: its parameters, its code, and where it is defined."""

import dis
import functools
import inspect
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType
from typing import Any

NO_DEFAULT = inspect.Parameter.empty
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
BY_PLACE = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """None where it has no signature, as some functions written in C."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def call_of(function: Any) -> Any:
    """What runs when it is called: of an object its class's method."""
    return function if hasattr(function, "__code__") else getattr(type(function), "__call__", None)  # noqa: B004


def bare(function: Any) -> Any:
    """The user's own function, out of its partials and decorators."""
    while isinstance(function, functools.partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    return call_of(function)


def code_of(function: Any) -> CodeType | None:
    code = getattr(bare(function), "__code__", None)
    return code if isinstance(code, CodeType) else None


def defined(function: Any) -> tuple[str, int]:
    """File and line; none of what is written in C."""
    code = code_of(function)
    return (code.co_filename, code.co_firstlineno) if code else ("", 0)


def codes_of(code: CodeType, names: Mapping[str, Any]) -> set[CodeType]:
    """The code, what is defined in it, and that of functions of its file that it calls."""
    found, left = set[CodeType](), [code]
    while left:
        found.add(one := left.pop())
        called = [each for name in one.co_names if isinstance(each := names.get(name), FunctionType)]
        inner = [each for each in one.co_consts if isinstance(each, CodeType)]
        inner += [each.__code__ for each in called if each.__code__.co_filename == code.co_filename]
        left += [each for each in inner if each not in found]
    return found


def used(code: CodeType) -> set[str]:
    """The variables that a function's code reads."""
    loads = [each.argval for each in dis.get_instructions(code) if each.opname.startswith("LOAD")]
    return {name for each in loads for name in (each if isinstance(each, tuple) else (each,)) if isinstance(name, str)}
