"""What a tracker is, and how one is found."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from rlora.config import by_full_names
from rlora.plugin import load
from rlora.records import RloraError

READY = {"wandb": "Wandb", "tensorboard": "TensorBoard", "trackio": "Trackio", "mlflow": "MLflow"}


@dataclass(frozen=True)
class Tracked:
    """A run, as a tracker is told of it."""

    name: str  # of the run
    id: str  # that no other run has
    directory: str  # of the run, where a tracker may keep files
    project: str
    config: Mapping[str, Any] = field(default_factory=dict)  # the run's tables of settings

    @property
    def is_far(self) -> bool:
        """Whether the run is at a URL."""
        return "://" in self.directory

    @property
    def flat(self) -> dict[str, Any]:
        """The settings by their full names, each a number or text."""
        return {
            name: value if isinstance(value, str | int | float) else json.dumps(value)
            for name, value in by_full_names(self.config).items()
        }


class Tracker(Protocol):
    """Built as `Tracker(tracked, last)`, where `last` is the step that it was told of last, -1 before the first.

    It runs in a process of its own. Where it raises, training goes on, and it is asked again later. An attribute
    `where`, if it has one, is printed at the start of a run: a URL, or the command that shows the figures.
    """

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the numbers of a line of metrics.jsonl."""
        ...

    def samples(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Take a table of sampled completions."""
        ...

    def flush(self) -> None:
        """Have what was taken where it stays."""
        ...

    def finish(self, failed: bool, summary: Mapping[str, Any]) -> None:
        """End; `summary` is summary.json."""
        ...


def make(name: str, tracked: Tracked, last: int) -> Tracker:
    """One of the ready trackers, or a class of the user's own, module:Name or path/to/file.py:Name.

    Raises RloraError where its package is not installed.
    """
    if ":" in name:
        own: Tracker = load("trackers.use", name)(tracked, last)
        return own
    try:
        made: Tracker = getattr(import_module(f"rlora.trackers.{name}_tracker"), READY[name])(tracked, last)
    except ImportError as error:
        raise RloraError(
            f"trackers.use = {name!r}: {error}; install it by pip install 'rlora[{name}]', or leave the tracker out"
        ) from error
    return made
