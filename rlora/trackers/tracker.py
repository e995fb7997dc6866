"""The interface of trackers, and their construction by name."""

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
    """Name, directory and config of a run, for its trackers."""

    name: str  # of the run
    id: str  # unique id of the run
    directory: str  # of the run; trackers can write files there
    project: str  # `trackers.project`
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
    """Interface of an experiment tracker, which rlora constructs as `Tracker(tracked, last)` in a separate process.

    `last` is the number of the last step that the tracker received, -1 before the first. If a method raises an
    exception, rlora logs a warning, training continues, and the step is sent again later. The optional attribute
    `where` is printed at the start of a run: a URL, or the command that displays the metrics.
    """

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the metrics of a step: the numbers in its line of metrics.jsonl, by name."""
        ...

    def samples(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table of sampled completions. Each row has a value per column."""
        ...

    def flush(self) -> None:
        """Store everything that was logged so far. After this call rlora does not send these steps again."""
        ...

    def finish(self, failed: bool, summary: Mapping[str, Any]) -> None:
        """End the tracker's run. `failed` is whether an exception ended the training, `summary` is its summary.json."""
        ...


def make(name: str, tracked: Tracked, last: int) -> Tracker:
    """Construct a tracker. `name` is a key of `READY`, or a user's class: module:Name or path/to/file.py:Name.

    `last` is the number of the last step that the tracker received, -1 before the first. Raises RloraError if the
    tracker can't be imported, and any exception of the tracker's own constructor.
    """
    if ":" in name:
        custom: Tracker = load("trackers.use", name)(tracked, last)
        return custom
    try:
        tracker: Tracker = getattr(import_module(f"rlora.trackers.{name}_tracker"), READY[name])(tracked, last)
    except ImportError as error:
        raise RloraError(
            f"trackers.use = {name!r}: importing the tracker's package raised {type(error).__name__}: {error}; run "
            f"pip install 'rlora[{name}]', or remove {name!r} from trackers.use"
        ) from error
    return tracker
