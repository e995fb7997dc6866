"""Chat messages in the forms that data sets have: lists, objects, JSON, the text of Python and NumPy, content parts."""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rlora.records import Messages, RloraError

from .files import Row

_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
    "function_call": "assistant", "observation": "tool",
}  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MESSAGES = ("messages", "conversations", "conversation")  # the key of an object with nothing else in it
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


def as_text(value: Any, where: str) -> str | Messages:
    """A prompt's text, or chat messages with nothing in them but role and content.

    Messages may stand in a string, as JSON or as Python shows them, and may be one alone or the `messages` of an
    object; `content` may be a list of parts that are text, also in a string; and they may be ShareGPT's, `from` and
    `value`.
    """
    if isinstance(value, str):
        value = _chat_in(value, where)
        if isinstance(value, str):
            return value
    key = _messages_key(value) if isinstance(value, Mapping) else ""
    if key and (others := [name for name, other in value.items() if name != key and other]):
        raise RloraError(
            f"{where} has {', '.join(others)} beside {key}, and a prompt is messages only; drop them, or move them "
            "into columns of their own"
        )
    value = turns_in(value) or value
    if not _is_list(value) or not value or not all(isinstance(turn, Mapping) for turn in value):
        raise RloraError(
            f'{where} is {value!r}; it must be a string or a list of chat messages, {{"role": ..., "content": ...}} '
            "with a string each"
        )
    messages = [_message(turn, f"{where}, message {number}") for number, turn in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise RloraError(
            f"{where}: its last message is the assistant's, {messages[-1]['content']!r:.80}; a prompt ends with what "
            "the policy answers, so drop that message, or make it the answer"
        )
    return messages


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_turn(value: Any) -> bool:
    """Whether an object is a chat message, in whatever state: {"role": "admin", "name": "x"} is none."""
    if not isinstance(value, Mapping):
        return False
    is_known = str(value.get("role")) in _ROLES or str(value.get("from")) in _SHAREGPT
    return is_known or {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()


def _messages_key(value: Row) -> str:
    """The key of an object under which messages stand; "" where there is none."""
    return next((key for key in _MESSAGES if turns_in(_parsed(value.get(key)))), "")


def turns_in(value: Any) -> Sequence[Any]:
    """The messages that a value is, or that an object holds, or that strings in a list show; () for others."""
    if isinstance(value, Mapping):
        key = "" if _is_turn(value) else _messages_key(value)
        return [value] if _is_turn(value) else turns_in(_parsed(value[key])) if key else ()
    if not _is_list(value):
        return ()
    if value and all(isinstance(turn, str) for turn in value):
        value = [_parsed(turn) for turn in value]
    return value if any(map(_is_turn, value)) else ()


def _chat_in(text: str, where: str) -> Any:
    """The messages that a string shows, or the string itself. Raises RloraError for messages that can't be read."""
    if not _MAY_BE_CHAT.search(text) and not _CHAT_START.match(text):
        return text
    found = _parsed(text)
    if _is_list(found) and len(found) == 1 and _is_list(found[0]) and turns_in(found[0]):
        return found  # a list of chats, which is refused
    if turns_in(found) or _parts(found):
        return found
    _refuse_unreadable(text, found, _CHAT_START, f"{where} begins like chat messages")
    return text


def _refuse_unreadable(text: str, found: Any, start: re.Pattern[str], what: str) -> None:
    """Raise RloraError for a string that starts like messages and is nothing that can be read, but no prose either."""
    if found is None and start.match(text) and not _goes_on_as_prose(text):
        raise RloraError(
            f"{what}, {text!r:.80}, but is neither JSON nor a Python literal: it is cut off, or what to_csv makes of a "
            "numpy array; write it by json.dumps, or save the table as parquet (text that shall stay as it is may not "
            "start like this)"
        )


def _parsed(value: Any) -> Any:
    """What a string shows as JSON or as a Python literal, also where that is such a string; None for other strings."""
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
        with warnings.catch_warnings(action="ignore"):  # escapes that Python does not know, such as \d
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _goes_on_as_prose(text: str) -> bool:
    """Whether words follow a whole JSON value or Python literal, as in a question about it."""
    ends = (match.end() for match in list(re.finditer(r"[\]})]", text))[:50])
    for end in _ends_of_json(text) or ends:
        if _literal(text[:end]) is not None:
            return not text[end:].lstrip().startswith(tuple("[{(,]})\"'\\"))
    return False


def _ends_of_json(text: str) -> list[int]:
    start = len(text) - len(text.lstrip())
    try:
        return [json.JSONDecoder(strict=False).raw_decode(text, start)[1]]
    except (ValueError, RecursionError):
        return []


def _message(turn: Row, where: str) -> dict[str, str]:
    role, content = turn.get("role"), turn.get("content")
    if role is None and content is None and "from" in turn:
        role, content = _SHAREGPT.get(str(turn["from"])), turn.get("value")
        if role is None:
            raise RloraError(f"{where}: from = {turn['from']!r} is none of {', '.join(_SHAREGPT)}; rename it")
    if not isinstance(role, str) or not role:
        raise RloraError(f"{where} is {turn!r}; it must have a role, a string, such as user, and a content")
    if content is None and turn.get("tool_calls"):
        raise RloraError(
            f"{where}: content is null beside tool_calls, and a prompt is text only; write the call into content, or "
            "drop the row"
        )
    return {"role": role, "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    """The text of a message, of which a list of parts may be a list or a string that shows one."""
    if isinstance(content, str):
        found = _parsed(content) if _MAY_BE_CHAT.search(content) else None
        if not (parts := _parts(found)):
            _refuse_unreadable(content, found, _PARTS_START, f"{where}: content begins like a list of parts")
            return content
        content = parts
    if not isinstance(content, Sequence):
        raise RloraError(f"{where}: content is {content!r}; it must be a string, or a list of parts that are text")
    return "".join(part if isinstance(part, str) else _text_of(part, where) for part in content)


def _parts(value: Any) -> Sequence[Any]:
    """The parts of a content that a value is, one of text or a list of them; () for others."""
    parts = [value] if isinstance(value, Mapping) and value.keys() == {"type", "text"} else value
    if not _is_list(parts) or not all(map(_is_part, parts)) or all(part["type"] == "file" for part in parts):
        return ()
    return parts


def _is_part(value: Any) -> bool:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return kind in _OTHER_PARTS or (kind in _TEXT_PARTS and "text" in value)


def _text_of(part: Any, where: str) -> str:
    kind = part.get("type") or "text" if isinstance(part, Mapping) else None
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise RloraError(f"{where}: content has a part {part!r:.120}; only text can be read, so drop the row")
    return str(part["text"])
