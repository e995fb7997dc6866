"""TensorBoard tracker. Event files go to the run's directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rlora.records import RloraError
from rlora.trackers.tracker import Tracked


class TensorBoard:
    """Writes event files to <run>/tensorboard. On a resume, `purge_step` hides steps that are logged twice."""

    def __init__(self, tracked: Tracked, last: int) -> None:
        if tracked.is_far:
            raise RloraError(
                f"trackers.use = 'tensorboard': it writes to a local directory, but the run is at {tracked.directory}; "
                "use a different tracker, or a local --run-dir"
            )
        directory = Path(tracked.directory) / "tensorboard"
        self.where = f"tensorboard --logdir {directory}"
        self.writer = SummaryWriter(str(directory), purge_step=last + 1)
        table = "\n".join(f"| {name} | {value} |" for name, value in tracked.flat.items())
        self.writer.add_text("config", f"| field | value |\n|---|---|\n{table}", last + 1)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += [
            "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
        ]
        self.writer.add_text("samples", "\n".join(lines), step)

    def flush(self) -> None:
        self.writer.flush()

    def finish(self, failed: bool, summary: Mapping[str, Any]) -> None:
        self.writer.close()
