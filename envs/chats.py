"""Parses the chat formats of data sets: lists, objects, JSON, Python and NumPy reprs, content parts, ShareGPT."""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rlora.records import Messages, RloraError

from .files import Row

_NO_ARGUMENTS = {"name", "arguments", "parameters", "id", "type", "index"}  # keys of a call; others could be arguments
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
    "function_call": "assistant", "observation": "tool",
}  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MESSAGES = ("messages", "conversations", "conversation")  # keys of an object that holds only messages
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_OTHER_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "audio_url", "video", "video_url", "file")
_KEY = r"""\\{{0,9}}["'](?:{})\\{{0,9}}["']\s*:"""
_OPENING = r"""(?:(?:np\.|numpy\.)?array\(|[\s\[(\\"'])*"""
_MAY_BE_CHAT = re.compile(_KEY.format("role|from|type|" + "|".join(_MESSAGES)))
_CHAT_START = re.compile(
    _OPENING + r"\{\s*(?:" + _KEY.format("role|" + "|".join(_MESSAGES))
    + "|" + _KEY.format("content") + r"(?=.*" + _KEY.format("role") + ")"
    + "|" + _KEY.format("value") + r"(?=.*" + _KEY.format("from") + ")"
    + "|" + _KEY.format("from") + r"""\s*\\*["'](?:""" + "|".join(_SHAREGPT) + ")"
    + r"|(?<=\[\{)" + _KEY.format("content") + ")",
    re.DOTALL,
)  # fmt: skip
_PARTS_START = re.compile(
    _OPENING + r"\{\s*" + _KEY.format("type") + r"""\s*\\*["'](?:""" + "|".join(_TEXT_PARTS + _OTHER_PARTS) + ")"
)


def as_text(value: Any, source: str) -> str | Messages:
    """Return a prompt's text, or its chat messages in the form of `as_conversation`. Raises
    RloraError, which begins with `source`, if the last message is the assistant's."""
    messages = as_conversation(value, source)
    if not isinstance(messages, str) and messages[-1]["role"] == "assistant":
        raise RloraError(
            f"{source}: its last message is the assistant's, {messages[-1]['content']!r:.80}, but a prompt must end "
            "with the message that the policy answers; drop the last message, or use its content as the answer"
        )
    return messages


def as_conversation(value: Any, source: str) -> str | Messages:
    """Return text, or chat messages reduced to role, content, reasoning_content and tool calls, and for a tool's result
    its name and id.

    The arguments of tool calls become objects, also from a string with JSON; their null values, which Arrow adds, are
    dropped. Content that is null next to tool calls becomes "".
    `value` is text or messages. Messages can be a list, a single message, the `messages` of an object, or a string with
    any of these as JSON or a Python literal. `content` can be a list of text parts, also as a string. ShareGPT's `from`
    and `value` are supported; the value of a `function_call` is a call. A thought can also be named `reasoning` or
    `thinking`. A `weight` of 0, for an answer that is not learned from, is kept.
    Raises RloraError, which begins with `source`, for any other value.
    """
    if isinstance(value, str):
        value = _parse_chat(value, source)
        if isinstance(value, str):
            return value
    key = _messages_key(value) if isinstance(value, Mapping) else ""
    if key and (extra := [name for name, item in value.items() if name != key and item]):
        raise RloraError(
            f"{source} has {', '.join(extra)} next to {key}, but a prompt contains only messages; drop all but {key}, "
            f"or move {', '.join(extra)} into separate columns"
        )
    value = turns_in(value) or value
    if not _is_list(value) or not value or not all(isinstance(turn, Mapping) for turn in value):
        raise RloraError(
            f"{source} is {value!r:.200}; it must be a string or a list of chat messages, "
            '{"role": ..., "content": ...} with string values'
        )
    return [_message(turn, f"{source}, message {number}") for number, turn in enumerate(value)]


def without_nulls(value: Any) -> Any:
    """Return a value without the nulls in its objects: Arrow gives all objects of a column the same keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if _is_list(value) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_turn(value: Any) -> bool:
    """Return whether an object is a chat message, possibly an invalid one; {"role": "admin", "name": "x"} is not."""
    if not isinstance(value, Mapping):
        return False
    has_role = str(value.get("role")) in _ROLES or str(value.get("from")) in _SHAREGPT
    return has_role or {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()


def _messages_key(value: Row) -> str:
    """Return the key of an object's messages; "" if there is none."""
    return next((key for key in _MESSAGES if turns_in(_parsed(value.get(key)))), "")


def turns_in(value: Any) -> Sequence[Any]:
    """Return the messages in a value; () if there are none.

    The value can be a list of messages, a single message, an object with messages, or a list of messages as strings.
    """
    if isinstance(value, Mapping):
        key = "" if _is_turn(value) else _messages_key(value)
        return [value] if _is_turn(value) else turns_in(_parsed(value[key])) if key else ()
    if not _is_list(value):
        return ()
    if value and all(isinstance(turn, str) for turn in value):
        value = [_parsed(turn) for turn in value]
    return value if any(map(_is_turn, value)) else ()


def _parse_chat(text: str, source: str) -> Any:
    """Return the messages in a string, or the string itself. Raises RloraError for unreadable messages."""
    if not _MAY_BE_CHAT.search(text) and not _CHAT_START.match(text):
        return text
    value = _parsed(text)
    if _is_list(value) and len(value) == 1 and _is_list(value[0]) and turns_in(value[0]):
        return value  # a list of chats; `as_text` raises an error for it
    if turns_in(value) or _parts(value):
        return value
    _check_readable(text, value, _CHAT_START, f"{source} begins like chat messages")
    return text


