"""Files on this machine (`Path`) or behind any URL that fsspec supports (`UPath`)."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from upath import UPath

from rlora.records import Adapter

AnyPath = Path | UPath  # a local path, or any URL
HALF = ".half"  # suffix of files and directories that are being written or removed


def write_file(path: AnyPath, content: bytes) -> None:
    """Write a file atomically: after a crash it has either its old or its new content. A local file is also flushed to
    disk. Remote writes are as atomic as the store's. Raises OSError."""
    if not isinstance(path, Path):
        path.write_bytes(content)
        return
    with _half(path) as half:
        _write(half, content)
        half.replace(path)
    _sync_directory(path.parent)


def read_file(path: AnyPath) -> bytes | None:
    """Content of a file, None if it does not exist. Raises OSError if the store does not answer, unlike `exists` and
    `is_dir` of fsspec, which then return False."""
    try:
        content: bytes = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return content


def names(directory: AnyPath) -> list[str]:
    """Names in a directory, empty if it does not exist. Raises OSError like `read_file`."""
    try:
        if isinstance(directory, Path):
            return os.listdir(directory)
        paths: list[str] = directory.fs.ls(directory.path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path.rstrip("/").rpartition("/")[2] for path in paths]


def holds(directory: AnyPath, path: AnyPath) -> bool:
    """Whether `path` is `directory` or lies in it, so that removing `directory` removes `path`."""
    if isinstance(directory, Path) and isinstance(path, Path):
        return path.resolve().is_relative_to(directory.resolve())
    return f"{path}/".startswith(f"{str(directory).rstrip('/')}/")


def write_rows(path: AnyPath, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines atomically, see `write_file`. Values that JSON can't represent are written as `str`."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(row, default=str) + "\n" for row in rows).encode())


def write_directory(path: AnyPath, files: Mapping[str, bytes]) -> None:
    """Write a directory of files, replacing an existing one. Raises OSError.

    A local directory appears complete or not at all, and is on disk when this returns. Other stores can't rename a
    directory atomically: there the last of `files` is written last and marks the directory as complete.
    """
    if not isinstance(path, Path):
        remove(path)
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (path / name).write_bytes(content)
        return
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        _sync_directory(path.parent.parent)
    with _half(path) as half:
        half.mkdir()
        for name, content in files.items():
            _write(half / name, content)
        _sync_directory(half)
        remove(path)
        half.rename(path)
    _sync_directory(path.parent)


def write_adapter(adapter: Adapter, directory: Path) -> Path:
    """Write an adapter in PEFT's format, and return the directory."""
    write_directory(directory, adapter.files)
    return directory


def remove(path: AnyPath) -> None:
    """Remove a file or a directory, if it exists. A local directory disappears atomically."""
    if not isinstance(path, Path):
        with suppress(FileNotFoundError):
            path.fs.rm(path.path, recursive=True)
    elif path.is_dir() and not path.is_symlink():
        if not path.name.endswith(HALF):
            removed = path.with_name(f".{path.name}.old{HALF}")
            remove(removed)
            path = path.rename(removed)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_halves(directory: AnyPath) -> None:
    """Remove partial files that a killed process left in a directory. Errors are ignored."""
    for name in names(directory):
        if name.endswith(HALF):
            with suppress(OSError):
                remove(directory / name)


@contextmanager
def _half(path: Path) -> Iterator[Path]:
    """Path to write to before renaming. It is removed on errors; after a crash, the next write removes it."""
    half = path.with_name(f".{path.name}{HALF}")
    remove(half)
    try:
        yield half
    except BaseException:
        with suppress(OSError):  # cleanup may fail on the same disk; keep the original error
            remove(half)
        raise


def _write(path: Path, content: bytes) -> None:
    """Write a file and flush it to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    """Flush the names in a directory to disk, so that renames in it survive a crash."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
