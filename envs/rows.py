"""The rows of a data set, local or from a hub: its splits, shards and subsets."""

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

from .files import FORMATS, UNPACK, Options, Row, end_of, format_of, parsed, read_file, reason_of

_Span = tuple[str, int, int]  # a split, the first row of a slice, the row after its last one

_SHARD = re.compile(r"[-_.](\d{3,})[-_]of[-_](\d{3,})(?!\d)")
_IS_SPEC = re.compile(r"[\[+]")
_SPLIT_NAME = re.compile(r"(?:^|\+)\s*([^\s\[+(]+)")
_HONOURED = {
    "csv": {"sep", "delimiter", "names", "column_names", "header", "encoding", "encoding_errors", "quotechar",
            "doublequote", "escapechar", "skipinitialspace"},
    "json": {"field", "encoding", "encoding_errors"},
    "parquet": {"columns"},
}  # fmt: skip
_WITHOUT_EFFECT = {  # on speed, or on types, which stay those of the file
    "features", "chunksize", "block_size", "use_threads", "on_mixed_types", "parse_agent_traces", "batch_size",
    "fragment_scan_options", "engine", "memory_map", "verbose",
}  # fmt: skip


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
            f"{field} = {path!r}: {split} can't be read ({reason_of(error)}); give a hub id that can be reached, "
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
    _spans(split, dict.fromkeys(names, 100))  # raises if the syntax is wrong, before any file is read
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
        return read_file(local, format_of(local), split)
    if local.is_dir():
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            return list(_part(datasets.load_from_disk(path), split))  # as `save_to_disk` wrote it
        files = [local / f"{split}{end}" for end in FORMATS if (local / f"{split}{end}").is_file()]
        if len(files) > 1:
            raise ValueError(f"the directory has {len(files)} files for it")
        if files and not _has_configs(local):
            return read_file(files[0], format_of(files[0]), split)
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
            rows += read_file(_extracted(Path(file), shown, manager), kind, split, shown, options)
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
    """The file itself, or unpacked where it is packed in a way that `unpacked` does not know, such as zstd."""
    with file.open("rb") as opened:
        start = opened.read(16)
    if any(re.match(magic, start) for magic in UNPACK):
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
        kinds = {name: format_of(Path(name)) for name in names if end_of(name) in FORMATS}
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
            rows += parsed(data, kind, split, shown / name, options)
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
