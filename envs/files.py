"""Reads the rows of a JSON, JSON Lines, CSV or Parquet file, compressed or not. Values keep their type and text."""

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
Options = Mapping[str, Any]  # options of `configs` in README.md that differ from the defaults of `datasets`

FORMATS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
DECOMPRESS = {
    rb"\x1f\x8b": gzip.decompress, rb"BZh[1-9]1AY&SY": bz2.decompress, rb"\xfd7zXZ\x00": lzma.decompress,
}  # fmt: skip
_CSV_DIALECT = ("quotechar", "doublequote", "escapechar", "skipinitialspace")


class _Number(float):
    """A float whose `str` is its text in the file: 1.50, 1e5. Pickling converts the number to a plain float."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


class Line(dict[str, Any]):
    """A row, and where it begins in a file of lines."""

    def __init__(self, row: Row, file: Path, number: int) -> None:
        super().__init__(row)
        self.file, self.number = file, number


def extension(name: str) -> str:
    return Path(name.removesuffix(".gz")).suffix.lower()


def format_of(file: Path) -> str:
    if extension(file.name) not in FORMATS:
        raise ValueError(f"its extension is {file.suffix!r}")
    return FORMATS[extension(file.name)]


def read_file(
    file: Path, kind: str, split: str, display_path: Path | None = None, options: Options | None = None
) -> list[Row]:
    """Read the rows of a file, which can be compressed. `kind` is a value of `FORMATS`, `split` the name of its split.

    Raises RloraError, which names the file by `display_path` if that is set, if the file can't be read.
    """
    return parse(file.read_bytes(), kind, split, display_path or file, options or {})


def parse(data: bytes, kind: str, split: str, file: Path, options: Options) -> list[Row]:
    """Parse the rows of a file's bytes, as in `read_file`. Raises RloraError, which names the file by `file`."""
    data = decompress(data, file)
    if kind == "parquet":
        return _parquet_rows(data, file, options.get("columns"))
    text = _decode(data, file, options.get("encoding") or "utf-8", options.get("encoding_errors") or "strict")
    if kind != "json":
        return list(_csv_rows(text, file, {"sep": "\t" if kind == "tsv" else ","} | dict(options)))
    field = options.get("field")
    name = re.sub(r"\.(gz|bz2|xz|zst|lz4)$", "", file.name)
    is_document = field or name.endswith(".json") or text.lstrip().startswith("[")
    rows = _document_rows(text, file, split, field) if is_document else None
    return _json_lines(text, file) if rows is None else rows