def _check_readable(text: str, value: Any, start: re.Pattern[str], fault: str) -> None:
    """Raise RloraError if a string starts like messages, could not be parsed (`value` is None), and is not prose."""
    if value is None and start.match(text) and not _continues_as_prose(text):
        raise RloraError(
            f"{fault}, {text!r:.80}, but is neither JSON nor a Python literal: it is truncated, or to_csv wrote a "
            "numpy array; write the messages with json.dumps, or save the table as parquet (plain text must not start "
            "like this)"
        )


def _parsed(value: Any) -> Any:
    """Parse JSON or a Python literal, nested up to three times in strings. Returns None for other strings."""
    for _ in range(3):
        if isinstance(value, str):
            value = _literal(value)
    return None if isinstance(value, str) else value


def _literal(text: str) -> Any:
    if not text.lstrip().startswith(tuple("[{(\"'")):
        return None
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes, such as \d
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _continues_as_prose(text: str) -> bool:
    """Return whether words follow a complete JSON value or Python literal, as in a question about this value."""
    candidates = (match.end() for match in list(re.finditer(r"[\]})]", text))[:50])
    for end in _json_ends(text) or candidates:
        if _literal(text[:end]) is not None:
            return not text[end:].lstrip().startswith(tuple("[{(,]})\"'\\"))
    return False


def _json_ends(text: str) -> list[int]:
    start = len(text) - len(text.lstrip())
    try:
        return [json.JSONDecoder(strict=False).raw_decode(text, start)[1]]
    except (ValueError, RecursionError):
        return []


def _message(turn: Row, source: str) -> dict[str, Any]:
    role, content, calls = turn.get("role"), turn.get("content"), turn.get("tool_calls")
    if role is None and content is None and "from" in turn:
        role, content = _SHAREGPT.get(str(turn["from"])), turn.get("value")
        if role is None:
            raise RloraError(f"{source}: from = {turn['from']!r} is not one of {', '.join(_SHAREGPT)}; rename it")
        if turn["from"] == "function_call":
            content, calls = "", _literal(content) if isinstance(content, str) else content
            if not calls:
                raise RloraError(
                    f"{source}: the value of a function_call is {turn.get('value')!r:.200}; use "
                    '{"name": ..., "arguments": {...}} as JSON'
                )
    if not isinstance(role, str) or not role:
        raise RloraError(f"{source} is {turn!r:.200}; it must have a role, a string such as user, and a content")
    if turn.get("function_call"):
        raise RloraError(f"{source}: function_call is an earlier form of tool calls; convert it to tool_calls")
    message: dict[str, Any] = {"role": role, "content": ""}
    if content is not None or not calls:  # an answer can be JSON
        message["content"] = _content(content, source, is_literal=role == "assistant")
    if calls:
        message["tool_calls"] = [_call(call, source) for call in calls] if _is_list(calls) else [_call(calls, source)]
    if role == "assistant" and (thought := next(filter(None, map(turn.get, _THOUGHTS)), None)):
        message["reasoning_content"] = _content(thought, source)
    if turn.get("weight") is not None:  # OpenAI's, of an answer in a conversation to learn from
        if turn["weight"] not in (0, 1):
            raise RloraError(f"{source}: weight = {turn['weight']!r} of a message; use 0 or 1, or drop it")
        message |= {} if turn["weight"] else {"weight": 0}
    if role == "tool":
        message |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key)}
    return message


def _call(call: Any, source: str) -> dict[str, Any]:
    """Return a tool call in the form of the OpenAI API, with its arguments as an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    items = function.items() if isinstance(function, Mapping) else ()
    fields = {key: value for key, value in items if value is not None}
    name, written = fields.get("name"), fields.get("arguments", fields.get("parameters", ""))  # the second: Llama 3's
    if written == "" and fields.keys() <= _NO_ARGUMENTS:
        written = {}
    arguments = _literal(written) if isinstance(written, str) else without_nulls(written)
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping) or not _is_json(arguments):
        raise RloraError(
            f"{source}: {call!r:.200} in tool_calls is not a call; use "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
        )
    identity = {"id": call["id"]} if call.get("id") else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def _is_json(value: Any) -> bool:
    """Return whether the value can be written as JSON, which has no NaN and no infinity."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _content(content: Any, source: str, is_literal: bool = False) -> str:
    """Return the text of a message, whose content is a string, a list of parts, or, unless `is_literal`, a string with
    a list of parts."""
    if isinstance(content, str) and is_literal:
        return content
    if isinstance(content, str):
        value = _parsed(content) if _MAY_BE_CHAT.search(content) else None
        if not (parts := _parts(value)):
            _check_readable(content, value, _PARTS_START, f"{source}: content begins like a list of parts")
            return content
        content = parts
    if not isinstance(content, Sequence):
        raise RloraError(f"{source}: content is {content!r:.200}; it must be a string or a list of text parts")
    return "".join(part if isinstance(part, str) else _part_text(part, source) for part in content)


def _parts(value: Any) -> Sequence[Any]:
    """Return the content parts in a value, a single text part or a list of parts; () if there are none."""
    parts = [value] if isinstance(value, Mapping) and value.keys() == {"type", "text"} else value
    if not _is_list(parts) or not all(map(_is_part, parts)) or all(part["type"] == "file" for part in parts):
        return ()
    return parts


def _is_part(value: Any) -> bool:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return kind in _OTHER_PARTS or (kind in _TEXT_PARTS and "text" in value)


def _part_text(part: Any, source: str) -> str:
    kind = part.get("type") or "text" if isinstance(part, Mapping) else None
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise RloraError(f"{source}: content has a part {part!r:.120}, but only text is supported; drop the row")
    return str(part["text"])
