"""An env over any data set, from a hub or a local file; its arguments name the columns."""

import datetime
import decimal
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlora.records import Messages, Prompt, RloraError

from .chats import as_text, turns_in
from .files import Line, Row
from .generated import listed
from .rows import is_null, read_rows, split_names, without_splits

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w[\w.]*)\}")


class Table:
    """Any data set. Each row becomes a prompt.

    `path` is one of: a hub id, with `name` as its subset; a local file (json, jsonl, csv, tsv, parquet); a local
    directory with one file per split, such as train.jsonl; a local copy of a hub data set, including shards; or the
    output of `save_to_disk` of `datasets`. Values keep their type and text from the file; all values of a CSV are text.
    `split` is the split to train on, a slice or a sum of splits: `train[:90%]`, `train+extra`. The held-out prompts are
    the rows of `held_out_split`, of `held_out_path`, or `held_out_share` of the training rows, selected by `seed`;
    without these arguments there are none.

    The prompt's text is the value of the column `prompt` (text or chat messages), or `template` with its {column}
    placeholders filled in; {{ and }} are braces. `answer` is the column of the gold answer, "" for none; if
    `answer_after` is set, only the text after the last occurrence of `answer_after` counts. A dot selects a nested
    column: `reward_model.ground_truth`. `columns` selects the columns that reward functions can request, such as
    "level,subject"; by default all.
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
            raise RloraError(f"env_args.held_out_share = {held_out_share}: use a number from 0 to less than 1")
        if held_out_share and (held_out_split or held_out_path):
            raise RloraError(
                f"env_args.held_out_share = {held_out_share}: env_args.held_out_split or env_args.held_out_path "
                "already selects the held-out rows; remove env_args.held_out_share or the other argument"
            )
        is_same_path = _is_same(held_out_path or path, path)
        if (held_out_split or split) == split and is_same_path and (held_out_split or held_out_path):
            raise RloraError(
                f"env_args.held_out_split = {held_out_split!r}: it is the training data; name a different split or path"
            )
        placeholders = [name for name in _PLACEHOLDER.findall(template) if name]
        is_other_split = bool(held_out_split) and set(split_names(held_out_split)) != set(split_names(split))
        if is_other_split and is_same_path and (reason := without_splits(path)):
            raise RloraError(
                f"env_args.held_out_split = {held_out_split!r}: {reason}; name a directory with one file per split, "
                "set env_args.held_out_path, or hold out a slice: env_args.split = 'train[:90%]', "
                "env_args.held_out_split = 'train[90%:]'"
            )
        if template and not placeholders:
            raise RloraError(f"env_args.template = {template!r}: it has no {{column}} placeholder; add a placeholder")
        if answer and answer in placeholders:
            raise RloraError(
                f"env_args.template = {template!r}: it contains the answer; remove {{{answer}}}, or double the braces"
            )
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

    def gold(self, value: Any, source: str) -> Any:
        """Return the gold answer from the value of its column.

        Raises RloraError, which begins with `source`, if the value does not contain `answer_after`.
        """
        if not self._after:
            return value
        _, separator, gold = str(value).rpartition(self._after)
        if not separator:
            raise RloraError(f"{source}: {self._answer} = {value!r} has no {self._after!r}; fix or drop the row")
        return gold.strip()

    def _part(self, path: str, name: str | None, split: str, held_out: bool) -> list[Prompt]:
        disjoint_from = (self._train if held_out else self._held_out)[2] if self._is_same_data else ""
        rows = list(enumerate(read_rows("env_args.path", path, name, split, disjoint_from)))
        if self._share:
            chosen = set(random.Random(self._seed).sample(range(len(rows)), held_out_of(len(rows), self._share)))
            rows = [(index, row) for index, row in rows if (index in chosen) == held_out]
        return [self._to_prompt(row, f"{_line_of(row, path)}{path}, {split}, row {index}") for index, row in rows]

    def _to_prompt(self, row: Row, source: str) -> Prompt:
        if self._template:
            text: str | Messages = fill(self._template, row, source)
        else:
            text = as_text(cell(row, self._prompt, source), f"{source}: column {self._prompt!r}")
        answer = self.gold(cell(row, self._answer, source), source) if self._answer else None
        columns = {name: cell(row, name, source) for name in self._columns} if self._columns else dict(row)
        return Prompt(text, answer=answer, columns=columns)


def held_out_of(count: int, share: float) -> int:
    """Return the number of held-out rows. Raises RloraError if the share is too small to hold out any."""
    if not (number := round(count * share)):
        raise RloraError(f"env_args.held_out_share = {share}: less than one of {count} rows; raise it, or set it to 0")
    return number


def _line_of(row: Row, path: str) -> str:
    """Return where the row begins, in front of `path`, the data set that it is from; "" if no line has it."""
    if not isinstance(row, Line):
        return ""
    return f"line {row.number} of " + (f"{row.file}, in " if row.file != Path(path) else "")


def _is_same(first: str, second: str) -> bool:
    return first == second or (Path(first).exists() and Path(second).exists() and Path(first).samefile(second))


def cell(row: Row, name: str, source: str) -> Any:
    """Return the value of a column. Dots in `name` select nested columns.

    Raises RloraError, which begins with `source`, if the column is missing or null.
    """
    value: Any = row
    for key in [name] if name in row else name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise RloraError(
                f"{source}: column {name!r} is missing (the row has {', '.join(row)}); name a column that every row has"
            )
        value = value[key]
    if is_null(value):
        raise RloraError(f"{source}: column {name!r} is {'null' if value is None else 'NaN'}; fix or drop the row")
    return value


def fill(template: str, row: Row, source: str) -> str:
    """Fill the placeholders of a template with the values of a row.

    Raises RloraError, which begins with `source`, if a column is missing or null, or is a list or an object.
    """

    def replacement(match: re.Match[str]) -> str:
        return _text(cell(row, match[1], source), match[1], source) if match[1] else match[0][0]

    return _PLACEHOLDER.sub(replacement, template)


def _text(value: Any, name: str, source: str) -> str:
    """Return the text that a value has in its file; booleans as in JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float | decimal.Decimal | datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    kind, fix = type(value).__name__, "write its text into a column"
    if turns_in(value):
        kind, fix = "chat messages", f"set env_args.prompt = {name!r} and drop the template"
    elif isinstance(value, Mapping):
        kind, fix = "an object", f"name a column inside it, as {{{name}.{next(iter(value), 'key')}}}"
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        kind = "a list"
    raise RloraError(
        f"{source}: column {name!r} holds {kind}, {value!r:.120}; a template takes text and numbers, so {fix}"
    )
