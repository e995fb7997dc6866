"""Reads a data set, local or from a hub: its splits, shards and subsets."""

import codecs
import dataclasses
import itertools
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from rlora.records import RloraError

from .files import DECOMPRESS, FORMATS, Options, Row, error_text, extension, format_of, parse, read_file

_Span = tuple[str, int, int]  # a split, and the start and end of a slice of it

_SHARD = re.compile(r"[-_.](\d{3,})[-_]of[-_](\d{3,})(?!\d)")
_IS_SPEC = re.compile(r"[\[+]")
_SPLIT_NAME = re.compile(r"(?:^|\+)\s*([^\s\[+(]+)")
_SUPPORTED_OPTIONS = {
    "csv": {"sep", "delimiter", "names", "column_names", "header", "encoding", "encoding_errors", "quotechar",
            "doublequote", "escapechar", "skipinitialspace"},
    "json": {"field", "encoding", "encoding_errors"},
    "parquet": {"columns"},
}  # fmt: skip
_IGNORED_OPTIONS = {  # they change only speed or types, and rows keep the types of the file
    "features", "chunksize", "block_size", "use_threads", "on_mixed_types", "parse_agent_traces", "batch_size",
    "fragment_scan_options", "engine", "memory_map", "verbose",
}  # fmt: skip


