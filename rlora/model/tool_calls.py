"""Tool calls in a model's text: the forms in which models write them, and values of the types in a tool's schema."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_BLOCK = re.compile(rf"{_OPEN}(.*?)(?:{_CLOSE}|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^<>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_KEYS = {"name", "arguments", "parameters", "id", "type"}
_ARGUMENTS = {"arguments", "parameters", "args", "params", "input"}  # keys that tell a call from other JSON
_BEFORE_JSON = re.compile(r"""\s*+(?:<\|python_tag\|>|```(?:json)?|[;,])?[\s\[]*+(?=\{\s*+["'])""")
_NAME_KEY, _ARGUMENTS_KEY = (
    re.compile(rf"""["'](?:{"|".join(keys)})["']\s*+:""") for keys in (("name", "function"), sorted(_ARGUMENTS))
)
_DEEPEST = 50  # levels of arguments; pickling fails at some 500


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("an object has a key twice")
    return made


_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_object)  # models write line breaks into strings


@dataclass(frozen=True)
class ToolCall:
    """A call in a message of the policy. `fault` describes why the call is malformed; "" for a well-formed call."""

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""
    has_types: bool = field(default=False, compare=False)  # of its arguments, as in JSON; else all are text


def calling(*calls: ToolCall, content: str = "") -> dict[str, Any]:
    """Return a message of the policy with tool calls, in the form of the OpenAI API."""
    functions = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    tool_calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": content, "tool_calls": tool_calls}


Parser: TypeAlias = Callable[[str], Sequence[ToolCall]]  # of a message; no calls: the message is the policy's answer


def hermes(text: str) -> list[ToolCall]:
    """Parse `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, the form of Hermes, Qwen 2.5 and Qwen 3."""
    return [_from_json(block) for block in _BLOCK.findall(text)]


def xml(text: str) -> list[ToolCall]:
    """Parse `<tool_call><function=NAME><parameter=NAME>VALUE</parameter></function></tool_call>`, the form of Qwen
    3 Coder, Qwen 3.5 and Nemotron 3. The values are text, which `typed` reads by the tool's schema."""
    return [call for block in _BLOCK.findall(text) for call in _from_xml(block)]


def json_calls(text: str) -> list[ToolCall]:
    """Parse a message that consists only of calls as JSON, possibly in a fence: `{"name": ..., "parameters": {...}}`,
    one or several with semicolons (Llama 3), or a list of `{"name": ..., "arguments": {...}}` (Mistral up to v3)."""
    text = text.strip().removeprefix("<|python_tag|>")
    fenced = text.startswith("```") and text.endswith("```") and len(text) > 6
    return _objects(text[3:-3].removeprefix("json") if fenced else text)


FORMS: Mapping[str, Parser] = {"hermes": hermes, "xml": xml, "json": json_calls}


def without_thoughts(text: str) -> str:
    """Return a message without its thoughts, <think> to </think>, or to the end. A tag inside a call stays."""
    kept, position = [], 0
    while (start := text.find("<think>", position)) >= 0:
        if end := _call_end(text, position, start):
            kept.append(text[position:end])
        else:
            end = text.find("</think>", start)
            end = len(text) if end < 0 else end + len("</think>")
            kept.append(text[position:start])
        position = end
    return "".join([*kept, text[position:]])


def _call_end(text: str, position: int, tag: int) -> int:
    """Return the end of a call that begins between `position` and the tag; 0 if there is none."""
    if opening := _BEFORE_JSON.match(text, position, tag):
        try:
            return _DECODER.raw_decode(text, opening.end())[1]
        except (ValueError, RecursionError):
            return len(text)
    if (start := text.find(_OPEN, position, tag)) < 0:
        return 0
    end = text.find(_CLOSE, start)
    return len(text) if end < 0 else end + len(_CLOSE)


def typed(call: ToolCall, schema: Mapping[str, Any]) -> ToolCall:
    """Return the call with values that are text parsed, where the tool's schema has another type than string."""
    properties = schema["function"]["parameters"].get("properties", {})
    arguments = {
        name: _read(value, properties.get(name, {}), call.has_types) if isinstance(value, str) else value
        for name, value in call.arguments.items()
    }
    return replace(call, arguments=arguments, fault=call.fault or _depth_fault(arguments))


def _types(schema: Mapping[str, Any]) -> Iterator[str]:
    kind = schema.get("type") or []
    yield from [kind] if isinstance(kind, str) else kind
    yield from ["null"] if schema.get("nullable") else []
    for choice in schema.get("anyOf") or []:
        yield from _types(choice)


def _read(text: str, schema: Mapping[str, Any], has_types: bool) -> Any:
    """Return text as a value of one of the schema's types; unchanged if it is none, or can be a string. In a form
    without types, null or none is the null of a parameter that can be null."""
    types, word = set(_types(schema)), text.strip().lower()
    if text in (schema.get("enum") or ()) or (has_types and "string" in types):
        return text
    if "null" in types and word in ("null", "none"):
        return None
    if not types - {"null"} or "string" in types:
        return text
    if "boolean" in types and word in ("true", "false"):
        return word == "true"
    return _value(text)


def _value(text: str) -> Any:
    try:
        return _DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return text


def _objects(text: str) -> list[ToolCall]:
    """Return the calls of a text that consists only of them. Any other text or JSON has none."""
    text = text.strip()
    if not text.startswith(("{", "[")):
        return []
    message, calls = text, list[ToolCall]()
    while text:
        try:
            value, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError) as error:
            return [*calls, ToolCall(fault=f"not valid JSON: {error}")] if _means_call(message) else calls
        items = value if isinstance(value, list) else [value]
        if not any(map(_is_call, items)):
            return calls
        calls += [_from_object(item) for item in items]
        text = text[end:].lstrip("; \n\t")
    return calls


