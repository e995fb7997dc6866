"""The tracker interface, and how trackers are built by name."""

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
    """Information about a run for its trackers."""

    name: str  # of the run
    id: str  # unique id of the run
    directory: str  # of the run; trackers may write files there
    project: str
    config: Mapping[str, Any] = field(default_factory=dict)  # the run's config, as tables

    @property
    def is_far(self) -> bool:
        """Whether the run is at a URL."""
        return "://" in self.directory

    @property
    def flat(self) -> dict[str, Any]:
        """The config by full field names, each value a number or text."""
        return {
            name: value if isinstance(value, str | int | float) else json.dumps(value)
            for name, value in by_full_names(self.config).items()
        }


class Tracker(Protocol):
    """Built as `Tracker(tracked, last)`, where `last` is the last step that it received, -1 before the first.

    Runs in a separate process. If it raises an exception, training continues, and the step is sent again later. The
    optional attribute `where` is printed at the start of a run: a URL, or the command that shows the metrics.
    """

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the numbers of a line of metrics.jsonl."""
        ...

    def samples(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table of sampled completions."""
        ...

    def flush(self) -> None:
        """Store everything that was logged so far."""
        ...

    def finish(self, failed: bool, summary: Mapping[str, Any]) -> None:
        """End the run. `failed`: whether an exception ended it; `summary`: its summary.json."""
        ...


def make(name: str, tracked: Tracked, last: int) -> Tracker:
    """Build a ready tracker by name, or the user's class module:Name or path/to/file.py:Name.

    Raises RloraError if its package is not installed.
    """
    if ":" in name:
        custom: Tracker = load("trackers.use", name)(tracked, last)
        return custom
    try:
        tracker: Tracker = getattr(import_module(f"rlora.trackers.{name}_tracker"), READY[name])(tracked, last)
    except ImportError as error:
        raise RloraError(
            f"trackers.use = {name!r}: {error}; install it with pip install 'rlora[{name}]', or remove the tracker"
        ) from error
    return tracker
