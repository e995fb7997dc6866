"""Where a config comes from: a file, Python, a run that goes on, or a version that is forked."""

from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from upath import UPath

from rlora.config import changed, flattened, read, read_table, validate
from rlora.plugin import give
from rlora.records import RloraError
from rlora.settings import Config
from rlora.store import read_file

Source = Config | Mapping[str, Any] | str | PathLike[str] | None


def split(source: str) -> tuple[UPath, int | None]:
    """RUN or RUN@STEP."""
    run, _, step = source.rpartition("@")
    return (reachable(run), int(step)) if run and step.isdigit() else (reachable(source), None)


def reachable(place: str | Path | UPath) -> UPath:
    """The path. Raises RloraError where fsspec does not know its protocol, or needs another package for it."""
    try:
        path = UPath(place)
        _ = path.fs
    except (ImportError, ValueError) as error:
        raise RloraError(f"{place}: {error}; install what that names, or give a local directory") from None
    return path


def read_run(run: UPath) -> Config:
    """The config of a run. Raises RloraError where no run is."""
    path = reachable(run) / "config.toml"
    if read_file(path) is None:
        raise RloraError(
            f"{run}: no run is there (it has no config.toml); name a directory that `rlora train` made, "
            "under runs/ or where --run-dir said"
        )
    return read(path)


def config_at(run: UPath, step: int | None) -> Config:
    """That of a version, or of the newest."""
    newest = read_run(run)  # or it says that no run is there
    if step is None:
        return newest
    from rlora.run.checkpoint import read_config  # which imports torch

    return read_config(run, step)


def given(
    source: Source, changes: Mapping[str, Any], resume: str | PathLike[str] | None = None, fork: str | None = None,
    least: Mapping[str, Any] | None = None,
) -> Config:  # fmt: skip
    """The config that a call from Python means: a TOML file's, a mapping's, or that of a run, with `changes`.

    `least` is what it has where nothing else is said. Raises RloraError that names each field at fault.
    """
    from rlora.run.source import config_at, reachable, read_run, split

    if bool(source) + bool(resume) + bool(fork) > 1:
        raise RloraError(
            "train: give one of a config, resume and fork; a run that goes on, or is forked, has its config"
        )
    file = ""
    if resume or fork:
        table = asdict(config_at(*split(fork)) if fork else read_run(reachable(str(resume))))
    elif isinstance(source, str | PathLike):
        table, file = read_table(Path(source)), f"{source}: "
    else:
        table = asdict(source) if isinstance(source, Config) else named(source or {})
    return validate(changed({**(least or {}), **table}, flattened(named(changes))), file)


def named(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with a spec in place of each object that is plugged in."""
    taken: list[str] = []

    def spec(field: str, plugged: Any) -> Any:
        if isinstance(plugged, str):
            return plugged
        taken.append(give(field, plugged, taken))
        return taken[-1]

    told = dict(changes)
    if "env" in told:
        told["env"] = spec("env", told["env"])
    if isinstance(told.get("reward"), list | tuple):
        told["reward"] = [spec("reward", each) for each in told["reward"]]
    elif "reward" in told:
        told["reward"] = spec("reward", told["reward"])
    if isinstance(algorithm := told.get("algorithm"), Mapping) and "name" in algorithm:
        told["algorithm"] = {**algorithm, "name": spec("algorithm.name", algorithm["name"])}
    return told