def _means_call(text: str) -> bool:
    """Return whether a text that is not valid JSON was to be a call."""
    opening = re.match(r'[\[\s]{0,20}\{(\s{0,20}"(name|type|function)")?', text)
    if not opening:
        return False
    return bool(opening[1] or (_NAME_KEY.search(text) and _ARGUMENTS_KEY.search(text)))


def _is_call(value: Any) -> bool:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        return _is_call(value["function"])
    named = isinstance(value, dict) and ("name" in value or isinstance(value.get("function"), str))
    return named and (value.keys() <= _KEYS or not _ARGUMENTS.isdisjoint(value))


def _from_json(text: str) -> ToolCall:
    try:
        return _from_object(_DECODER.decode(text.strip()))
    except (ValueError, RecursionError) as error:
        return ToolCall(fault=f"not valid JSON: {error}")


def _from_object(value: Any) -> ToolCall:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if isinstance(value, dict) and isinstance(value.get("function"), str):  # a form that Llama 3.1 writes
        value = {"name": value["function"], **{key: item for key, item in value.items() if key != "function"}}
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        return ToolCall(fault='it must be {"name": ..., "arguments": {...}}')
    if foreign := [key for key in value if key not in _KEYS]:
        return ToolCall(name, fault=f'{foreign[0]!r} is no key of a call; put arguments under "arguments"')
    arguments = value.get("arguments", value.get("parameters"))
    arguments = _value(arguments) if isinstance(arguments, str) and arguments else arguments
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(arguments, dict):
        return ToolCall(name, fault="its arguments must be an object")
    return ToolCall(name, {} if (fault := _depth_fault(arguments)) else arguments, fault, has_types=True)


def _depth_fault(value: Any, depth: int = 0) -> str:
    """Return the fault of arguments that are nested too deeply; "" if they are not."""
    if depth > _DEEPEST:
        return f"its arguments are nested more than {_DEEPEST} levels deep"
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, (_depth_fault(item, depth + 1) for item in items)), "")


def _from_xml(block: str) -> list[ToolCall]:
    functions, remaining = _elements(_FUNCTION, "</function>", block)
    if not functions or remaining.strip():
        return [ToolCall(fault="it must be <function=NAME> ... </function>")]
    calls = []
    for name, body in functions:
        elements, remaining = _elements(_PARAMETER, "</parameter>", body)
        parameters = [(key.strip(), value) for key, value in elements]
        is_whole = not remaining.strip() and len(dict(parameters)) == len(parameters)
        fault = "" if is_whole else "each parameter must be <parameter=NAME>VALUE</parameter>, once"
        calls.append(ToolCall(name.strip(), dict(parameters) if is_whole else {}, fault))
    return calls


def _elements(pattern: re.Pattern[str], end: str, text: str) -> tuple[list[tuple[str, str]], str]:
    """Return the names and texts of the elements, and the text without them. The time is linear in the length: an
    element is looked for up to the last end tag only."""
    head, last, tail = text.rpartition(end)
    return pattern.findall(head + last), pattern.sub("", head + last) + tail
