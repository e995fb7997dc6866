"""trackio tracker. Configured by TRACKIO_DIR and TRACKIO_SPACE_ID."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import trackio

from rlora.trackers.tracker import Tracked


class Trackio:
    """A trackio run, named by the run's name and id. A resume continues it."""

    def __init__(self, tracked: Tracked, last: int) -> None:
        self.run = trackio.init(
            project=tracked.project, name=f"{tracked.name}-{tracked.id[:6]}", config=tracked.flat, resume="allow",
            embed=False, auto_log_gpu=False, auto_log_cpu=False, space_id=os.environ.get("TRACKIO_SPACE_ID"),
        )  # fmt: skip
        self.where = f"trackio show --project {tracked.project}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def samples(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        table = trackio.Table(columns=list(columns), data=[list(row) for row in rows])
        self.run.log({"samples": table}, step=step)

    def flush(self) -> None:
        """Do nothing, because trackio writes in the background."""

    def finish(self, failed: bool, summary: Mapping[str, Any]) -> None:
        self.run.finish()
