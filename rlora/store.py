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
HALF = ".half"  # ends the names of what is being written or removed


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


def read_file(path: Place) -> bytes | None:
    """A file, None where it is not there. Raises OSError where that can't be known: to `exists` and `is_dir` of fsspec
    a store that does not answer is one that has nothing."""
    try:
        content: bytes = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return content


def names(directory: Place) -> list[str]:
    """What is in a directory, nothing where it is not there. Raises OSError like `read_file`."""
    try:
        if isinstance(directory, Path):
            return os.listdir(directory)
        found: list[str] = directory.fs.ls(directory.path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [each.rstrip("/").rpartition("/")[2] for each in found]


def holds(directory: Place, path: Place) -> bool:
    """Whether `path` is a directory or in it, so that who removes the one removes the other."""
    if isinstance(directory, Path) and isinstance(path, Path):
        return path.resolve().is_relative_to(directory.resolve())
    return f"{path}/".startswith(f"{str(directory).rstrip('/')}/")


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
    """Remove a file or a directory, if it is there. On this machine a directory is gone at once, and never half."""
    if not isinstance(path, Path):
        with suppress(FileNotFoundError):
            path.fs.rm(path.path, recursive=True)
    elif path.is_dir() and not path.is_symlink():
        if not path.name.endswith(HALF):
            left = path.with_name(f".{path.name}.old{HALF}")
            remove(left)
            path = path.rename(left)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_halves(directory: Place) -> None:
    """Remove what a process that was killed has half written or half removed there, as far as that can be."""
    for name in names(directory):
        if name.endswith(HALF):
            with suppress(OSError):
                remove(directory / name)


@contextmanager
def _half(path: Path) -> Iterator[Path]:
    """Where to write before renaming; nothing stays there, unless the machine dies: then until the next one."""
    half = path.with_name(f".{path.name}{HALF}")
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
