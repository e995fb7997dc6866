"""Files of a run, on this machine or behind any URL that fsspec knows."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from upath import UPath

from rlora.records import Adapter

Place = Path | UPath  # a path of this machine, or any URL


def write_file(path: Place, content: bytes) -> None:
    """Write a file. On this machine it is replaced whole, and on the disk, or stays as it was; so it is in an object
    store, whose writes are whole. Raises OSError where it can't be written."""
    if not isinstance(path, Path):
        path.write_bytes(content)
        return
    with _half(path) as half:
        _write(half, content)
        half.replace(path)
    _settle(path.parent)


def write_rows(path: Place, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines, as `write_file` writes a file; what JSON has no form for is written as its `str`."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(row, default=str) + "\n" for row in rows).encode())


def write_directory(path: Place, files: Mapping[str, bytes]) -> None:
    """Write a directory of files, in place of what is there. Raises OSError where it can't be written.

    On this machine it appears whole or not at all, and is on the disk when this returns. Elsewhere no directory can be
    renamed in one go: there the last of `files` is written last.
    """
    if not isinstance(path, Path):
        remove(path)
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (path / name).write_bytes(content)
        return
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        _settle(path.parent.parent)
    with _half(path) as half:
        half.mkdir()
        for name, content in files.items():
            _write(half / name, content)
        _settle(half)
        remove(path)
        half.rename(path)
    _settle(path.parent)


def write_adapter(adapter: Adapter, directory: Path) -> Path:
    """Write an adapter in PEFT's format; returns where."""
    write_directory(directory, adapter.files)
    return directory


def remove(path: Place) -> None:
    """Remove a file or a directory, if it is there."""
    if not isinstance(path, Path):
        if path.exists():
            path.fs.rm(path.path, recursive=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _half(path: Path) -> Iterator[Path]:
    """Where to write before renaming; nothing stays there, unless the machine dies: then until the next one."""
    half = path.with_name(f".{path.name}.half")
    remove(half)
    try:
        yield half
    except BaseException:
        with suppress(OSError):  # a disk that takes nothing may let go of nothing; the first error is told
            remove(half)
        raise


def _write(path: Path, content: bytes) -> None:
    """And have it on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _settle(directory: Path) -> None:
    """Have the names in a directory on the disk: what was renamed there stays so."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
