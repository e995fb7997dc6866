"""Event log of a sweep (sweep.jsonl), written before each decision takes effect, and user requests (wanted.jsonl)."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

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
    """Status of a member of a sweep, according to the events of the diary."""

    status: Status = "waiting"
    step: int = 0  # completed steps at the event that set the status
    reason: str = ""  # why the member has this status; empty if nothing was noted


class Diary:
    """Append-only event log in `<sweep>/sweep.jsonl`, one JSON object per line."""

    def __init__(self, sweep: Path) -> None:
        self.path = sweep / DIARY
        self.lines = complete_lines(self.path)
        _truncate_partial(self.path)

    def note(self, event: str, member: str = "", step: int = 0, **facts: Any) -> None:
        """Append an event, and flush it to disk before returning.

        `member` is the member's name and `step` its completed steps, for an event of a member. `facts` are further
        fields of the line.
        """
        line: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event}
        line |= ({"member": member, "step": step} if member else {}) | facts
        append(self.path, line)
        self.lines.append(line)

    @property
    def states(self) -> dict[str, MemberState]:
        """Status of each member, by name."""
        return member_states(self.lines)

    @property
    def handled(self) -> int:
        """Number of lines of `wanted.jsonl` that the sweep has answered."""
        return max((line["request"] + 1 for line in self.lines if "request" in line), default=0)


def member_states(lines: Iterable[Mapping[str, Any]]) -> dict[str, MemberState]:
    """Return the status of each member, by name, from the events of a diary."""
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
    """Append a request to `wanted.jsonl` of the directory `sweep`, which the sweep carries out in its next turn.

    `action` is pause, go, drop or fork; a fork has the `arguments` version, name and changes. Raises RloraError if the
    diary has no such member, or if the member's status does not permit the action.
    """
    states = member_states(complete_lines(sweep / DIARY))
    if member not in states:
        names = ", ".join(sorted(states)) or "none"
        raise RloraError(
            f"{sweep}: there is no member {member}, or the member has not begun yet; use one of the members {names}"
        )
    status = states[member].status
    impossible = {
        "pause": ("finished", "dropped", "paused", "failed"),
        "go": ("finished", "running"),
        "drop": ("finished", "dropped"),
        "fork": ("waiting",),
    }
    if status in impossible[action]:
        possible = " or ".join(name for name in get_args(Status) if name not in impossible[action])
        raise RloraError(
            f"{sweep}/{member}: the member is {status}, so `rlora {action}` is not possible; the command needs a "
            f"member that is {possible} (`rlora runs {sweep}` lists the members)"
        )
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
    """Return the parsed lines of a file, without a last line that a crash cut off; empty if there is no file."""
    content = read_file(path) or b""
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines() if line.strip()]


def _truncate_partial(path: Path) -> None:
    """Remove a last line that a crash cut off, because the next line would be appended to it."""
    content = read_file(path) or b""
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(path, complete)
