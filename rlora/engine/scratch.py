"""The directory that an engine's adapters are loaded from, in RAM or on disk, and removal of what killed engines left.

Each process locks its directories, and the kernel releases a lock when the process dies. So other processes can tell
whether a directory is in use, also if they are in another PID namespace.
"""

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

_OPENMP = "__KMP_REGISTERED_LIB_"  # prefix of the file that Intel's OpenMP keeps per process; pid and user id follow


class Scratch:
    """Directories for the adapter files of this process, whose id is `pid`: in RAM and, if that is full, on disk.

    The process holds a lock on each directory until `close`.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._directories: dict[Path, tuple[Path, int]] = {}  # by root: this process's directory in it, and its lock

    def write(
        self, adapter: Adapter, versions: int = 1, write: Callable[[Adapter, Path], Path] = write_adapter
    ) -> Path:
        """Write the adapter's files with the function `write`, and return the directory that contains them.

        The files go to /dev/shm if it has room for `versions` adapters of this size, else to the directory for
        temporary files (TMPDIR). Raises RloraError if neither has that room.
        """
        size = versions * sum(map(len, adapter.files.values()))
        shortages = []
        for root in _roots():
            free = shutil.disk_usage(root).free
            shortages.append(f"{root} has {free / 1e6:,.1f} MB free")
            if free < size:
                continue
            try:
                return write(adapter, self._directory(root) / adapter.name)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
        need = f"{versions} versions of the adapter need" if versions > 1 else "a version of the adapter needs"
        raise RloraError(
            f"engine: {need} {size / 1e6:,.1f} MB, but {' and '.join(shortages)}; start the container with a larger "
            "--shm-size (in Kubernetes, mount an emptyDir of medium Memory at /dev/shm), or set TMPDIR to a directory "
            "with more room"
        )

    def close(self) -> None:
        """Remove this process's directories with all files in them, and release the locks."""
        for directory, lock in self._directories.values():
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)
        self._directories.clear()

    def _directory(self, root: Path) -> Path:
        """Return this process's directory in `root`. The first call creates and locks it.

        The name has a number at its end if a process in another container has the same pid and uses the plain name.
        """
        if root in self._directories:
            return self._directories[root][0]
        first = machine.adapter_directory(self.pid, root)
        for number in itertools.count():
            directory = first.with_name(f"{first.name}.{number}") if number else first
            try:
                directory.mkdir(mode=0o700)
                lock = _lock(directory, wait=True)
            except FileExistsError:
                lock = _lock(directory)
            if lock is None:
                continue
            if directory.exists():  # else it was removed as a leftover just before it was locked
                for name in os.listdir(directory):  # of an earlier process with this pid
                    shutil.rmtree(directory / name, ignore_errors=True)
                self._directories[root] = directory, lock
                return directory
            os.close(lock)
        raise AssertionError


def remove_leftovers() -> None:
    """Remove adapters and OpenMP files of dead processes on this machine. Files that can't be removed stay."""
    for root in _roots():
        for path in root.glob("rlora-*"):
            if (name := re.fullmatch(r"rlora-(\d+)(\.\d+)?", path.name)) and (lock := _lock(path)) is not None:
                with suppress(OSError):
                    if not _is_alive(int(name[1]), os.fstat(lock).st_mtime):
                        shutil.rmtree(path)
                os.close(lock)
    for path in machine.ram_directory().glob(f"{_OPENMP}*"):
        pid, _, user = path.name.removeprefix(_OPENMP).partition("_")
        with suppress(OSError):  # a process that is alive does not need the file either
            if pid.isdigit() and user == str(os.getuid()) and not _is_alive(int(pid), path.stat().st_mtime):
                path.unlink()


def _roots() -> list[Path]:
    return list(dict.fromkeys([machine.ram_directory(), Path(tempfile.gettempdir())]))


def _lock(directory: Path, wait: bool = False) -> int | None:
    """Lock a directory and return its descriptor, or None if it is in use, another user's, or not a directory.

    Set `wait` for a directory of this process, whose lock other processes hold only while they inspect it. If `wait` is
    set and the file system has no locks, the returned descriptor is not locked.
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


def _is_alive(pid: int, last_change: float) -> bool:
    """Return whether the process that created a file is alive.

    A process that began after the file's `last_change` (in seconds since 1970) did not create it, but reuses the pid.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    began = booted + int(fields[18]) / os.sysconf("SC_CLK_TCK")
    return state not in ("Z", "X") and began < last_change + 1
