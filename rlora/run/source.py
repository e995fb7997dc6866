"""Where the config of a run comes from: the run itself, or the version that it is forked from."""

from pathlib import Path

from upath import UPath

from rlora.config import read
from rlora.records import RloraError
from rlora.settings import Config
from rlora.store import read_file


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
