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
    """Write a file atomically: after a crash the file has either the old or the new content. Raises OSError.

    A local file is flushed to disk before this function returns. At a URL, a write is as atomic as the store makes it.
    """
    if not isinstance(path, Path):
        path.write_bytes(content)
        return
    with _half(path) as half:
        _write(half, content)
        half.replace(path)
    _sync_directory(path.parent)


def read_file(path: AnyPath) -> bytes | None:
    """Return the content of a file, or None if the file does not exist.

    Raises OSError if the store fails, unlike `exists` and `is_dir` of fsspec, which then return False.
    """
    try:
        content: bytes = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return content


def names(directory: AnyPath) -> list[str]:
    """Return the names in a directory, none if the directory does not exist. Raises OSError if the store fails."""
    try:
        if isinstance(directory, Path):
            return os.listdir(directory)
        paths: list[str] = directory.fs.ls(directory.path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path.rstrip("/").rpartition("/")[2] for path in paths]


def holds(directory: AnyPath, path: AnyPath) -> bool:
    """Return whether `path` is `directory` or inside `directory`, so that removing `directory` removes `path`."""
    if isinstance(directory, Path) and isinstance(path, Path):
        return path.resolve().is_relative_to(directory.resolve())
    return f"{path}/".startswith(f"{str(directory).rstrip('/')}/")


def write_rows(path: AnyPath, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines atomically, see `write_file`. Values that JSON can't represent are converted by `str`."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(row, default=str) + "\n" for row in rows).encode())


def write_directory(path: AnyPath, files: Mapping[str, bytes]) -> None:
    """Write a directory of `files`, content by name, in place of an existing directory. Raises OSError.

    A local directory appears complete or not at all, and is on disk when this function returns. A store behind a URL
    can't rename a directory atomically: there the last of `files` is written last and marks the directory as complete.
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
    """Write the files of an adapter, in PEFT's format or all weights in transformers' format. Returns `directory`."""
    write_directory(directory, adapter.files)
    return directory


def remove(path: AnyPath) -> None:
    """Remove the file or directory at `path`, if there is one. A local directory disappears atomically."""
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
    """Remove the partial files and directories that a killed process left in a directory, as far as possible."""
    for name in names(directory):
        if name.endswith(HALF):
            with suppress(OSError):
                remove(directory / name)


@contextmanager
def _half(path: Path) -> Iterator[Path]:
    """Yield a path to write to, before it is renamed to `path`.

    An error removes what was written there. After a crash, the next write does.
    """
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
