"""Any data set, from a hub or a local file, by config: which column is what is said there."""

import datetime
import decimal
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlora.records import Messages, Prompt, RloraError

from .chats import as_text, turns_in
from .files import Row
from .generated import listed
from .rows import is_null, read_rows, split_names, without_splits

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
            text = as_text(cell(row, self._prompt, where), f"{where}: column {self._prompt!r}")
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
    if turns_in(value):
        kind, fix = "chat messages", f"set env_args.prompt = {name!r} and drop the template"
    elif isinstance(value, Mapping):
        kind, fix = "an object", f"name a column inside it, as {{{name}.{next(iter(value), 'key')}}}"
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        kind = "a list"
    raise RloraError(
        f"{where}: column {name!r} holds {kind}, {value!r:.120}; a template takes text and numbers, so {fix}"
    )
