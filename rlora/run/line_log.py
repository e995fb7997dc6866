"""A file of a run with one JSON object per step."""

import json
import logging
import os
from pathlib import Path

from upath import UPath

from rlora.records import RloraError
from rlora.run.directory import complete_lines
from rlora.store import write_file

_log = logging.getLogger(__name__)


class LineLog:
    """Appends lines to a file of a run, each exactly once and in the order of their steps.

    The constructor removes the lines of `step` and later steps, which run again, and a last line that a crash cut off.
    """

    def __init__(self, path: UPath, step: int) -> None:
        self.path, self.pending = path, b""  # lines that are not written yet
        kept = [line for line in complete_lines(path.parent, path.name) if _step_of(line, path) < step]
        content = "".join(f"{line}\n" for line in kept).encode()
        write_file(path, content)
        self._size = len(content)

    def add(self, line: str) -> None:
        """Add a line, which `write` writes; nothing if it is empty."""
        self.pending += f"{line}\n".encode() if line else b""

    def write(self) -> None:
        """Append the pending lines. If that fails, they remain pending, and a warning says so."""
        if not self.pending:
            return
        try:
            if not isinstance(self.path, Path):  # most object stores can't append
                write_file(self.path, self.path.read_bytes()[: self._size] + self.pending)
            else:
                with self.path.open("r+b") as file:
                    file.truncate(self._size)  # removes a partial line that a full disk left
                    file.seek(self._size)
                    file.write(self.pending)
                    file.flush()
                    os.fsync(file.fileno())
        except Exception as error:  # any file system of fsspec
            _log.warning(
                f"NOT SAVED: {self.path} could not be written ({error}); its lines will be written with the next step"
            )
            return
        self._size, self.pending = self._size + len(self.pending), b""


def _step_of(line: str, path: UPath) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise RloraError(f"{path}: a line is damaged ({error!r}): {line!r:.80}; remove the line") from error
