"""Whole commands of rlora as processes, and what they must not leave behind."""

import json
import re
import secrets
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOML = "launch/arithmetic.toml"
SHM = Path("/dev/shm")
SMALL = ("--prompts-per-step", "4", "--group-size", "4", "--evaluate.prompts", "4")
TOKEN = ("RLORA_TEST", secrets.token_hex(8))  # in the environment of each process that a test starts


def rlora(*arguments: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """Run `rlora ...` to its end."""
    command = [sys.executable, "-m", "rlora", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=900)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


_seen: set[int] = set()  # pids of processes that `processes` has found


def processes() -> dict[int, str]:
    """The processes that this test started, itself or through others: command lines by pid."""
    found = {int(path.name): line for path in Path("/proc").glob("[0-9]*") if (line := own(path))}
    _seen.update(found)
    return found


def orphans() -> dict[int, str]:
    """The files in RAM of such processes that are gone: names by pid."""
    named = {path.name: re.match(r"(?:rlora-|__KMP_REGISTERED_LIB_)(\d+)", path.name) for path in SHM.iterdir()}
    pids = {name: int(found[1]) for name, found in named.items() if found}
    return {pid: name for name, pid in pids.items() if pid in _seen and not Path(f"/proc/{pid}").exists()}


def own(process: Path) -> str:
    """The command line of a process that the test started, itself or through others; empty for another's."""
    try:
        environment = (process / "environ").read_bytes()
        line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        state, parent, *_ = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""  # it has ended meanwhile
    if "=".join(TOKEN).encode() in environment:
        return line[:100]
    if state != "Z" and line.startswith("ray::") and not environment.strip(b"\0"):  # Ray's title is written over it
        with suppress(OSError):
            above = process.with_name(parent)
            if b"raylet" in (above / "cmdline").read_bytes():
                return line if own(above) else ""
        return line if int(process.name) in _seen else ""  # its raylet is gone
    return ""
