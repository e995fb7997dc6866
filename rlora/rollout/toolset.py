"""The tools that an env gives to the policy: their schemas, and the calls in a message."""

import functools
import inspect
import logging
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from rlora.model.chat import Chat
from rlora.model.tool_calls import FORMS, Parser, ToolCall, calling, typed, without_thoughts
from rlora.plugin import load
from rlora.records import Episode, Prompt, RloraError, without_surrogates
from rlora.scoring.scoring import Scoring
from rlora.scoring.tools import HIDDEN, functions_of
from rlora.scoring.worker import EnvReply, EnvTurn

_SCHEMA = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {"type": "object", ...}}}'

_OF_OBJECTS = {"type", "properties", "anyOf", "oneOf", "allOf", "$ref", "$defs", "additionalProperties"}
_JSON_TYPES = (str, int, float, bool, list, dict, tuple, type(None), Any)
_CONTAINERS = (list, dict, tuple, typing.Union, types.UnionType, Sequence, Mapping)

_log = logging.getLogger(__name__)
_warn = functools.cache(_log.warning)  # once for each text


@dataclass(frozen=True)
class Toolset:
    """The tools of an env, as the policy sees them, and the form in which it calls them."""

    schemas: Mapping[str, Mapping[str, Any]]  # by name, for the chat template
    parser: Parser = field(compare=False)  # a file's parser is another object each time that it is loaded
    max_calls: int | None  # per episode; None: no limit

    def calls(self, message: str) -> list[ToolCall]:
        """Return the calls in a message of the policy, except in its thinking. A parser that raises an exception makes
        the call malformed."""
        try:
            return [self._typed(call) for call in self.parser(without_thoughts(message))]
        except Exception as error:  # a parser of the user, on a model's text
            _warn(f"chat.tool_calls: the parser raised {type(error).__name__}: {error}; return [] for an answer")
            return [ToolCall(fault=f"{type(error).__name__}: {error}")]

    def _typed(self, call: ToolCall) -> ToolCall:
        schema = self.schemas.get(call.name)
        return typed(call, schema) if schema else call

    def message(self, text: str) -> dict[str, Any]:
        """Return the policy's message as a chat message, with its well-formed calls as `tool_calls`."""
        calls = [call for call in self.calls(text) if not call.fault]
        return calling(*calls, content=text) if calls else {"role": "assistant", "content": text}

    async def answer(self, calls: Sequence[ToolCall], turn: EnvTurn, scoring: Scoring) -> EnvReply:
        """Make the calls of a message one after the other. Returns their results as messages, and the episode's state.

        A result has a `status`: "ok", "malformed", "unknown" (no tool has the name), "invalid" (the arguments do not
        fit the tool), "timeout" or "error". The policy reads the reason for each status except "ok".
        """
        results, state = [], turn.state
        for call in calls:
            if call.fault:
                status, content = "malformed", f"error: the call is malformed: {call.fault}"
            elif call.name not in self.schemas:
                status, content = "unknown", f"error: there is no tool {call.name!r}; use {', '.join(self.schemas)}"
            else:
                reply = await scoring.answer(replace(turn, state=state, tool=call.name, arguments=call.arguments))
                status, content, state = reply.status or "ok", str(reply.content), reply.state
            name = without_surrogates(call.name)
            results.append({"role": "tool", "name": name, "content": without_surrogates(content), "status": status})
        return EnvReply(results, state)


