"""The rows of a data set, local or from a hub: each value keeps the type and the text that it has in its file."""

import csv
import gzip
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from rlora.records import RloraError

Row = Mapping[str, Any]

_FORMATS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
_SHARD = re.compile(r"-(\d{3,})-of-(\d{3,})\b")


def is_null(value: Any) -> bool:
    """Whether there is no value: null, or NaN as others write it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_rows(field: str, path: str, name: str | None, split: str) -> Sequence[Row]:
    """The rows of one split. Raises RloraError, which names `field`, where it can't be read or has none.

    `path` is a file, a directory, or a hub id. `datasets` finds the files of a split; json and csv are read here,
    because it would make numbers and dates of text.
    """
    try:
        rows = _rows(Path(path), path, name, split)
    except RloraError as error:
        raise RloraError(f"{field} = {path!r}: {split} can't be read: {error}") from error.__cause__
    except Exception as error:  # a hub, a file system and a parser are behind it
        raise RloraError(
            f"{field} = {path!r}: {split} can't be read ({_reason(error)}); give a hub id that can be reached, "
            f"a json, jsonl, csv or parquet file, or a directory with {split}.jsonl or the like"
        ) from error
    if not rows:
        raise RloraError(f"{field} = {path!r}: {split} has no rows; fill it, or name another file or split")
    return rows


def _rows(local: Path, path: str, name: str | None, split: str) -> Sequence[Row]:
    if local.is_file():
        return _read(local, local, _format(local), split)
    if local.is_dir():
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            return list(_part(datasets.load_from_disk(path), split))  # as `save_to_disk` wrote it
        files = [local / f"{split}{end}" for end in _FORMATS if (local / f"{split}{end}").is_file()]
        if len(files) > 1:
            raise ValueError(f"the directory has {len(files)} files for it")
        if files:
            return _read(files[0], files[0], _format(files[0]), split)
        path, name = _subset(local, name)
    return _found(path, name, split)


def _subset(path: Path, name: str | None) -> tuple[str, str | None]:
    """The directory and the subset that `name` means: one that README.md tells of, or a directory in `path`."""
    subsets = datasets.get_dataset_config_names(str(path)) if name else []
    if not name or name in subsets:
        return str(path), name
    if (path / name).is_dir():
        return str(path / name), None
    if subsets != ["default"]:
        raise RloraError(f"no subset is called {name!r}; there are {', '.join(subsets)}")
    return str(path), None


def _found(path: str, name: str | None, split: str) -> Sequence[Row]:
    """Of the files that `datasets` finds for a split. Formats that are not read here, it reads."""
    builder = datasets.load_dataset_builder(path, name)
    kind = next(
        (kind for of, kind in ((Json, "json"), (Csv, "csv"), (Parquet, "parquet")) if isinstance(builder, of)), ""
    )
    found = builder.config.data_files
    if not kind or not found:
        return list(datasets.load_dataset(path, name, split=split))
    if split not in found:
        raise RloraError(f"there is no such split; there are {', '.join(map(str, found))}")
    files = [Path(str(file)) for file in found[split]]
    _refuse_missing_shards([file.name for file in files])
    if kind == "csv" and "\t" in (builder.config.sep, builder.config.delimiter):
        kind = "tsv"
    local = datasets.DownloadManager().download_and_extract([str(file) for file in found[split]])
    return [row for file, shown in zip(local, files, strict=True) for row in _read(Path(file), shown, kind, split)]


def _refuse_missing_shards(names: Sequence[str]) -> None:
    """Raise RloraError where the names of the files say that there are more."""
    shards = [match for name in names if (match := _SHARD.search(name))]
    for match in shards:
        number_of = range(int(match[2]))
        wanted = [f"{match.string[: match.start()]}-{number:0{len(match[1])}d}-of-{match[2]}" for number in number_of]
        there = {other.string[: other.end()] for other in shards}
        if missing := [name for name in wanted if name not in there]:
            raise RloraError(f"{len(missing)} of its {match[2]} shards are missing, such as {missing[0]}; get them too")


def _part(data: datasets.Dataset | datasets.DatasetDict, split: str) -> datasets.Dataset:
    """A split; one that was saved alone also counts as `train`."""
    parts = data if isinstance(data, Mapping) else {"train": data, str(data.split): data}
    if split not in parts:
        raise RloraError(f"there is no such split; there are {', '.join(name for name in parts if name != 'None')}")
    return parts[split]


def _format(file: Path) -> str:
    end = Path(file.name.removesuffix(".gz")).suffix.lower()
    if end not in _FORMATS:
        raise ValueError(f"it ends with {file.suffix!r}")
    return _FORMATS[end]


def _read(file: Path, shown: Path, kind: str, split: str) -> list[Row]:
    """The rows of a file, which errors call `shown`."""
    data = file.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise RloraError(f"{shown} is a pointer of Git LFS, not the file itself; fetch it by `git lfs pull`")
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    if kind == "parquet":
        return pyarrow.parquet.ParquetFile(io.BytesIO(data)).read().to_pylist() if data else []
    text = _decoded(data, shown)
    if kind == "json":
        is_document = shown.name.removesuffix(".gz").endswith(".json") or text.lstrip().startswith("[")
        rows = _document(text, shown, split) if is_document else None
        return _json_lines(text, shown) if rows is None else rows
    return list(_csv_rows(text, shown, "\t" if kind == "tsv" else ","))


def _decoded(data: bytes, file: Path) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise RloraError(f"{file} is in UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RloraError(
            f"{file}, line {line}: byte {data[error.start]:#x} is not UTF-8; save the file as UTF-8"
        ) from error


def _document(text: str, file: Path, split: str) -> list[Row] | None:
    """The rows of one JSON value; None where the text is empty, or JSON lines."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.strip() or _begins_with_a_row(text):
            return None
        raise RloraError(f"{file}: it is not JSON: {error}") from error
    rows = _rows_in(whole, file, split)
    for number, row in enumerate(rows):
        _check_row(row, f"{file}, row {number}", "\\u" in text)
    return rows


