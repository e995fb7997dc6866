"""Tool calls in a model's text: the forms in which models write them, and how to find the form of a chat template."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*\Z", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)
_DECODER = json.JSONDecoder(strict=False)  # models write line breaks into strings


@dataclass(frozen=True)
class ToolCall:
    """A call in a message of the policy. `fault` is what makes the call malformed, "" for a well-formed call."""

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""


Parser: TypeAlias = Callable[[str], Sequence[ToolCall]]  # of a message; no calls: the message is the policy's answer


def hermes(text: str) -> list[ToolCall]:
    """Parse `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, the form of Hermes, Qwen 2.5 and Qwen 3."""
    return [_from_json(block, "arguments") for block in _BLOCK.findall(text)]


def xml(text: str) -> list[ToolCall]:
    """Parse `<tool_call><function=NAME><parameter=NAME>VALUE</parameter></function></tool_call>`, the form of Qwen
    3 Coder and Qwen 3.5. All values are text."""
    return [_from_xml(block) for block in _BLOCK.findall(text)]


def llama3(text: str) -> list[ToolCall]:
    """Parse a message of `{"name": ..., "parameters": {...}}`, one or several with semicolons: the form of Llama 3."""
    return _objects(text.strip().removeprefix("<|python_tag|>"), "parameters")


def plain_json(text: str) -> list[ToolCall]:
    """Parse a message of `{"name": ..., "arguments": {...}}` or of a list of these, possibly in a fence: the form of
    Mistral, without its special token."""
    fence = _FENCE.match(text.strip())
    return _objects(fence[1] if fence else text, "arguments")


FORMS: Mapping[str, Parser] = {"hermes": hermes, "xml": xml, "llama3": llama3, "json": plain_json}


def typed(call: ToolCall, schema: Mapping[str, Any]) -> ToolCall:
    """Return the call with values that are text read as JSON, where the tool's schema asks for another type."""
    types = {name: item.get("type") for name, item in schema["function"]["parameters"].get("properties", {}).items()}
    arguments = {
        name: _value(value) if isinstance(value, str) and types.get(name, "string") not in ("string", None) else value
        for name, value in call.arguments.items()
    }
    return ToolCall(call.name, arguments, call.fault)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _objects(text: str, key: str) -> list[ToolCall]:
    """Parse a message that consists only of calls as JSON objects, whose arguments are under `key`. Returns no calls
    for any other text or JSON."""
    text = text.strip()
    if not text.startswith(("{", "[")):
        return []
    calls: list[ToolCall] = []
    while text:
        try:
            value, end = _DECODER.raw_decode(text)
        except (ValueError, RecursionError) as error:
            return [*calls, ToolCall(fault=f"not valid JSON: {error}")] if '"name"' in text else calls
        values = value if isinstance(value, list) else [value]
        calls += [_from_object(item, key) for item in values if isinstance(item, dict) and "name" in item]
        text = text[end:].lstrip("; \n\t")
    return calls


def _from_json(text: str, key: str) -> ToolCall:
    try:
        value = _DECODER.decode(text.strip())
    except (ValueError, RecursionError) as error:
        return ToolCall(fault=f"not valid JSON: {error}")
    return _from_object(value, key)


def _from_object(value: Any, key: str) -> ToolCall:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        return ToolCall(fault=f'it must be {{"name": ..., "{key}": {{...}}}}')
    arguments = value.get(key, {})
    arguments = _value(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        return ToolCall(name, fault=f'"{key}" must be an object')
    return ToolCall(name, arguments)


def _from_xml(text: str) -> ToolCall:
    function = _FUNCTION.match(text)
    if not function:
        return ToolCall(fault="it must be <function=NAME> ... </function>")
    return ToolCall(function[1].strip(), {name.strip(): value for name, value in _PARAMETER.findall(function[2])})
