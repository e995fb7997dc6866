"""MLflow. MLFLOW_TRACKING_URI and the like are its own; the project is its experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.time import get_current_time_millis

from rlora.trackers.tracker import Tracked

_AT_ONCE = 100  # parameters that one request may hold


class MLflow:
    """A run of MLflow, found again by the id of the run: a resume continues it."""

    def __init__(self, tracked: Tracked, last: int) -> None:
        self.client = MlflowClient()
        self.where = f"mlflow ui --backend-store-uri {self.client.tracking_uri}"
        experiment = self.client.get_experiment_by_name(tracked.project)
        where = experiment.experiment_id if experiment else self.client.create_experiment(tracked.project)
        found = self.client.search_runs([where], f"tags.`rlora.id` = '{tracked.id}'")
        tags = {"rlora.id": tracked.id}
        self.id = (found[0] if found else self.client.create_run(where, run_name=tracked.name, tags=tags)).info.run_id
        self.client.set_terminated(self.id, "RUNNING")
        flat = {name: str(value)[:6000] for name, value in tracked.flat.items()}
        before = found[0].data.params if found else {}
        params = [Param(name, value) for name, value in flat.items() if name not in before]
        for start in range(0, len(params), _AT_ONCE):
            self.client.log_batch(self.id, params=params[start : start + _AT_ONCE])
        for name, value in flat.items():  # a parameter never changes in MLflow, and a resume may change a field
            if before.get(name, value) != value:
                self.client.set_tag(self.id, f"changed.{name}", value)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        now = get_current_time_millis()
        self.client.log_batch(self.id, [Metric(name, value, now, step) for name, value in figures.items()])

    def samples(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        table = {name: [row[place] for row in rows] for place, name in enumerate(columns)}
        self.client.log_table(self.id, table, f"samples/{step:06d}.json")

    def flush(self) -> None:
        """Each request has come back."""

    def finish(self, failed: bool, summary: Mapping[str, Any]) -> None:
        self.client.log_batch(self.id, tags=[RunTag(name, str(value)[:5000]) for name, value in summary.items()])
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")
