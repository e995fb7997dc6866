"""Where a config comes from: a file, Python, a run that goes on, or a version that is forked."""

from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from upath import UPath

from rlora.config import changed, flattened, read, read_table, validate
from rlora.plugin import PYTHON, give
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
    """The config that a call from Python means: that of a TOML file, a mapping or a run, with `changes`.

    `least` holds the values of fields that are set nowhere else. Raises RloraError that names each field at fault.
    """
    if bool(source) + bool(resume) + bool(fork) > 1:
        raise RloraError("train: give one of a config, resume and fork; a run that exists brings its own config")
    file, before = "", dict[str, Any]()
    if resume or fork:
        table = before = asdict(config_at(*split(fork)) if fork else read_run(reachable(str(resume))))
    elif isinstance(source, str | PathLike):
        table, file = read_table(Path(source)), f"{source}: "
    else:
        table = plain(named(asdict(source) if isinstance(source, Config) else source or {}))
    changes = named(changes, before)
    if before:
        _refuse_what_is_gone(before, changes)
    return validate(changed({**(least or {}), **table}, flattened(plain(changes))), file)


def named(table: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields with a spec in place of each object; the one that it had `before`, in a run that goes on."""
    known = plugged(before or {})

    def spec(name: str, thing: Any) -> Any:
        if thing is None or isinstance(thing, str):
            return thing
        return give(thing, known[name] if known.get(name, "").startswith(PYTHON) else "")

    told = dict(table)
    if "env" in told:
        told["env"] = spec("env", told["env"])
    if isinstance(told.get("reward"), list | tuple):
        told["reward"] = [spec(f"reward.{number}", each) for number, each in enumerate(told["reward"])]
    elif "reward" in told:
        told["reward"] = spec("reward.0", told["reward"])
    if isinstance(algorithm := told.get("algorithm"), Mapping) and "name" in algorithm:
        told["algorithm"] = {**algorithm, "name": spec("algorithm.name", algorithm["name"])}
    return told


def plugged(table: Mapping[str, Any]) -> dict[str, str]:
    """What is plugged in by a config: the spec of each, by its field."""
    rewards = table.get("reward", ())
    rewards = [rewards] if isinstance(rewards, str) else rewards
    fields = {"env": table.get("env"), "algorithm.name": (table.get("algorithm") or {}).get("name")}
    fields |= {f"reward.{number}": each for number, each in enumerate(rewards)}
    return {name: spec for name, spec in fields.items() if isinstance(spec, str)}


def _refuse_what_is_gone(before: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Raise RloraError where a run was given an object that is not given again."""
    given_now = plugged(changes)
    for name, spec in plugged(before).items():
        field = name.partition(".")[0]
        if spec.startswith(PYTHON) and field not in {each.partition(".")[0] for each in given_now}:
            raise RloraError(
                f"{field} = {spec!r}: the run was given this object from Python; give it again, by {field}=..."
            )


def plain(table: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as plain data. Raises RloraError for what is none, such as an object that is no plug-in."""
    return {name: _plain(name, value) for name, value in table.items()}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(f"{name}.{key}", each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(name, each) for each in value]
    if isinstance(value, PathLike):
        return str(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of NumPy or torch
        return value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise RloraError(f"{name} = {value!r}: use text, a number, true or false, or a list of them")
