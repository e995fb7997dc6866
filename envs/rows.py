"""The rows of a data set, local or from a hub: each value keeps the type and the text that it has in its file."""

import bz2
import codecs
import csv
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import math
import re
import sys
import zipfile
import zlib
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
Options = Mapping[str, Any]  # those of `configs` in README.md that differ from the defaults of `datasets`

_Span = tuple[str, int, int]  # a split, the first row of a slice, the row after its last one

_FORMATS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
_SHARD = re.compile(r"[-_.](\d{3,})[-_]of[-_](\d{3,})(?!\d)")
_IS_SPEC = re.compile(r"[\[+]")
_SPLIT_NAME = re.compile(r"(?:^|\+)\s*([^\s\[+(]+)")
_UNPACK = {
    rb"\x1f\x8b": gzip.decompress, rb"BZh[1-9]1AY&SY": bz2.decompress, rb"\xfd7zXZ\x00": lzma.decompress,
}  # fmt: skip
_HONOURED = {
    "csv": {"sep", "delimiter", "names", "column_names", "header", "encoding", "encoding_errors", "quotechar",
            "doublequote", "escapechar", "skipinitialspace"},
    "json": {"field", "encoding", "encoding_errors"},
    "parquet": {"columns"},
}  # fmt: skip
_CSV_DIALECT = ("quotechar", "doublequote", "escapechar", "skipinitialspace")
_WITHOUT_EFFECT = {  # on speed, or on types, which stay those of the file
    "features", "chunksize", "block_size", "use_threads", "on_mixed_types", "parse_agent_traces", "batch_size",
    "fragment_scan_options", "engine", "memory_map", "verbose",
}  # fmt: skip


class _Number(float):
    """A float that `str` shows as its file does: 1.50, 1e5. It is a plain float once it was pickled."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


def is_null(value: Any) -> bool:
    """Whether there is no value: null, or NaN as others write it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_rows(field: str, path: str, name: str | None, split: str, apart_from: str = "") -> Sequence[Row]:
    """The rows of one split. Raises RloraError, which names `field`, where it can't be read or has none.

    `path` is a file, a directory, or a hub id. `split` may be a slice or a sum, as `datasets` writes them:
    train[:10%], train+test. It may share no rows with `apart_from`, another one of the same data. `datasets` finds the
    files of a split; json and csv are read here, because it would make numbers and dates of text.
    """
    try:
        rows = _selected(split, apart_from, path, name)
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


def split_names(split: str) -> list[str]:
    """The splits that a slice or a sum names, each once: train and test of `train[:10%]+test+train[90%:]`."""
    return list(dict.fromkeys(_SPLIT_NAME.findall(split)))


def without_splits(path: str) -> str:
    """Why two splits can't be read from a path, as in "a.csv is one file"; "" where they may be."""
    if Path(path).is_file():
        return f"{path} is one file, without splits"
    if (Path(path) / "state.json").is_file() and not (Path(path) / "dataset_dict.json").is_file():
        return f"{path} holds one split, as save_to_disk wrote it"
    return ""


def _selected(split: str, apart_from: str, path: str, name: str | None) -> Sequence[Row]:
    """The rows of a split, or of a slice or a sum of splits."""
    if not _IS_SPEC.search(split + apart_from):
        return _rows(Path(path), path, name, split)
    names = split_names(split)
    _spans(split, dict.fromkeys(names, 100))  # what is wrong is told before anything is read
    if len(names) > 1 and (why := without_splits(path)):
        raise RloraError(f"{why}; name one")
    parts = {part: _rows(Path(path), path, name, part) for part in names}
    lengths = {part: len(rows) for part, rows in parts.items()}
    spans = _spans(split, lengths)
    if apart_from:  # a split of it that was not read shares nothing, so its length is of no account
        _refuse_shared_rows(
            spans, _spans(apart_from, dict.fromkeys(split_names(apart_from), 100) | lengths), apart_from
        )
    return [row for part, start, end in spans for row in parts[part][start:end]]


def _refuse_shared_rows(spans: Sequence[_Span], others: Sequence[_Span], apart_from: str) -> None:
    for (part, start, end), (other, first, last) in itertools.product(spans, others):
        if part == other and max(start, first) < min(end, last):
            raise RloraError(
                f"rows {max(start, first)} to {min(end, last) - 1} of {part} are also in {apart_from}; train on one "
                "slice and hold out another, such as train[:90%] and train[90%:]"
            )


