"""The files that an engine's adapters are loaded from: in RAM, or on disk where that is full. And what kills left."""

import errno
import fcntl
import itertools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rlora import machine
from rlora.records import Adapter, RloraError
from rlora.store import write_adapter

_OPENMP = "__KMP_REGISTERED_LIB_"  # Intel's OpenMP keeps a file of each process: this, its pid, and the user's id


class Scratch:
    """The directory of process `pid`, which has to be this one. It is locked, and the kernel unlocks it on any death:
    so other processes know, in any PID namespace, whether what is in it is in use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._held: dict[Path, tuple[Path, int]] = {}  # a directory and its lock, by where it is

    def write(
        self, adapter: Adapter, versions: int = 1, write: Callable[[Adapter, Path], Path] = write_adapter
    ) -> Path:
        """Write an adapter where `versions` like it have room; returns its directory. Raises RloraError if none has."""
        size = versions * sum(map(len, adapter.files.values()))
        full = []
        for place in _places():
            free = shutil.disk_usage(place).free
            full.append(f"{place} has {free / 1e6:,.1f} MB free")
            if free < size:
                continue
            try:
                return write(adapter, self._directory(place) / adapter.name)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
        count = f"{versions} versions" if versions > 1 else "a version"
        raise RloraError(
            f"engine: {count} of the adapter need {size / 1e6:,.1f} MB, but {' and '.join(full)}; start the container "
            "with a larger --shm-size (in Kubernetes, mount an emptyDir of medium Memory at /dev/shm), or set TMPDIR "
            "to a directory with more room"
        )

    def close(self) -> None:
        """Remove everything."""
        for directory, lock in self._held.values():
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)
        self._held.clear()

    def _directory(self, place: Path) -> Path:
        """This process's directory there, made and locked. Another container may have a process of the same number."""
        if place in self._held:
            return self._held[place][0]
        first = machine.adapter_directory(self.pid, place)
        for number in itertools.count():
            directory = first.with_name(f"{first.name}.{number}") if number else first
            try:
                directory.mkdir(mode=0o700)
                lock = _lock(directory, wait=True)
            except FileExistsError:
                lock = _lock(directory)
            if lock is None:
                continue
            if directory.exists():  # else it was taken for a dead one's just before it was locked
                for name in os.listdir(directory):  # of an earlier process of this number
                    shutil.rmtree(directory / name, ignore_errors=True)
                self._held[place] = directory, lock
                return directory
            os.close(lock)
        raise AssertionError


def remove_leftovers() -> None:
    """Remove what processes that are gone have left on this machine: adapters, and files of Intel's OpenMP.

    Other users' files that may not be removed stay.
    """
    for place in _places():
        for path in place.glob("rlora-*"):
            if (name := re.fullmatch(r"rlora-(\d+)(\.\d+)?", path.name)) and (lock := _lock(path)) is not None:
                with suppress(OSError):
                    if not _lives(int(name[1]), os.fstat(lock).st_mtime):
                        shutil.rmtree(path)
                os.close(lock)
    for path in machine.ram_directory().glob(f"{_OPENMP}*"):
        pid, _, user = path.name.removeprefix(_OPENMP).partition("_")
        with suppress(OSError):  # its own process would not miss the file either
            if pid.isdigit() and user == str(os.getuid()) and not _lives(int(pid), path.stat().st_mtime):
                path.unlink()


def _places() -> list[Path]:
    return list(dict.fromkeys([machine.ram_directory(), Path(tempfile.gettempdir())]))


def _lock(directory: Path, wait: bool = False) -> int | None:
    """A descriptor that holds the lock of a directory; None where it is in use, another user's, or no directory.

    With `wait` it is this process's own, and no more than looked at by others: there it may do without a lock, on a
    file system that has none.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if not wait:
            os.close(descriptor)
            return None
    return descriptor


def _lives(pid: int, last_change: float) -> bool:
    """Whether the process that made a file is there: one that began after its last change has only the same number."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    began = booted + int(fields[18]) / os.sysconf("SC_CLK_TCK")
    return state not in ("Z", "X") and began < last_change + 1