def tool_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return the calls of tools per episode, the share of calls whose status is not "ok", and the share of episodes
    whose last message calls a tool beyond `max_calls`."""
    messages = [message for episode in episodes for message in episode.messages]
    statuses = [message["status"] for message in messages if message["role"] == "tool" and "status" in message]
    failed = len(statuses) - statuses.count("ok")
    over_limit = sum(
        episode.finish_reason == "stop" and "tool_calls" in episode.messages[-1]
        for episode in episodes
        if episode.messages
    )
    return {
        "tools/calls": len(statuses) / len(episodes),
        "tools/failed": failed / max(1, len(statuses)),
        "tools/over_limit": over_limit / len(episodes),
    }


def is_agent(env: Any) -> bool:
    """Return whether an env replies to the policy, or has tools."""
    return hasattr(env, "reply") or bool(getattr(env, "tools", ()))


def toolset_of(env: Any, chat: Chat) -> Toolset | None:
    """Return the tools of an env; None if it has none.

    `env.tools` are functions, whose type hints and docstrings make the schemas, and JSON schemas, whose functions are
    the methods of the env with the tools' names. Raises RloraError if a schema is invalid, if two tools have one name,
    or if the chat template does not render tools.
    """
    functions = functions_of(env)
    if not functions:
        return None
    for name, function in functions.items():
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise RloraError(f"env: its tool {name!r} is a generator, and a call has one result; return a value")
    schemas = {
        name: checked_schema(tool, "env") if isinstance(tool, Mapping) else _schema_of(tool)
        for (name, _), tool in zip(functions.items(), env.tools, strict=True)
    }
    for name, function in functions.items():
        _check_callable(name, function, schemas[name])
    max_calls = getattr(env, "max_calls", None)
    if max_calls is not None and (not isinstance(max_calls, int) or max_calls < 1):
        raise RloraError(f"env: its max_calls is {max_calls!r}; use an integer of 1 or more, or None for no limit")
    return Toolset(schemas, _parser(chat, list(schemas.values())), max_calls)


def _check_callable(name: str, function: Any, schema: Mapping[str, Any]) -> None:
    """Raise RloraError if a function can't be called with the arguments that its schema shows."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:  # of some built-in functions
        raise RloraError(f"env: its tool {name!r} can't be called: {error}; wrap it in a function") from None
    shown = schema["function"]["parameters"].get("properties", {})
    if reserved := sorted(shown.keys() & set(HIDDEN)):
        raise RloraError(
            f"env: its tool {name!r} shows the parameter {reserved[0]!r}, a name that rlora sets; rename it"
        )
    for parameter in parameters.values():
        wanted = {"state": (dict, dict[str, Any], Mapping), "prompt": (Prompt,)}.get(parameter.name, ())
        accepted = (*wanted, parameter.empty, Any)
        hint = _hints(name, function).get(parameter.name, parameter.empty) if wanted else parameter.empty
        if (typing.get_origin(hint) or hint) not in accepted:
            raise RloraError(
                f"env: its tool {name!r} has a parameter {parameter.name!r}, which rlora sets to the episode's "
                f"{parameter.name}; rename it, or annotate it as {'dict' if parameter.name == 'state' else 'Prompt'}"
            )
        if parameter.name == "self" or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise RloraError(
                f"env: its tool {name!r} has the parameter {parameter}, which a call can't set; set tools in __init__ "
                "to bound methods (self.tools = [self.name]), and use named parameters only"
            )
    try:
        inspect.signature(function).bind(**dict.fromkeys([*shown, *(set(HIDDEN) & parameters.keys())]))
    except TypeError as error:
        raise RloraError(f"env: its tool {name!r} does not fit its schema: {error}; fix one of them") from None


def _hints(name: str, function: Any) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception as error:  # evaluates annotations
        raise RloraError(f"env: the annotations of its tool {name!r} can't be read ({error}); fix them") from error