def _spans(split: str, lengths: Mapping[str, int]) -> list[_Span]:
    """The slices of a sum, for splits with so many rows each."""
    if not _IS_SPEC.search(split):  # a plain name, which may hold other characters
        return [(split, 0, lengths[split])]
    try:
        found = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise RloraError(
            f"it is no slice or sum of splits ({error}); write train[:100], train[:10%] or train+test"
        ) from error
    return [(part.splitname, part.from_, part.to) for part in found]


def _rows(local: Path, path: str, name: str | None, split: str) -> Sequence[Row]:
    if local.is_file():
        return _read(local, _format(local), split)
    if local.is_dir():
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            return list(_part(datasets.load_from_disk(path), split))  # as `save_to_disk` wrote it
        files = [local / f"{split}{end}" for end in _FORMATS if (local / f"{split}{end}").is_file()]
        if len(files) > 1:
            raise ValueError(f"the directory has {len(files)} files for it")
        if files and not _has_configs(local):
            return _read(files[0], _format(files[0]), split)
        if files and datasets.get_dataset_config_names(path) == ["default"]:
            name = None
        path, name = _subset(local, name)
    return _found(path, name, split)


def _has_configs(directory: Path) -> bool:
    """Whether the directory says in YAML which files are whose, and how they are read."""
    card, alone = directory / "README.md", directory / ".huggingface.yaml"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    block = re.match(r"\ufeff?\s*---\s*\n(.*?)\n---\s*$", text, re.DOTALL | re.MULTILINE)
    return alone.is_file() or bool(block and re.search(r"^configs\s*:", block[1], re.MULTILINE))


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
    """The rows of the files that `datasets` finds for a split. It reads itself the formats that are not read here."""
    try:
        builder = datasets.load_dataset_builder(path, name)
    except zipfile.BadZipFile as error:
        broken = [str(file) for file in sorted(Path(path).rglob("*.zip")) if not zipfile.is_zipfile(file)]
        raise RloraError(
            f"{', '.join(broken) or path} can't be unpacked: {error}; it is cut off or damaged, so fetch it again"
        ) from error
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
    options = _options(builder.config, kind)
    manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(force_extract=True))
    rows: list[Row] = []
    for file, shown in zip(manager.download([str(file) for file in found[split]]), files, strict=True):
        if zipfile.is_zipfile(file):
            rows += _zipped_rows(Path(file), shown, split, options)
        else:
            rows += _read(_extracted(Path(file), shown, manager), kind, split, shown, options)
    return rows


def _options(config: Any, kind: str) -> Options:
    """What README.md says of how its files are read. Raises RloraError for what is not done here."""
    common = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    fields = [field for field in dataclasses.fields(config) if field.name not in common | _WITHOUT_EFFECT]
    options = {field.name: getattr(config, field.name) for field in fields}
    options = {field.name: options[field.name] for field in fields if options[field.name] != field.default}
    for name, value in options.items():
        if name not in _HONOURED[kind]:
            raise RloraError(
                f"README.md sets {name} = {value!r} for it; that option is not supported, so drop it and convert the "
                "files, for example to JSON Lines"
            )
    if len(str(options.get("sep", ","))) != 1:
        raise RloraError(f"README.md sets sep = {options['sep']!r} for it; a separator must be one character")
    if not isinstance(options.get("header", "infer"), int | str | None):
        raise RloraError(f"README.md sets header = {options['header']!r} for it; a header must be one line's number")
    try:
        codecs.lookup(options.get("encoding") or "utf-8")
    except LookupError as error:
        raise RloraError(
            f"README.md sets encoding = {options['encoding']!r} for it; name one that is known to Python"
        ) from error
    return options


def _extracted(file: Path, shown: Path, manager: datasets.DownloadManager) -> Path:
    """The file itself, or unpacked where it is packed in a way that `_unpacked` does not know, such as zstd."""
    with file.open("rb") as opened:
        start = opened.read(16)
    if any(re.match(magic, start) for magic in _UNPACK):
        return file
    try:
        unpacked = Path(manager.extract(str(file)))
    except Exception as error:  # a library for each format is behind it
        raise RloraError(f"{shown} can't be unpacked: {error}; it is damaged or cut off, so fetch it again") from error
    if unpacked.is_dir():
        raise RloraError(f"{shown} is an archive that can't be read here; unpack it, or make it a zip file")
    return unpacked


