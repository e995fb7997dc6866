"""Shared-memory record of a worker's current call, from which its parent enforces the deadline."""

import struct
import time
from mmap import mmap
from typing import NamedTuple

_RECORD = struct.Struct("qqqdd")
_SIZE = _RECORD.size


class CallRecord(NamedTuple):
    job: int  # index of the job, -1 between two jobs
    call: int
    function: int
    start: float  # time.monotonic(), in s
    deadline: float  # s


class Clock:
    """Record that one process writes and another reads, without a lock.

    A read may see a half-written record, so the record is stored twice. The writer fills the first copy, then the
    second; the reader loads the second, then the first. If both are equal, no write was in progress.
    (`struct.pack_into` clears its target first: a writer that loses the CPU there would show a deadline of 0 for as
    long, so the record is packed before it is copied.)
    """

    SIZE = 2 * _SIZE

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap(descriptor, self.SIZE)

    def write(self, job: int, call: int, function: int, deadline: float) -> None:
        data = _RECORD.pack(job, call, function, time.monotonic(), deadline)
        self._memory[:_SIZE] = data
        self._memory[_SIZE:] = data

    def read(self) -> CallRecord | None:
        """Return the current call, or None while it is being written."""
        second, first = self._memory[_SIZE:], self._memory[:_SIZE]
        return CallRecord(*_RECORD.unpack(first)) if first == second else None