def is_null(value: Any) -> bool:
    """Return whether a value is missing: null, or NaN, which some tools write instead."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_rows(field: str, path: str, name: str | None, split: str, disjoint_from: str = "") -> Sequence[Row]:
    """Read the rows of a split. Raises RloraError, which names `field`, if the split can't be read or is empty.

    `path` is a file, a directory, or a hub id, and `name` is its subset. `split` can be a slice or a sum in the syntax
    of `datasets`: train[:10%], train+test. `disjoint_from` is another split of the same data, which must not share rows
    with `split`, or "". `datasets` finds the files of a split; json and csv are parsed here, because `datasets` would
    convert text to numbers and dates.
    """
    try:
        rows = _select(split, disjoint_from, path, name)
    except RloraError as error:
        raise RloraError(f"{field} = {path!r}: {split} can't be read: {error}") from error.__cause__
    except Exception as error:  # hubs, file systems and parsers raise all kinds
        raise RloraError(
            f"{field} = {path!r}: {split} can't be read ({error_text(error)}); use a hub id that can be reached, "
            f"a json, jsonl, csv or parquet file, or a directory with {split}.jsonl or similar"
        ) from error
    if not rows:
        raise RloraError(f"{field} = {path!r}: {split} has no rows; name a different file or split")
    return rows


def split_names(split: str) -> list[str]:
    """Return the distinct splits in a slice or a sum: train and test for `train[:10%]+test+train[90%:]`."""
    return list(dict.fromkeys(_SPLIT_NAME.findall(split)))


def without_splits(path: str) -> str:
    """Return the reason why a path has only one split, such as "a.csv is one file"; "" if it can have several."""
    if Path(path).is_file():
        return f"{path} is one file, without splits"
    if (Path(path) / "state.json").is_file() and not (Path(path) / "dataset_dict.json").is_file():
        return f"{path} holds one split, as save_to_disk wrote it"
    return ""


def _select(split: str, disjoint_from: str, path: str, name: str | None) -> Sequence[Row]:
    """Read the rows of a split, or of a slice or a sum of splits."""
    if not _IS_SPEC.search(split + disjoint_from):
        return _rows(Path(path), path, name, split)
    names = split_names(split)
    _spans(split, dict.fromkeys(names, 100))  # raises for wrong syntax, before any file is read
    if len(names) > 1 and (reason := without_splits(path)):
        raise RloraError(f"{reason}; name one split")
    parts = {part: _rows(Path(path), path, name, part) for part in names}
    lengths = {part: len(rows) for part, rows in parts.items()}
    spans = _spans(split, lengths)
    if disjoint_from:  # its splits that were not read share no rows with `split`, so their lengths (100) don't matter
        _check_disjoint(
            spans, _spans(disjoint_from, dict.fromkeys(split_names(disjoint_from), 100) | lengths), disjoint_from
        )
    return [row for part, start, end in spans for row in parts[part][start:end]]


def _check_disjoint(spans: Sequence[_Span], disjoint_spans: Sequence[_Span], disjoint_from: str) -> None:
    for (part, start, end), (disjoint_part, first, last) in itertools.product(spans, disjoint_spans):
        if part == disjoint_part and max(start, first) < min(end, last):
            raise RloraError(
                f"rows {max(start, first)} to {min(end, last) - 1} of {part} are also in {disjoint_from}; train on one "
                "slice and hold out a different one, such as train[:90%] and train[90%:]"
            )


def _spans(split: str, lengths: Mapping[str, int]) -> list[_Span]:
    """Return the slices of a sum. `lengths` has the number of rows per split."""
    if not _IS_SPEC.search(split):  # a plain name, which may contain any other character
        return [(split, 0, lengths[split])]
    try:
        instructions = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        raise RloraError(
            f"it is not a slice or a sum of splits ({error}); write train[:100], train[:10%] or train+test"
        ) from error
    return [(part.splitname, part.from_, part.to) for part in instructions]


def _rows(local: Path, path: str, name: str | None, split: str) -> Sequence[Row]:
    if local.is_file():
        return read_file(local, format_of(local), split)
    if local.is_dir():
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            return list(_part(datasets.load_from_disk(path), split))  # written by `save_to_disk`
        files = [local / f"{split}{end}" for end in FORMATS if (local / f"{split}{end}").is_file()]
        if len(files) > 1:
            raise ValueError(f"the directory has {len(files)} files for this split: remove all but one")
        if files and not _has_configs(local):
            return read_file(files[0], format_of(files[0]), split)
        if files and datasets.get_dataset_config_names(path) == ["default"]:
            name = None
        path, name = _subset(local, name)
    return _load(path, name, split)


def _has_configs(directory: Path) -> bool:
    """Return whether the directory has YAML that assigns files to subsets and splits, with options for reading them."""
    card, config = directory / "README.md", directory / ".huggingface.yaml"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    block = re.match(r"\ufeff?\s*---\s*\n(.*?)\n---\s*$", text, re.DOTALL | re.MULTILINE)
    return config.is_file() or bool(block and re.search(r"^configs\s*:", block[1], re.MULTILINE))


def _subset(path: Path, name: str | None) -> tuple[str, str | None]:
    """Return the directory and the subset for `name`, which is a subset in README.md or a directory in `path`."""
    subsets = datasets.get_dataset_config_names(str(path)) if name else []
    if not name or name in subsets:
        return str(path), name
    if (path / name).is_dir():
        return str(path / name), None
    if subsets != ["default"]:
        raise RloraError(f"there is no subset {name!r}, only {', '.join(subsets)}; name one of these")
    return str(path), None


def _load(path: str, name: str | None, split: str) -> Sequence[Row]:
    """Read the rows of the files that `datasets` finds for a split. Formats that are not parsed here are read by it."""
    try:
        builder = datasets.load_dataset_builder(path, name)
    except zipfile.BadZipFile as error:
        broken = [str(file) for file in sorted(Path(path).rglob("*.zip")) if not zipfile.is_zipfile(file)]
        raise RloraError(
            f"{', '.join(broken) or path} can't be decompressed: {error}; it is damaged or truncated, so download it "
            "again"
        ) from error
    builders = ((Json, "json"), (Csv, "csv"), (Parquet, "parquet"))
    kind = next((kind for builder_class, kind in builders if isinstance(builder, builder_class)), "")
    data_files = builder.config.data_files
    if not kind or not data_files:
        return list(datasets.load_dataset(path, name, split=split))
    if split not in data_files:
        raise RloraError(f"there is no such split, only {', '.join(map(str, data_files))}; name one of these")
    files = [Path(str(file)) for file in data_files[split]]
    _check_shards([file.name for file in files])
    options = _options(builder.config, kind)
    manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(force_extract=True))
    rows: list[Row] = []
    local_files = manager.download([str(file) for file in data_files[split]])
    for local_file, file in zip(local_files, files, strict=True):
        if zipfile.is_zipfile(local_file):
            rows += _zip_rows(Path(local_file), file, split, options)
        else:
            rows += read_file(_extract(Path(local_file), file, manager), kind, split, file, options)
    return rows


def _options(config: Any, kind: str) -> Options:
    """Return the options in README.md for reading the files. Raises RloraError for unsupported options."""
    common = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    fields = [field for field in dataclasses.fields(config) if field.name not in common | _IGNORED_OPTIONS]
    options = {field.name: getattr(config, field.name) for field in fields}
    options = {field.name: options[field.name] for field in fields if options[field.name] != field.default}
    for name, value in options.items():
        if name not in _SUPPORTED_OPTIONS[kind]:
            raise RloraError(
                f"README.md sets {name} = {value!r}; this option is not supported, so remove it and convert the files, "
                "for example to JSON Lines"
            )
    if len(str(options.get("sep", ","))) != 1:
        raise RloraError(f"README.md sets sep = {options['sep']!r}; use a separator of one character")
    if not isinstance(options.get("header", "infer"), int | str | None):
        raise RloraError(f"README.md sets header = {options['header']!r}; use a single line number")
    try:
        codecs.lookup(options.get("encoding") or "utf-8")
    except LookupError as error:
        raise RloraError(
            f"README.md sets encoding = {options['encoding']!r}; use an encoding known to Python"
        ) from error
    return options


def _extract(local_file: Path, file: Path, manager: datasets.DownloadManager) -> Path:
    """Return the file itself, or a decompressed copy if `decompress` does not support the format, such as zstd."""
    with local_file.open("rb") as opened:
        start = opened.read(16)
    if any(re.match(magic, start) for magic in DECOMPRESS):
        return local_file
    try:
        extracted = Path(manager.extract(str(local_file)))
    except Exception as error:  # a different library for each format
        raise RloraError(
            f"{file} can't be decompressed: {error}; it is damaged or truncated, so download it again"
        ) from error
    if extracted.is_dir():
        raise RloraError(f"{file} is an archive of an unsupported format; extract it, or convert it to a zip file")
    return extracted


def _zip_rows(local_file: Path, file: Path, split: str, options: Options) -> list[Row]:
    """Read the rows of all files in a zip file, ordered by name."""
    with zipfile.ZipFile(local_file) as archive:
        names = sorted(name for name in archive.namelist() if not re.search(r"(^|/)(\.|__)", name))
        kinds = {name: format_of(Path(name)) for name in names if extension(name) in FORMATS}
        if not kinds:
            raise RloraError(f"{file} contains no json, jsonl, csv or parquet file; add one, or extract the file")
        if len(set(kinds.values())) > 1:
            raise RloraError(
                f"{file} contains files of several formats ({', '.join(sorted(set(kinds.values())))}); keep one format"
            )
        rows: list[Row] = []
        for name, kind in kinds.items():
            try:
                data = archive.read(name)
            except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
                raise RloraError(f"{file / name} can't be decompressed: {error}; download {file} again") from error
            rows += parse(data, kind, split, file / name, options)
    return rows


def _check_shards(names: Sequence[str]) -> None:
    """Raise RloraError if the numbers in the file names show that shards are missing."""
    shards = [match for name in names if (match := _SHARD.search(name))]
    present = {match.string[: match.end()] for match in shards}
    first = int(all(int(match[1]) for match in shards) and any(int(match[1]) == int(match[2]) for match in shards))
    for match in shards:
        prefix, suffix = match.string[: match.start(1)], match.string[match.end(1) : match.end()]
        expected = [f"{prefix}{first + number:0{len(match[1])}d}{suffix}" for number in range(int(match[2]))]
        if missing := [name for name in expected if name not in present]:
            raise RloraError(f"{len(missing)} of {match[2]} shards are missing, such as {missing[0]}; download them")


def _part(data: datasets.Dataset | datasets.DatasetDict, split: str) -> datasets.Dataset:
    """Return a split of saved data. A single saved split can also be read as `train`."""
    parts = data if isinstance(data, Mapping) else {"train": data, str(data.split): data}
    if split not in parts:
        names = ", ".join(name for name in parts if name != "None")
        raise RloraError(f"there is no such split, only {names}; name one of these")
    return parts[split]