def _zipped_rows(file: Path, shown: Path, split: str, options: Options) -> list[Row]:
    """The rows of all files in a zip file, in the order of their names."""
    with zipfile.ZipFile(file) as archive:
        names = sorted(name for name in archive.namelist() if not re.search(r"(^|/)(\.|__)", name))
        kinds = {name: _format(Path(name)) for name in names if _end(name) in _FORMATS}
        if not kinds:
            raise RloraError(f"{shown} has no json, jsonl, csv or parquet file in it; put one there, or unpack it")
        if len(set(kinds.values())) > 1:
            raise RloraError(
                f"{shown} holds files of several formats ({', '.join(sorted(set(kinds.values())))}); keep one format"
            )
        rows: list[Row] = []
        for name, kind in kinds.items():
            try:
                data = archive.read(name)
            except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
                raise RloraError(f"{shown / name} can't be unpacked: {error}; fetch {shown} again") from error
            rows += _parsed(data, kind, split, shown / name, options)
    return rows


def _refuse_missing_shards(names: Sequence[str]) -> None:
    """Raise RloraError where the names of the files say that there are more."""
    shards = [match for name in names if (match := _SHARD.search(name))]
    there = {match.string[: match.end()] for match in shards}
    first = int(all(int(match[1]) for match in shards) and any(int(match[1]) == int(match[2]) for match in shards))
    for match in shards:
        before, after = match.string[: match.start(1)], match.string[match.end(1) : match.end()]
        wanted = [f"{before}{first + number:0{len(match[1])}d}{after}" for number in range(int(match[2]))]
        if missing := [name for name in wanted if name not in there]:
            raise RloraError(f"{len(missing)} of its {match[2]} shards are missing, such as {missing[0]}; get them too")


def _part(data: datasets.Dataset | datasets.DatasetDict, split: str) -> datasets.Dataset:
    """A split; one that was saved alone also counts as `train`."""
    parts = data if isinstance(data, Mapping) else {"train": data, str(data.split): data}
    if split not in parts:
        raise RloraError(f"there is no such split; there are {', '.join(name for name in parts if name != 'None')}")
    return parts[split]


def _end(name: str) -> str:
    return Path(name.removesuffix(".gz")).suffix.lower()


def _format(file: Path) -> str:
    if _end(file.name) not in _FORMATS:
        raise ValueError(f"it ends with {file.suffix!r}")
    return _FORMATS[_end(file.name)]


def _read(file: Path, kind: str, split: str, shown: Path | None = None, options: Options | None = None) -> list[Row]:
    """The rows of a file, which errors call `shown`."""
    return _parsed(file.read_bytes(), kind, split, shown or file, options or {})


def _parsed(data: bytes, kind: str, split: str, shown: Path, options: Options) -> list[Row]:
    data = _unpacked(data, shown)
    if kind == "parquet":
        return _parquet_rows(data, shown, options.get("columns"))
    text = _decoded(data, shown, options.get("encoding") or "utf-8", options.get("encoding_errors") or "strict")
    if kind != "json":
        return list(_csv_rows(text, shown, {"sep": "\t" if kind == "tsv" else ","} | dict(options)))
    field = options.get("field")
    name = re.sub(r"\.(gz|bz2|xz|zst|lz4)$", "", shown.name)
    is_document = field or name.endswith(".json") or text.lstrip().startswith("[")
    rows = _document(text, shown, split, field) if is_document else None
    return _json_lines(text, shown) if rows is None else rows


def _unpacked(data: bytes, file: Path) -> bytes:
    """The bytes of a file that may be compressed. Raises RloraError where they are not all there."""
    if data.startswith(b"version https://git-lfs"):
        raise RloraError(f"{file} is a pointer of Git LFS, not the file itself; fetch it by `git lfs pull`")
    for magic, unpack in _UNPACK.items():
        if re.match(magic, data):
            try:
                return unpack(data)
            except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise RloraError(
                    f"{file} can't be unpacked: {error}; it is damaged or cut off, so fetch it again"
                ) from error
    return data


