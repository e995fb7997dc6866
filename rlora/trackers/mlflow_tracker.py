"""MLflow tracker, configured by MLFLOW_TRACKING_URI and the like. `trackers.project` is the experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.time import get_current_time_millis

from rlora.trackers.tracker import Tracked

_MAX_PARAMS = 100  # per request


class MLflow:
    """An MLflow run with the tag `rlora.id`, by which a resume finds and continues it."""

    def __init__(self, tracked: Tracked, last: int) -> None:
        self.client = MlflowClient()
        self.where = f"mlflow ui --backend-store-uri {self.client.tracking_uri}"
        experiment = self.client.get_experiment_by_name(tracked.project)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(tracked.project)
        runs = self.client.search_runs([experiment_id], f"tags.`rlora.id` = '{tracked.id}'")
        tags = {"rlora.id": tracked.id}
        run = runs[0] if runs else self.client.create_run(experiment_id, run_name=tracked.name, tags=tags)
        self.id = run.info.run_id
        self.client.set_terminated(self.id, "RUNNING")
        flat = {name: str(value)[:6000] for name, value in tracked.flat.items()}
        logged = runs[0].data.params if runs else {}
        params = [Param(name, value) for name, value in flat.items() if name not in logged]
        for start in range(0, len(params), _MAX_PARAMS):
            self.client.log_batch(self.id, params=params[start : start + _MAX_PARAMS])
        for name, value in flat.items():  # MLflow's parameters can't change, but a resume may change a field
            if logged.get(name, value) != value:
                self.client.set_tag(self.id, f"changed.{name}", value)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        now = get_current_time_millis()
        self.client.log_batch(self.id, [Metric(name, value, now, step) for name, value in figures.items()])

    def samples(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        table = {name: [row[index] for row in rows] for index, name in enumerate(columns)}
        self.client.log_table(self.id, table, f"samples/{step:06d}.json")

    def flush(self) -> None:
        """Do nothing, because every request is synchronous."""

    def finish(self, failed: bool, summary: Mapping[str, Any]) -> None:
        self.client.log_batch(self.id, tags=[RunTag(name, str(value)[:5000]) for name, value in summary.items()])
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")