def decompress(data: bytes, file: Path) -> bytes:
    """Decompress the content of a file if it is compressed. Raises RloraError if it is damaged or incomplete."""
    if data.startswith(b"version https://git-lfs"):
        raise RloraError(f"{file} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    for magic, function in DECOMPRESS.items():
        if re.match(magic, data):
            try:
                return function(data)
            except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise RloraError(
                    f"{file} can't be decompressed: {error}; it is damaged or truncated, so download it again"
                ) from error
    return data


def _parquet_rows(data: bytes, file: Path, columns: Sequence[str] | None) -> list[Row]:
    if not data:
        return []
    try:
        rows: list[Row] = pyarrow.parquet.ParquetFile(io.BytesIO(data)).read(columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RloraError(
            f"{file} can't be read as parquet: {error}; if it is damaged or truncated, download it again"
        ) from error
    return rows


def _decode(data: bytes, file: Path, encoding: str, errors: str) -> str:
    is_default = codecs.lookup(encoding).name == "utf-8"
    if is_default and (detected := _detect_utf16_or_32(data)):
        raise RloraError(f"{file} is in {detected}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig" if is_default else encoding, errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        name = "UTF-8" if is_default else encoding
        raise RloraError(
            f"{file}, line {line}: byte {data[error.start]:#x} is not {name}; save the file as UTF-8"
        ) from error


def _detect_utf16_or_32(data: bytes) -> str:
    """Detect UTF-16 or UTF-32 by the byte order mark or the positions of NUL bytes. "" for other encodings."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    start = data[:4096]
    nulls = [start[offset::4].count(0) / max(1, len(start[offset::4])) for offset in range(4)]
    names = {"UTF-32-LE": min(nulls[2:]) > 0.9, "UTF-32-BE": min(nulls[:2]) > 0.9}
    even, odd = nulls[::2], nulls[1::2]
    names |= {"UTF-16-LE": min(odd) > max(0.05, 2 * max(even)), "UTF-16-BE": min(even) > max(0.05, 2 * max(odd))}
    return next((f"{name} without a byte order mark" for name, matches in names.items() if matches), "")


def _document_rows(text: str, file: Path, split: str, field: str | None) -> list[Row] | None:
    """Return the rows of a single JSON value, or None if the text is empty or JSON Lines."""
    try:
        document = _json(text, str(file))
    except (ValueError, RecursionError) as error:
        if not text.strip() or (_begins_with_a_row(text) and not field):
            return None
        raise RloraError(f"{file}: it is not JSON: {error}; fix the file") from error
    if field:
        if not isinstance(document, dict) or field not in document:
            raise RloraError(f"{file} has no {field!r}, which README.md sets as field; set a field that exists")
        document = document[field]
    rows = _find_rows(document, file, split)
    for number, row in enumerate(rows):
        _check_row(row, f"{file}, row {number}", "\\u" in text)
    return rows


def _json(text: str, source: str) -> Any:
    """Parse JSON whose numbers keep their text. Raises RloraError if a number overflows or underflows a float."""

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value) or (not value and re.match(r"-?[0.]*[1-9]", digits)):
            raise RloraError(f"{source}: the number {digits:.40} does not fit into a float; write it as a string")
        if repr(value) == digits:
            return value
        exact = _Number(value)
        exact.text = digits
        return exact

    return json.loads(text, parse_float=number)


def _begins_with_a_row(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except ValueError:
        return False


def _find_rows(document: Any, file: Path, split: str) -> list[Any]:
    """Return the rows of a JSON value: a list of rows, an object with such a list, an object of columns, or one row.

    An object contains the list of rows under the split's name, under `data`, or under its only key. Any other list of
    objects is a value of a row.
    """
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        raise RloraError(f"{file} holds {document!r:.80}; write a list of objects (rows), or one object per line")
    tables = {name: value for name, value in document.items() if isinstance(value, list) and all(map(_is_row, value))}
    for name in (split, "data", *(document if len(document) == 1 else ())):
        if name in tables:
            return tables[name]
    if len(tables) == len(document) and any(tables.values()):
        raise RloraError(f"{file} has several lists of rows ({', '.join(tables)}); write each to a separate file")
    values = list(document.values())
    if any(map(_is_chat, values)) or not all(isinstance(value, list) for value in values):
        return [document]
    if len({len(value) for value in values}) == 1:
        return [dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)]
    return [document]


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and not _is_row(v) for v in value)


def _is_row(value: Any) -> bool:
    """Return whether a value is an object other than a chat message."""
    return isinstance(value, dict) and not ({"role", "from"} & value.keys() and {"content", "value"} & value.keys())


def _json_lines(text: str, file: Path) -> list[Row]:
    """Parse one object per line. Only \\n ends a line: values can contain other line separators, such as U+2028."""
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        source = f"{file}, line {number}"
        try:
            row = _json(line, source)
        except (ValueError, RecursionError) as error:
            raise RloraError(f"{source}: it is not JSON: {error}; fix or drop the line") from error
        _check_row(row, source, "\\u" in line)
        rows.append(Line(row, file, number))
    return rows


def _check_row(row: Any, source: str, escapes: bool) -> None:
    """Raise RloraError unless the row is an object. If its JSON has `escapes`, also check for lone surrogates."""
    if not isinstance(row, dict):
        raise RloraError(f"{source}: {row!r:.80} is not an object with columns; write {{column: value}}")
    for name, value in row.items() if escapes else ():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RloraError(
                f"{source}: column {name!r} holds {error.object[error.start]!r}, half of a character (a lone "
                "surrogate); fix or drop the row"
            ) from error


def _csv_rows(text: str, file: Path, options: Options) -> Iterator[Row]:
    """Parse the rows of a CSV. All cells are text; an empty cell is None."""
    previous_limit = csv.field_size_limit(sys.maxsize)
    dialect = {name: options[name] for name in _CSV_DIALECT if name in options}
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=options["sep"], strict=True, **dialect)
    try:
        lines = filter(None, reader)
        header, first = _csv_header(lines, options)
        if duplicates := [name for name in header if header.count(name) > 1]:
            raise RloraError(f"{file}, line {reader.line_num}: two columns are named {duplicates[0]!r}; rename one")
        for cells in itertools.chain(first, lines):
            if any("\0" in cell for cell in cells):
                raise RloraError(f"{file}, line {reader.line_num}: a NUL byte; fix or drop the row")
            if len(cells) != len(header):
                raise RloraError(
                    f"{file}, line {reader.line_num}: the row has {len(cells)} cells, the header {len(header)}; "
                    "fix or drop the row (a cell with a comma or a line break needs quotes)"
                )
            row = {name: cell or None for name, cell in zip(header, cells, strict=True)}
            yield Line(row, file, reader.line_num - sum(cell.count("\n") for cell in cells))
    except csv.Error as error:
        raise RloraError(f"{file}, line {reader.line_num}: {error}; fix or drop the row") from error
    finally:
        csv.field_size_limit(previous_limit)


def _csv_header(lines: Iterator[list[str]], options: Options) -> tuple[list[str], list[list[str]]]:
    """Return the column names, from `names` and `header` as in pandas, and the data rows that were read for them."""
    names, number = options.get("names"), options.get("header", "infer")
    if number == "infer":
        number = 0 if names is None else None
    if number is None:
        first = list(itertools.islice(lines, 1))
        return [str(name) for name in (range(len(first[0])) if first and names is None else names or [])], first
    header = next(itertools.islice(lines, number, None), [])
    return [str(name) for name in (header if names is None else names)], []


def error_text(error: BaseException) -> str:
    """Return the message of an exception, followed by the messages of its causes."""
    message = str(error) or type(error).__name__
    cause = error.__cause__
    return f"{message}: {error_text(cause)}" if cause and str(cause) not in message else message
