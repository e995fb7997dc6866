"""Any data set that `datasets` reads, from a hub or a local file, by config: which column is what is said there."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from rlora.records import Messages, Prompt, RloraError

from .generated import listed

Row = Mapping[str, Any]

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_PLACE = re.compile(r"\{\{|\}\}|\{(\w[\w.]*)\}")


class Table:
    """A prompt for each row of a data set.

    `path` is a hub id, whose subset is `name`; a local file (json, jsonl, csv, parquet); or a local directory with a
    file called after each split, as train.jsonl. Held out is the split `held_out_split`, or `held_out_path`, or a share
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


def read_rows(field: str, path: str, name: str | None, split: str) -> Iterator[Row]:
    """The rows of one split. Raises RloraError, which names `field`, where it can't be read."""
    try:
        local = _local_file(Path(path), split)
        if local:
            data = datasets.load_dataset(_FORMATS[local.suffix], data_files=str(local), split="train")
        else:
            data = datasets.load_dataset(path, name, split=split)
    except Exception as error:  # a hub, a file system and a parser are behind it
        raise RloraError(
            f"{field} = {path!r}: {split} can't be read ({error}); give a hub id that can be reached, "
            f"a json, jsonl, csv or parquet file, or a directory with {split}.jsonl or the like"
        ) from error
    return iter(data)


def _local_file(path: Path, split: str) -> Path | None:
    """The file that holds a split; None where `path` is no local file or directory."""
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise ValueError(f"it ends with {path.suffix!r}")
        return path
    if not path.is_dir():
        return None
    found = [path / f"{split}{suffix}" for suffix in _FORMATS if (path / f"{split}{suffix}").is_file()]
    if len(found) != 1:
        raise ValueError(f"the directory has {len(found)} files for it")
    return found[0]


def cell(row: Row, name: str, where: str) -> Any:
    """What stands in a column; dots in `name` go into nested ones. Raises RloraError where it is missing or null."""
    value: Any = row
    for key in [name] if name in row else name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise RloraError(
                f"{where}: column {name!r} is missing (the row has {', '.join(row)}); name one that every row has"
            )
        value = value[key]
    if value is None:
        raise RloraError(f"{where}: column {name!r} is null; mend or drop the row")
    return value


def fill(template: str, row: Row, where: str) -> str:
    """`template` with the columns in their places."""

    def put(match: re.Match[str]) -> str:
        return str(cell(row, match[1], where)) if match[1] else match[0][0]

    return _PLACE.sub(put, template)


def _as_text(value: Any, where: str) -> str | Messages:
    """A prompt's text, or chat messages with nothing in them but role and content."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and all(map(_is_message, value)):
        return [{"role": turn["role"], "content": turn["content"]} for turn in value]
    raise RloraError(
        f'{where} is {value!r}; it must be a string or a list of chat messages, {{"role": ..., "content": ...}} '
        "with a string each"
    )


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