def _begins_with_a_row(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except ValueError:
        return False


def _rows_in(whole: Any, file: Path, split: str) -> list[Any]:
    """A list of rows, or of an object the list in it, the columns, or itself as the one row."""
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict):
        raise RloraError(f"{file} holds {whole!r:.80}; write a list of objects, one a row, or an object a line")
    tables = {name: value for name, value in whole.items() if isinstance(value, list) and all(map(_is_row, value))}
    filled = [name for name, value in tables.items() if value]
    if split in tables or len(filled) == 1:
        return tables[split] if split in tables else tables[filled[0]]
    if filled:
        raise RloraError(f"{file} has several lists of rows ({', '.join(filled)}); give each a file of its own")
    if all(isinstance(value, list) for value in whole.values()) and len({len(value) for value in whole.values()}) == 1:
        return [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]
    return [whole]


def _is_row(value: Any) -> bool:
    """Whether it is an object, but no chat message."""
    return isinstance(value, dict) and not ({"role", "from"} & value.keys() and {"content", "value"} & value.keys())


def _json_lines(text: str, file: Path) -> list[Row]:
    """An object a line. Other characters that end lines, such as U+2028, may be in a text."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RloraError(f"{where}: it is not JSON: {error}; mend or drop the line") from error
        _check_row(row, where, "\\u" in line)
        rows.append(row)
    return rows


def _check_row(row: Any, where: str, escapes: bool) -> None:
    """Raise RloraError for what is no object, or, where there are `escapes`, holds half of a character."""
    if not isinstance(row, dict):
        raise RloraError(f"{where}: {row!r:.80} is no object with columns; write {{column: value}}")
    for name, value in row.items() if escapes else ():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RloraError(
                f"{where}: column {name!r} holds {error.object[error.start]!r}, half of a character (a surrogate "
                "without its other one); mend or drop the row"
            ) from error


def _csv_rows(text: str, file: Path, separator: str) -> Iterator[Row]:
    """Every cell as text; an empty one is null."""
    before = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise RloraError(f"{file}, line 1: two columns are called {twice[0]!r}; rename one of them")
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise RloraError(
                    f"{file}, line {reader.line_num}: the row has {len(cells)} cells, the header {len(header)}; "
                    "mend or drop the row (a cell with a comma or a line break needs quotes)"
                )
            yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise RloraError(f"{file}, line {reader.line_num}: {error}; mend or drop the row") from error
    finally:
        csv.field_size_limit(before)


def _reason(error: BaseException) -> str:
    """What an exception says, and those that it came from."""
    said = str(error) or type(error).__name__
    cause = error.__cause__
    return f"{said}: {_reason(cause)}" if cause and str(cause) not in said else said
