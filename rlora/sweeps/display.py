"""Progress of a sweep: a table of its members on a terminal, otherwise one line per turn. Logs the turns."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rlora.run.run import Run
from rlora.sweeps.diary import append, complete_lines
from rlora.telemetry.metrics import evaluated, progress, sparkline

_log = logging.getLogger(__name__)

TURNS = "metrics.jsonl"


class Display:
    """An observer of all members' runs. Writes one line per turn to metrics.jsonl in `path`, the sweep's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.console = Console()
        self.live = Live(console=self.console, transient=True)
        self.latest: dict[str, Mapping[str, Any]] = {}  # metrics of each member's last step
        self.rewards: dict[str, list[float]] = {}
        self.turns = len(complete_lines(path / TURNS))
        self._busy = 0.0

    def begin(self) -> None:
        """Start the live table, if the output is a terminal."""
        if self.console.is_terminal:
            self.live.start()

    def end(self) -> None:
        """Stop the live table."""
        self.live.stop()

    def on_step(self, run: Run, figures: Mapping[str, Any]) -> None:
        """Record the metrics of a member's step."""
        self.latest[run.policy] = figures
        self.rewards.setdefault(run.policy, []).append(progress(figures) or 0.0)

    def turn(self, runs: Sequence[Run], due: Sequence[Run], seconds: float) -> None:
        """Log and show a turn of `seconds`, in which those of `runs` that are in `due` took a step."""
        stepped = [self.latest[run.policy] for run in due if run.policy in self.latest]
        tokens = sum(figures["completion/tokens"] or 0 for figures in stepped)
        learning = sum((figures["learner/busy"] or 0.0) * figures["time/step"] for figures in stepped)
        stats = runs[0].fleet.stats()
        busy, self._busy = max(0.0, stats.busy_seconds - self._busy), stats.busy_seconds
        line = {
            "turn": self.turns,
            "steps": {run.policy: run.number for run in due},
            "members": sum(run.is_open for run in runs),
            "time/turn": seconds,
            "completion/tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "engine/count": stats.engines,
            "engine/busy": busy / seconds,
            "learner/busy": learning / seconds,
        }
        append(self.path / TURNS, line)
        self.turns += 1
        self._show(runs, line)

    def _show(self, runs: Sequence[Run], line: Mapping[str, Any]) -> None:
        if self.console.is_terminal:
            self.live.update(self._table(runs))
            return
        steps = sorted(set(line["steps"].values()))
        span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        best = max(self.latest, key=lambda name: progress(self.latest[name]) or 0.0, default="")
        remaining = max((run.config.steps - run.number for run in runs if run.is_active), default=0) * line["time/turn"]
        text = f"{len(line['steps'])} members, {span}, {line['tokens_per_second']:.0f} tokens/s"
        reward = f", best {best} {progress(self.latest[best]) or 0.0:.3f}" if best else ""
        text += f"{reward}, time {line['time/turn']:.1f} s, left {remaining:.0f} s"
        _log.info("turn %s: %s", line["turn"], text)

    def _table(self, runs: Sequence[Run]) -> Table:
        is_rewarded = any(figures.get("reward/mean") is not None for figures in self.latest.values())
        figure = "reward" if is_rewarded else "log p or accuracy"
        table = Table("member", "step", figure, f"{figure} so far", "held out", "", box=None)
        for run in runs:
            figures = self.latest.get(run.policy, {})
            latest = progress(figures)
            held_out = evaluated(figures)
            ended = "failed" if run.failure else "done" if run.number >= run.config.steps else "left"
            table.add_row(
                run.policy,
                f"{run.number}/{run.config.steps}",
                "" if latest is None else f"{latest:.3f}",
                sparkline(self.rewards.get(run.policy, [0.0]), 24),
                "" if held_out is None else f"{held_out[1]:.3f}",
                "" if run.is_active else ended,
            )
        return table
