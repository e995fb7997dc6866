"""Sources of a config: a TOML file, Python objects, a run to resume, or a version to fork."""

from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from upath import UPath

from rlora.config import changed, flattened, read, read_table, validate
from rlora.plugin import PYTHON, register
from rlora.records import RloraError
from rlora.settings import Config
from rlora.store import read_file

RunPath = str | PathLike[str] | UPath | None
Source = Config | Mapping[str, Any] | str | PathLike[str] | None  # text and paths name a TOML file


def split(source: str) -> tuple[UPath, int | None]:
    """Split RUN or RUN@STEP into the run's path and the number of the version, which is None for RUN."""
    run, _, step = source.rpartition("@")
    return (reachable(run), int(step)) if run and step.isdigit() else (reachable(source), None)


def reachable(path: str | PathLike[str] | UPath) -> UPath:
    """Convert a path or URL to UPath. Raises RloraError if fsspec does not support the protocol, or lacks a package."""
    try:
        upath = UPath(path)
        _ = upath.fs
    except (ImportError, ValueError) as error:
        raise RloraError(f"{path}: {error}; install the missing package, or use a local directory") from None
    return upath


def read_run(run: UPath) -> Config:
    """Read the config of a run. Raises RloraError if the directory has no config.toml."""
    path = reachable(run) / "config.toml"
    if read_file(path) is None:
        raise RloraError(
            f"{run}: not the directory of a run (no config.toml); use a directory that `rlora train` created, in runs/ "
            "or as --run-dir"
        )
    return read(path)


def config_at(run: UPath, step: int | None) -> Config:
    """Read the config that version `step` was trained under, or the run's current config if `step` is None."""
    current = read_run(run)  # raises for a directory without a run
    if step is None:
        return current
    from rlora.run.checkpoint import read_config  # imports torch

    return read_config(run, step)


def resolve_config(
    source: Source, changes: Mapping[str, Any], resume: RunPath = None, fork: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Config:  # fmt: skip
    """Build the config of a call from Python: the config of `source`, `resume` or `fork`, with `changes`.

    `resume` is the directory of a run, `fork` is RUN or RUN@STEP; at most one of the three is set. `defaults` apply to
    fields that are set nowhere else. Raises RloraError that names each invalid field.
    """
    if bool(source) + bool(resume) + bool(fork) > 1:
        raise RloraError(
            "train: an existing run has its own config, and either continues or is forked; use only one of config, "
            "resume and fork"
        )
    file, previous = "", dict[str, Any]()
    if fork or resume:
        table = previous = asdict(config_at(*split(fork)) if fork else read_run(reachable(resume or "")))
    elif isinstance(source, str | PathLike):
        table, file = read_table(Path(source)), f"{source}: "
    else:
        table = plain_data(with_specs(asdict(source) if isinstance(source, Config) else source or {}))
    changes = with_specs(changes, previous)
    if previous:
        _check_objects(previous, changes)
    return validate(changed({**(defaults or {}), **table}, flattened(plain_data(changes))), file)


def with_specs(table: Mapping[str, Any], previous: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Replace each plug-in object in a config's table by a spec, a text such as module:name or python:NAME.

    `previous` is the config of a resumed run: an object that replaces a python:NAME there gets the same spec.
    """
    previous_specs = plugin_specs(previous or {})

    def spec(name: str, plugin: Any) -> Any:
        if plugin is None or isinstance(plugin, str):
            return plugin
        return register(plugin, previous_specs[name] if previous_specs.get(name, "").startswith(PYTHON) else "")

    result = dict(table)
    if "env" in result:
        result["env"] = spec("env", result["env"])
    if isinstance(result.get("reward"), list | tuple):
        result["reward"] = [spec(f"reward.{number}", reward) for number, reward in enumerate(result["reward"])]
    elif "reward" in result:
        result["reward"] = spec("reward.0", result["reward"])
    if isinstance(algorithm := result.get("algorithm"), Mapping) and "name" in algorithm:
        result["algorithm"] = {**algorithm, "name": spec("algorithm.name", algorithm["name"])}
    return result


def plugin_specs(table: Mapping[str, Any]) -> dict[str, str]:
    """Return the specs of the plug-ins in a config, by field: env, algorithm.name, reward.0, reward.1, ..."""
    rewards = table.get("reward", ())
    rewards = [rewards] if isinstance(rewards, str) else rewards
    fields = {"env": table.get("env"), "algorithm.name": (table.get("algorithm") or {}).get("name")}
    fields |= {f"reward.{number}": reward for number, reward in enumerate(rewards)}
    return {name: spec for name, spec in fields.items() if isinstance(spec, str)}


def _check_objects(previous: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Raise RloraError if the run got an object from Python that `changes` does not pass again."""
    passed = {name.partition(".")[0] for name in plugin_specs(changes)}
    for name, spec in plugin_specs(previous).items():
        field = name.partition(".")[0]
        if spec.startswith(PYTHON) and field not in passed:
            raise RloraError(
                f"{field} = {spec!r}: it was passed from Python; pass the object again, as in "
                f"rlora.train(resume=..., {field}=...)"
            )


def plain_data(table: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the values of a table to text, numbers, booleans, lists and mappings.

    Raises RloraError for a value of any other type.
    """
    return {name: _plain_value(name, value) for name, value in table.items()}


def _plain_value(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_value(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain_value(name, item) for item in value]
    if isinstance(value, PathLike):
        return str(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a NumPy or torch scalar
        return value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise RloraError(f"{name} = {value!r}: use text, a number, true or false, or a list of them")
