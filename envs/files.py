"""The rows of one file: JSON, JSON lines, CSV or Parquet, packed or not. Values keep their type and text."""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import math
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from rlora.records import RloraError

Row = Mapping[str, Any]
Options = Mapping[str, Any]  # those of `configs` in README.md that differ from the defaults of `datasets`

FORMATS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
UNPACK = {
    rb"\x1f\x8b": gzip.decompress, rb"BZh[1-9]1AY&SY": bz2.decompress, rb"\xfd7zXZ\x00": lzma.decompress,
}  # fmt: skip
_CSV_DIALECT = ("quotechar", "doublequote", "escapechar", "skipinitialspace")


class _Number(float):
    """A float that `str` shows as its file does: 1.50, 1e5. It is a plain float once it was pickled."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


def end_of(name: str) -> str:
    return Path(name.removesuffix(".gz")).suffix.lower()


def format_of(file: Path) -> str:
    if end_of(file.name) not in FORMATS:
        raise ValueError(f"it ends with {file.suffix!r}")
    return FORMATS[end_of(file.name)]


def read_file(
    file: Path, kind: str, split: str, shown: Path | None = None, options: Options | None = None
) -> list[Row]:
    """The rows of a file, which errors call `shown`."""
    return parsed(file.read_bytes(), kind, split, shown or file, options or {})


def parsed(data: bytes, kind: str, split: str, shown: Path, options: Options) -> list[Row]:
    data = unpacked(data, shown)
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


def unpacked(data: bytes, file: Path) -> bytes:
    """The bytes of a file that may be compressed. Raises RloraError where they are not all there."""
    if data.startswith(b"version https://git-lfs"):
        raise RloraError(f"{file} is a pointer of Git LFS, not the file itself; fetch it by `git lfs pull`")
    for magic, unpack in UNPACK.items():
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


def reason_of(error: BaseException) -> str:
    """What an exception says, and those that it came from."""
    said = str(error) or type(error).__name__
    cause = error.__cause__
    return f"{said}: {reason_of(cause)}" if cause and str(cause) not in said else said