def checked_schema(schema: Any, source: str) -> Mapping[str, Any]:
    """Return the schema of a tool. Raises RloraError, which begins with `source`, if it is not one."""
    function = schema.get("function", schema) if isinstance(schema, Mapping) else None
    parameters: Any = function.get("parameters", {"type": "object"}) if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RloraError(f"{source}: {schema!r:.200} is not the schema of a tool; use {_SCHEMA}")
    if foreign := [key for key in ("input_schema", "inputSchema") if key in function]:
        raise RloraError(
            f"{source}: tool {function['name']!r} has {foreign[0]!r}, which chat templates do not read; rename it to "
            f"parameters: {_SCHEMA}"
        )
    if not _is_object_schema(parameters):
        raise RloraError(
            f"{source}: tool {function['name']!r}: its parameters {parameters!r:.200} are not a JSON schema of an "
            'object; use {"type": "object", "properties": {NAME: {"type": ...}}}'
        )
    return {"type": "function", "function": {"description": "", **function, "parameters": dict(parameters)}}


def _is_object_schema(parameters: Any) -> bool:
    """Return whether the parameters of a tool are a JSON schema of an object, not its properties alone."""
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        return False
    properties = parameters.get("properties", {})
    is_bare = bool(parameters) and _OF_OBJECTS.isdisjoint(parameters)
    return not is_bare and isinstance(properties, Mapping) and all(map(_is_schema, properties.values()))


def _is_schema(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    kinds, choices = value.get("type") or (), value.get("anyOf") or ()
    named = isinstance(kinds, str) or (_is_list(kinds) and all(isinstance(kind, str) for kind in kinds))
    return named and _is_list(choices) and all(map(_is_schema, choices))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _schema_of(tool: Any) -> Mapping[str, Any]:
    """Return the schema that a function's type hints and docstring make, as transformers does."""
    name = tool.__name__

    def visible() -> None:
        pass

    try:
        hints = typing.get_type_hints(tool)
        parameters = [item for item in inspect.signature(tool).parameters.values() if item.name not in HIDDEN]
        visible.__name__, visible.__doc__ = name, inspect.getdoc(tool)
        visible.__annotations__ = {key: hint for key, hint in hints.items() if key not in HIDDEN}
        visible.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        schema: Mapping[str, Any] = get_json_schema(visible)
    except Exception as error:  # reads a user's annotations and docstring
        raise RloraError(
            f"env: its tool {name!r} has no schema: {error}; give each parameter a type hint and a line `name: text` "
            "under Args: in the docstring, or give the schema instead of the function"
        ) from error
    for parameter, hint in visible.__annotations__.items():
        if parameter != "return" and not _is_json(hint):
            raise RloraError(
                f"env: its tool {name!r} has a parameter {parameter!r} of the type {hint}, but a call has values "
                "of JSON only; use str, int, float, bool, list, dict or Literal[...], or give the schema instead of "
                "the function"
            )
    return schema


def _is_json(hint: Any) -> bool:
    """Return whether a type hint has only types whose values a call, which is JSON, can have."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return True
    if arguments:
        return origin in _CONTAINERS and all(map(_is_json, arguments))
    return hint in _JSON_TYPES


def _parser(chat: Chat, schemas: Sequence[Mapping[str, Any]]) -> Parser:
    """Return the parser that `chat.tool_calls` names; for `auto` the one that reads the template's own call.

    Raises RloraError if the template does not render tools, or calls in no known form.
    """
    setting = chat.settings.tool_calls
    probe = ToolCall(schemas[0]["function"]["name"], {"first": "one", "second": 'two "three"'})
    text = chat.call_text(probe, schemas)
    if setting in FORMS:
        return FORMS[setting]
    if setting != "auto" and ":" not in setting:
        raise RloraError(f"chat.tool_calls = {setting!r}: use auto, {', '.join(FORMS)}, or a parser, mine.py:parse")
    if setting != "auto":
        return typing.cast(Parser, load("chat.tool_calls", setting))
    for parser in FORMS.values():
        if [*parser(without_thoughts(text))] == [probe]:
            return parser
    raise RloraError(
        f"chat.tool_calls = 'auto': the chat template writes a call as {text!r:.300}, which is in none of the forms "
        f"{', '.join(FORMS)}; set chat.tool_calls to a parser of your own, mine.py:parse"
    )
