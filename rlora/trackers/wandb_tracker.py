"""Weights & Biases tracker. Configured by WANDB_MODE, WANDB_ENTITY, WANDB_API_KEY and the like."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from rlora.trackers.tracker import Tracked


class Wandb:
    """A W&B run with the run's id. A resume continues it, and W&B ignores steps that it already has."""

    def __init__(self, tracked: Tracked, last: int) -> None:
        directory = None if tracked.is_far else tracked.directory  # None: W&B's default
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
        """Do nothing, because W&B writes in the background."""

    def finish(self, failed: bool, summary: Mapping[str, Any]) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=int(failed))
