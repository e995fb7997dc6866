"""The diary of a sweep: every decision, on the disk before it takes effect; and what was asked of it from outside."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlora.records import RloraError
from rlora.store import read_file

SWEEP, DIARY, WANTED = "sweep.toml", "sweep.jsonl", "wanted.jsonl"

Status = Literal["waiting", "running", "paused", "dropped", "failed", "finished"]
_STATUS: dict[str, Status] = {  # that a member has after an event
    "began": "running", "went on": "running", "paused": "paused", "dropped": "dropped", "failed": "failed",
    "finished": "finished", "forked": "waiting",
}  # fmt: skip


@dataclass(frozen=True)
class Fate:
    """What has become of a member."""

    status: Status = "waiting"
    step: int = 0  # at which it came to that
    why: str = ""


class Diary:
    """Appends lines to `<sweep>/sweep.jsonl`, a JSON object each, and says what those that are there come to."""

    def __init__(self, place: Path) -> None:
        self.path = place / DIARY
        self.lines = whole_lines(self.path)
        _cut(self.path)

    def note(self, event: str, member: str = "", step: int = 0, **facts: Any) -> None:
        """Write what is decided, or what has happened; it is on the disk when this returns."""
        line: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event}
        line |= ({"member": member, "step": step} if member else {}) | facts
        append(self.path, line)
        self.lines.append(line)

    @property
    def fates(self) -> dict[str, Fate]:
        """By member."""
        return fates(self.lines)

    @property
    def handled(self) -> int:
        """How many of the lines of `wanted.jsonl` were answered."""
        return max((line["request"] + 1 for line in self.lines if "request" in line), default=0)


def fates(lines: Iterable[Mapping[str, Any]]) -> dict[str, Fate]:
    """What has become of each member, by the lines of a diary."""
    found: dict[str, Fate] = {}
    for line in lines:
        event = line["event"]
        if event == "halved":
            why = f"halved at step {line['at']}"
            found |= {name: Fate("dropped", line["at"], why) for name in line["dropped"]}
        elif event in _STATUS:
            found[line["member"]] = Fate(_STATUS[event], line.get("step", 0), line.get("why", ""))
    return found


def ask(place: Path, what: str, member: str, **more: Any) -> None:
    """Leave word for a sweep. Raises RloraError where the member is unknown, or can't do that any more."""
    known = fates(whole_lines(place / DIARY))
    if member not in known:
        raise RloraError(f"{place}: there is no member {member}; there are {', '.join(sorted(known))}")
    fate = known[member]
    pointless = {
        "pause": ("finished", "dropped", "paused", "failed"),
        "go": ("finished", "running"),
        "drop": ("finished", "dropped"),
        "fork": ("waiting",),
    }
    if fate.status in pointless[what]:
        raise RloraError(f"{place}/{member}: it is {fate.status}, so there is nothing to {what}")
    append(place / WANTED, {"what": what, "member": member, **more})


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a file, on the disk; several processes may do so at the same time."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, json.dumps(line).encode() + b"\n")
        os.fsync(file)
    finally:
        os.close(file)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that are written to their end."""
    content = read_file(path) or b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines() if line.strip()]


def _cut(path: Path) -> None:
    """Take away a line that was cut off by a death, or the next one would be glued to it."""
    content = read_file(path) or b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