def _parquet_rows(data: bytes, file: Path, columns: Sequence[str] | None) -> list[Row]:
    if not data:
        return []
    try:
        rows: list[Row] = pyarrow.parquet.ParquetFile(io.BytesIO(data)).read(columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RloraError(
            f"{file} can't be read as parquet: {error}; where it is damaged or cut off, fetch it again"
        ) from error
    return rows


def _decoded(data: bytes, file: Path, encoding: str, errors: str) -> str:
    is_default = codecs.lookup(encoding).name == "utf-8"
    if is_default and (other := _other_encoding(data)):
        raise RloraError(f"{file} is in {other}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig" if is_default else encoding, errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        shown = "UTF-8" if is_default else encoding
        raise RloraError(
            f"{file}, line {line}: byte {data[error.start]:#x} is not {shown}; save the file as UTF-8"
        ) from error


def _other_encoding(data: bytes) -> str:
    """UTF-16 or UTF-32, as the byte order mark says, or the places of NUL bytes without one; "" for others."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    start = data[:4096]
    nulls = [start[place::4].count(0) / max(1, len(start[place::4])) for place in range(4)]
    names = {"UTF-32-LE": min(nulls[2:]) > 0.9, "UTF-32-BE": min(nulls[:2]) > 0.9}
    even, odd = nulls[::2], nulls[1::2]
    names |= {"UTF-16-LE": min(odd) > max(0.05, 2 * max(even)), "UTF-16-BE": min(even) > max(0.05, 2 * max(odd))}
    return next((f"{name} without a byte order mark" for name, found in names.items() if found), "")


def _document(text: str, file: Path, split: str, field: str | None) -> list[Row] | None:
    """The rows of one JSON value; None where the text is empty, or JSON lines."""
    try:
        whole = _json(text, str(file))
    except (ValueError, RecursionError) as error:
        if not text.strip() or (_begins_with_a_row(text) and not field):
            return None
        raise RloraError(f"{file}: it is not JSON: {error}") from error
    if field:
        if not isinstance(whole, dict) or field not in whole:
            raise RloraError(f"{file} has no {field!r}, which README.md names as field; name one that it has")
        whole = whole[field]
    rows = _rows_in(whole, file, split)
    for number, row in enumerate(rows):
        _check_row(row, f"{file}, row {number}", "\\u" in text)
    return rows


def _json(text: str, where: str) -> Any:
    """A JSON value whose numbers keep their text. Raises RloraError for one that would become infinite, or zero."""

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value) or (not value and re.match(r"-?[0.]*[1-9]", digits)):
            raise RloraError(f"{where}: the number {digits:.40} does not fit a float; write it as a string")
        if repr(value) == digits:
            return value
        kept = _Number(value)
        kept.text = digits
        return kept

    return json.loads(text, parse_float=number)


def _begins_with_a_row(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except ValueError:
        return False


def _rows_in(whole: Any, file: Path, split: str) -> list[Any]:
    """The rows of a JSON value: a list of them, an object with that list, the columns, or one row.

    The list is what stands under the split's name, under `data`, or under the only key. Another list of objects
    belongs to a row.
    """
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict):
        raise RloraError(f"{file} holds {whole!r:.80}; write a list of objects, one a row, or an object a line")
    tables = {name: value for name, value in whole.items() if isinstance(value, list) and all(map(_is_row, value))}
    for name in (split, "data", *(whole if len(whole) == 1 else ())):
        if name in tables:
            return tables[name]
    if len(tables) == len(whole) and any(tables.values()):
        raise RloraError(f"{file} has several lists of rows ({', '.join(tables)}); give each a file of its own")
    values = list(whole.values())
    if any(map(_is_chat, values)) or not all(isinstance(value, list) for value in values):
        return [whole]
    if len({len(value) for value in values}) == 1:
        return [dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True)]
    return [whole]


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and not _is_row(v) for v in value)


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
            row = _json(line, where)
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


def _csv_rows(text: str, file: Path, options: Options) -> Iterator[Row]:
    """Every cell as text; an empty one is null."""
    before = csv.field_size_limit(sys.maxsize)
    dialect = {name: options[name] for name in _CSV_DIALECT if name in options}
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=options["sep"], strict=True, **dialect)
    try:
        lines = filter(None, reader)
        header, first = _csv_header(lines, options)
        if twice := [name for name in header if header.count(name) > 1]:
            raise RloraError(f"{file}, line {reader.line_num}: two columns are called {twice[0]!r}; rename one of them")
        for cells in itertools.chain(first, lines):
            if any("\0" in cell for cell in cells):
                raise RloraError(f"{file}, line {reader.line_num}: a NUL byte; mend or drop the row")
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


def _csv_header(lines: Iterator[list[str]], options: Options) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, as pandas takes them from `names` and `header`, and the rows that were read for it."""
    names, number = options.get("names"), options.get("header", "infer")
    if number == "infer":
        number = 0 if names is None else None
    if number is None:
        first = list(itertools.islice(lines, 1))
        return [str(name) for name in (range(len(first[0])) if first and names is None else names or [])], first
    header = next(itertools.islice(lines, number, None), [])
    return [str(name) for name in (header if names is None else names)], []


def _reason(error: BaseException) -> str:
    """What an exception says, and those that it came from."""
    said = str(error) or type(error).__name__
    cause = error.__cause__
    return f"{said}: {_reason(cause)}" if cause and str(cause) not in said else said
