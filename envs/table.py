"""Any data set, from a hub or a local file, by config: which column is what is said there."""

import ast
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlora.records import Messages, Prompt, RloraError

from .generated import listed
from .rows import Row, is_null, read_rows

_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
}  # fmt: skip
_TEXT_PARTS = ("text", "input_text", "output_text")
_PLACE = re.compile(r"\{\{|\}\}|\{(\w[\w.]*)\}")


class Table:
    """A prompt for each row of a data set.

    `path` is a hub id, whose subset is `name`; a local file (json, jsonl, csv, tsv, parquet); a local directory with a
    file called after each split, as train.jsonl; or a local copy of a data set on a hub, its shards included, or what
    `save_to_disk` of `datasets` wrote. Values keep the type and the text that they have in a file; all of a CSV's are
    text. Held out is the split `held_out_split`, or `held_out_path`, or a share
    of the training rows that `seed` chooses.

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
        if (held_out_split or split) == split and (held_out_path or path) == path and (held_out_split or held_out_path):
            raise RloraError(
                f"env_args.held_out_split = {held_out_split!r}: it is what is trained on; name another split or path"
            )
        places = [place for place in _PLACE.findall(template) if place]
        if held_out_split and not held_out_path and Path(path).is_file():
            raise RloraError(
                f"env_args.held_out_split = {held_out_split!r}: {path} is one file, without splits; name a directory "
                "with a file for each, or the other file as held_out_path"
            )
        if template and not places:
            raise RloraError(f"env_args.template = {template!r}: it has no {{column}} where a row's text goes")
        if answer and answer in places:
            raise RloraError(f"env_args.template = {template!r}: it shows the answer, {{{answer}}}; double its braces")
        self._train = (path, name, split)
        self._held_out = (held_out_path or path, None if held_out_path else name, held_out_split or split)
        self._has_split = bool(held_out_split or held_out_path)
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
        kept = list(enumerate(read_rows("env_args.path", path, name, split)))
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
    """`template` with the columns in their places."""

    def put(match: re.Match[str]) -> str:
        return str(cell(row, match[1], where)) if match[1] else match[0][0]

    return _PLACE.sub(put, template)


def _as_text(value: Any, where: str) -> str | Messages:
    """A prompt's text, or chat messages with nothing in them but role and content.

    Messages may stand in a string, as JSON or as Python shows them; `content` may be a list of parts that are text; and
    they may be ShareGPT's, `from` and `value`.
    """
    if isinstance(value, str):
        return _chat_in(value, where) or value
    if not isinstance(value, Sequence) or not value or not all(isinstance(turn, Mapping) for turn in value):
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


def _chat_in(text: str, where: str) -> str | Messages:
    """The messages in a string that is a list of them; "" for any other text."""
    if not re.match(r"\s*\[\s*\{", text):
        return ""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in found):
            return _as_text(found, where)
    return ""


def _message(turn: Row, where: str) -> dict[str, str]:
    role, content = turn.get("role"), turn.get("content")
    if role is None and content is None and "from" in turn:
        role, content = _SHAREGPT.get(turn["from"]), turn.get("value")
        if role is None:
            raise RloraError(f"{where}: from = {turn['from']!r} is none of {', '.join(_SHAREGPT)}; rename it")
    if not isinstance(role, str) or not role:
        raise RloraError(f"{where} is {turn!r}; it must have a role, a string, such as user, and a content")
    if content is None and turn.get("tool_calls"):
        raise RloraError(
            f"{where}: content is null beside tool_calls, and a prompt is text only; write the call into content, or "
            "drop the row"
        )
    return {"role": role, "content": content if isinstance(content, str) else _joined(content, where)}


def _joined(content: Any, where: str) -> str:
    """The text of a list of parts."""
    if not isinstance(content, Sequence):
        raise RloraError(f"{where}: content is {content!r}; it must be a string, or a list of parts that are text")
    return "".join(part if isinstance(part, str) else _text_of(part, where) for part in content)


def _text_of(part: Any, where: str) -> str:
    kind = part.get("type") or "text" if isinstance(part, Mapping) else None
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise RloraError(f"{where}: content has a part {part!r:.120}; only text can be read, so drop the row")
    return str(part["text"])
