"""Which call a process is at, since when and how long it may take, in memory that its parent reads."""

import struct
import time
from mmap import mmap
from typing import NamedTuple

_RECORD = struct.Struct("qqqdd")
_SIZE = _RECORD.size


class Call(NamedTuple):
    job: int  # the number of its job, -1 between two
    call: int
    function: int
    since: float  # time.monotonic(), in s
    deadline: float  # s


class Clock:
    """One process writes and another reads, without a lock: what is read may be half written.

    So the record is there twice. It is written to the first place and then to the second, and read the other way round:
    where both are alike, neither was being written. (`struct.pack_into` clears its target first, so that a process that
    loses the CPU there shows a deadline of 0 for as long.)
    """

    SIZE = 2 * _SIZE

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap(descriptor, self.SIZE)

    def write(self, job: int, call: int, function: int, deadline: float) -> None:
        data = _RECORD.pack(job, call, function, time.monotonic(), deadline)
        self._memory[:_SIZE] = data
        self._memory[_SIZE:] = data

    def read(self) -> Call | None:
        """The call; None where it is being written at the moment."""
        second, first = self._memory[_SIZE:], self._memory[:_SIZE]
        return Call(*_RECORD.unpack(first)) if first == second else None
