"""The functions of an env's tools, and how one is called with the arguments that the policy wrote."""

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from rlora.records import Prompt, RloraError, without_surrogates

HIDDEN = ("prompt", "state")  # parameters that rlora sets, and that the policy does not see
_LONGEST = 1_000_000  # characters of a result


class ArgumentError(Exception):
    """The arguments of a call do not fit the tool's parameters."""


def functions_of(env: Any) -> dict[str, Callable[..., Any]]:
    """Return the functions of `env.tools` by name, in order: the tool itself, or for a JSON schema the env's method of
    the same name. Raises RloraError if the env has no such method, or if two tools have the same name."""
    functions: dict[str, Callable[..., Any]] = {}
    tools = getattr(env, "tools", ())
    if not isinstance(tools, list | tuple):
        raise RloraError(f"env: its tools are {tools!r:.200}; use a list of functions and JSON schemas")
    for tool in tools:
        if isinstance(tool, Mapping):
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str):
                raise RloraError(f"env: {tool!r:.200} is not the schema of a tool, because it has no name; add a name")
            called = getattr(env, name, None)
            fault = f"is a schema, but the env has no method {name}; add this method"
        else:
            name, called = getattr(tool, "__name__", None), tool
            fault = "has no name or can't be called; use a function, or the schema of a method of the env"
        if not name or not callable(called):
            raise RloraError(f"env: its tool {tool!r:.200} {fault}")
        if name in functions:
            raise RloraError(f"env: two of its tools have the name {name!r}; rename one of them")
        functions[name] = called
    return functions


def call_tool(function: Callable[..., Any], arguments: Mapping[str, Any], prompt: Prompt, state: dict[str, Any]) -> Any:
    """Call a tool. Returns its result, which is a coroutine if the tool is one.

    A parameter `prompt` gets the prompt, and a parameter `state` the state of the episode. Raises ArgumentError if the
    arguments do not fit, and whatever the tool raises.
    """
    signature = inspect.signature(function)
    hidden = {name: value for name, value in (("prompt", prompt), ("state", state)) if name in signature.parameters}
    try:
        if overlap := sorted(hidden.keys() & arguments.keys()):
            raise TypeError(f"got an unexpected keyword argument {overlap[0]!r}")
        bound = signature.bind(**arguments, **hidden)
    except TypeError as error:
        visible = [name for name in signature.parameters if name not in hidden]
        raise ArgumentError(f"{error}; its parameters are {', '.join(visible)}") from None
    return function(*bound.args, **bound.kwargs)


def as_text(result: Any) -> str:
    """Return a tool's result as text: strings unchanged, other values as JSON, or by `str` if JSON can't represent
    them. Text that no context could hold is cut, and says so: tokenizing it would delay all other episodes."""
    if isinstance(result, str):
        text = without_surrogates(result)
    else:
        try:
            text = json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError):
            text = without_surrogates(str(result))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [cut: {len(text)} characters]"
