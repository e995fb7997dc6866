"""Any data set, from a hub or a local file, by config: which column is what is said there."""

import ast
import datetime
import decimal
import json
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlora.records import Messages, Prompt, RloraError

from .generated import listed
from .rows import Row, is_null, read_rows, split_names, without_splits

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
_PLACE = re.compile(r"\{\{|\}\}|\{(\w[\w.]*)\}")


class Table:
    """A prompt for each row of a data set.

    `path` is a hub id, whose subset is `name`; a local file (json, jsonl, csv, tsv, parquet); a local directory with a
    file called after each split, as train.jsonl; or a local copy of a data set on a hub, its shards included, or what
    `save_to_disk` of `datasets` wrote. Values keep the type and the text that they have in a file; all of a CSV's are
    text. A split may be a slice or a sum, `train[:90%]`, `train+extra`. Held out is the split `held_out_split`, or
    `held_out_path`, or a share of the training rows that `seed` chooses.

    The prompt is what stands in the column `prompt`, text or chat messages, or `template` with a {column} in each of
    its places, where {{ and }} are braces. `answer` is the column of the gold answer, of which only what follows the
    last `answer_after` counts; "" where there is none. A dot goes into a nested column: `reward_model.ground_truth`.
    Rewards may ask for the columns in `columns`, "level,subject", by default for all.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        held_out_split: str = "",
        held_out_path: str = "",
        held_out_share: float = 0.0,
        seed: int = 0,
        prompt: str = "prompt",
        template: str = "",
        answer: str = "answer",
        answer_after: str = "",
        columns: str | Sequence[str] = "",
    ) -> None:
        if not 0 <= held_out_share < 1:
            raise RloraError(f"env_args.held_out_share = {held_out_share}: use a share from 0 to below 1")
        if held_out_share and (held_out_split or held_out_path):
            raise RloraError(
                f"env_args.held_out_share = {held_out_share}: held_out_split or held_out_path says already "
                "what is held out; drop one of them"
            )
        is_same_path = _is_same(held_out_path or path, path)
        if (held_out_split or split) == split and is_same_path and (held_out_split or held_out_path):
            raise RloraError(
                f"env_args.held_out_split = {held_out_split!r}: it is what is trained on; name another split or path"
            )
        places = [place for place in _PLACE.findall(template) if place]
        is_other_split = bool(held_out_split) and set(split_names(held_out_split)) != set(split_names(split))
        if is_other_split and is_same_path and (why := without_splits(path)):
            raise RloraError(
                f"env_args.held_out_split = {held_out_split!r}: {why}; name a directory with a file for each split, "
                "or the other one as held_out_path, or hold out a slice: split = 'train[:90%]', "
                "held_out_split = 'train[90%:]'"
            )
        if template and not places:
            raise RloraError(f"env_args.template = {template!r}: it has no {{column}} where a row's text goes")
        if answer and answer in places:
            raise RloraError(f"env_args.template = {template!r}: it shows the answer, {{{answer}}}; double its braces")
        self._train = (path, name, split)
        self._held_out = (held_out_path or path, None if held_out_path else name, held_out_split or split)
        self._has_split = bool(held_out_split or held_out_path)
        self._is_same_data = self._has_split and is_same_path and self._held_out[1] == name
        self._share, self._seed = held_out_share, seed
        self._prompt, self._template, self._answer, self._after = prompt, template, answer, answer_after
        self._columns = listed(columns)

    def train(self) -> Sequence[Prompt]:
        return self._part(*self._train, held_out=False)

    def held_out(self) -> Sequence[Prompt]:
        return self._part(*self._held_out, held_out=True) if self._has_split or self._share else []

    def gold(self, value: Any, where: str) -> Any:
        """The answer, from what stands in its column. Raises RloraError, which begins with `where`."""
        if not self._after:
            return value
        _, found, gold = str(value).rpartition(self._after)
        if not found:
            raise RloraError(f"{where}: {self._answer} = {value!r} has no {self._after!r}; mend or drop the row")
        return gold.strip()

    def _part(self, path: str, name: str | None, split: str, held_out: bool) -> list[Prompt]:
        other = (self._train if held_out else self._held_out)[2] if self._is_same_data else ""
        kept = list(enumerate(read_rows("env_args.path", path, name, split, other)))
        if self._share:
            chosen = set(random.Random(self._seed).sample(range(len(kept)), round(len(kept) * self._share)))
            kept = [(index, row) for index, row in kept if (index in chosen) == held_out]
        return [self._to_prompt(row, f"{path}, {split}, row {index}") for index, row in kept]

    def _to_prompt(self, row: Row, where: str) -> Prompt:
        if self._template:
            text: str | Messages = fill(self._template, row, where)
        else:
            text = _as_text(cell(row, self._prompt, where), f"{where}: column {self._prompt!r}")
        answer = self.gold(cell(row, self._answer, where), where) if self._answer else None
        columns = {name: cell(row, name, where) for name in self._columns} if self._columns else dict(row)
        return Prompt(text, answer=answer, columns=columns)


def _is_same(path: str, other: str) -> bool:
    return path == other or (Path(path).exists() and Path(other).exists() and Path(path).samefile(other))


def cell(row: Row, name: str, where: str) -> Any:
    """What stands in a column; dots in `name` go into nested ones. Raises RloraError where it is missing or null."""
    value: Any = row
    for key in [name] if name in row else name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise RloraError(
                f"{where}: column {name!r} is missing (the row has {', '.join(row)}); name one that every row has"
            )
        value = value[key]
    if is_null(value):
        what = "null" if value is None else "NaN"
        raise RloraError(f"{where}: column {name!r} is {what}; mend or drop the row")
    return value


def fill(template: str, row: Row, where: str) -> str:
    """`template` with the columns in their places. Raises RloraError for lists and objects, which have no text."""

    def put(match: re.Match[str]) -> str:
        return _text(cell(row, match[1], where), match[1], where) if match[1] else match[0][0]

    return _PLACE.sub(put, template)


def _text(value: Any, name: str, where: str) -> str:
    """A value as its file shows it; true and false as in JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float | decimal.Decimal | datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    kind, fix = type(value).__name__, "write its text into a column"
    if _turns(value):
        kind, fix = "chat messages", f"set env_args.prompt = {name!r} and drop the template"
    elif isinstance(value, Mapping):
        kind, fix = "an object", f"name a column inside it, as {{{name}.{next(iter(value), 'key')}}}"
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        kind = "a list"
    raise RloraError(
        f"{where}: column {name!r} holds {kind}, {value!r:.120}; a template takes text and numbers, so {fix}"
    )


def _as_text(value: Any, where: str) -> str | Messages:
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
    value = _turns(value) or value
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
    return next((key for key in _MESSAGES if _turns(_parsed(value.get(key)))), "")


def _turns(value: Any) -> Sequence[Any]:
    """The messages that a value is, or that an object holds, or that strings in a list show; () for others."""
    if isinstance(value, Mapping):
        key = "" if _is_turn(value) else _messages_key(value)
        return [value] if _is_turn(value) else _turns(_parsed(value[key])) if key else ()
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
    if _is_list(found) and len(found) == 1 and _is_list(found[0]) and _turns(found[0]):
        return found  # a list of chats, which is refused
    if _turns(found) or _parts(found):
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
