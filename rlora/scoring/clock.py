"""Shared-memory record of a worker's current call, from which the parent process enforces the call's deadline."""

import struct
import time
from mmap import mmap
from typing import NamedTuple

_RECORD = struct.Struct("qqqdd")
_SIZE = _RECORD.size


class CallRecord(NamedTuple):
    job: int  # index of the job, -1 between two jobs
    call: int  # index of the call in the job; `worker.COROUTINES` for coroutines
    function: int  # index of the reward function; `worker.ENV` for the env's reply
    start: float  # time.monotonic(), in s
    deadline: float  # time limit of the call in s


class Clock:
    """A record that one process writes and another process reads, without a lock.

    Both processes construct it with the `descriptor` of the same file of `SIZE` bytes. A read can find a half-written
    record, so the record is stored twice. The writer fills the first copy, then the second; the reader loads the
    second, then the first. If the copies are equal, no write was in progress. (The record is packed before it is
    copied: `struct.pack_into` clears its target first, and a writer that loses the CPU there would leave a deadline of
    0 in both copies.)
    """

    SIZE = 2 * _SIZE

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap(descriptor, self.SIZE)

    def write(self, job: int, call: int, function: int, deadline: float) -> None:
        """Record a call that starts now."""
        data = _RECORD.pack(job, call, function, time.monotonic(), deadline)
        self._memory[:_SIZE] = data
        self._memory[_SIZE:] = data

    def read(self) -> CallRecord | None:
        """Return the current call, or None if a write is in progress."""
        second, first = self._memory[_SIZE:], self._memory[:_SIZE]
        return CallRecord(*_RECORD.unpack(first)) if first == second else None
