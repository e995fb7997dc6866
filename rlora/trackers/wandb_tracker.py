"""Weights & Biases. WANDB_MODE, WANDB_ENTITY, WANDB_API_KEY and the like are its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from rlora.trackers.tracker import Tracked


class Wandb:
    """A run of W&B with the id of the run: a resume continues it, and it takes no step twice."""

    def __init__(self, tracked: Tracked, last: int) -> None:
        directory = None if tracked.is_far else tracked.directory  # None: W&B's own choice
        self.run = wandb.init(
            project=tracked.project, name=tracked.name, id=tracked.id, resume="allow", dir=directory,
            config=dict(tracked.config), allow_val_change=True, settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self.where = self.run.url or f"offline; wandb sync {Path(self.run.dir).parent}"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def samples(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.run.log({"samples": wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def flush(self) -> None:
        """It writes on its own."""

    def finish(self, failed: bool, summary: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=int(failed))
