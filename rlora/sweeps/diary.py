"""Event log of a sweep (sweep.jsonl), written before each decision takes effect, and user requests (wanted.jsonl)."""

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
_STATUS: dict[str, Status] = {  # of a member, by its last event
    "began": "running", "went on": "running", "paused": "paused", "dropped": "dropped", "failed": "failed",
    "finished": "finished", "forked": "waiting",
}  # fmt: skip


@dataclass(frozen=True)
class MemberState:
    """Status of a member."""

    status: Status = "waiting"
    step: int = 0  # completed steps at the event that set the status
    reason: str = ""


class Diary:
    """Append-only event log in `<sweep>/sweep.jsonl`, one JSON object per line."""

    def __init__(self, sweep: Path) -> None:
        self.path = sweep / DIARY
        self.lines = complete_lines(self.path)
        _truncate_partial(self.path)

    def note(self, event: str, member: str = "", step: int = 0, **facts: Any) -> None:
        """Append an event. It is on disk when this returns."""
        line: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event}
        line |= ({"member": member, "step": step} if member else {}) | facts
        append(self.path, line)
        self.lines.append(line)

    @property
    def states(self) -> dict[str, MemberState]:
        """Status by member."""
        return member_states(self.lines)

    @property
    def handled(self) -> int:
        """Number of lines of `wanted.jsonl` that were answered."""
        return max((line["request"] + 1 for line in self.lines if "request" in line), default=0)


def member_states(lines: Iterable[Mapping[str, Any]]) -> dict[str, MemberState]:
    """Status of each member, from the events of a diary."""
    states: dict[str, MemberState] = {}
    for line in lines:
        event = line["event"]
        if event == "halved":
            reason = f"halved at step {line['at']}"
            states |= {name: MemberState("dropped", line["at"], reason) for name in line["dropped"]}
        elif event in _STATUS:
            states[line["member"]] = MemberState(_STATUS[event], line.get("step", 0), line.get("why", ""))
    return states


def ask(sweep: Path, action: str, member: str, **arguments: Any) -> None:
    """Request an action from a sweep: pause, go, drop or fork, with a fork's `arguments` version, name and changes.

    Raises RloraError if there is no such member, or if its status does not permit the action.
    """
    states = member_states(complete_lines(sweep / DIARY))
    if member not in states:
        raise RloraError(f"{sweep}: there is no member {member}; the members are {', '.join(sorted(states))}")
    status = states[member].status
    impossible = {
        "pause": ("finished", "dropped", "paused", "failed"),
        "go": ("finished", "running"),
        "drop": ("finished", "dropped"),
        "fork": ("waiting",),
    }
    if status in impossible[action]:
        raise RloraError(f"{sweep}/{member}: the member is {status}, so `rlora {action}` is not possible")
    append(sweep / WANTED, {"what": action, "member": member, **arguments})


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line to a file and fsync it. Several processes may append to the same file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, json.dumps(line).encode() + b"\n")
        os.fsync(file)
    finally:
        os.close(file)


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a file, parsed, without a last one that a crash cut off."""
    content = read_file(path) or b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines() if line.strip()]


def _truncate_partial(path: Path) -> None:
    """Remove a last line that a crash cut off, otherwise the next line would continue it."""
    content = read_file(path) or b""
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(path, complete)
