"""Metrics of a training step, as a line of metrics.jsonl and as progress on the console."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean, pstdev
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rlora import machine
from rlora.records import STATUSES, Adapter, Group, Receipt, SaveStats, UpdateStats
from rlora.rollout.requests import FleetStats
from rlora.rollout.stream import Collection
from rlora.rollout.toolset import tool_metrics
from rlora.telemetry.bottleneck import advice, bottleneck

_log = logging.getLogger(__name__)

_SHOWN = {  # metrics in a progress line: label and format
    "reward/mean": ("reward", "{:.3f}"),
    "completion/length": ("length", "{:.1f} tokens"),
    "rollout/tokens_per_second": ("engine", "{:.0f} tokens/s"),
    "learner/tokens_per_second": ("learner", "{:.0f} tokens/s"),
    "kl/behaviour": ("KL", "{:.5f}"),
    "objective/nll": ("nll", "{:.4f}"),
    "objective/accuracy": ("accuracy", "{:.3f}"),
}
_FAILED = {"status/error": "errors", "status/timeout": "timeouts"}  # shown if above 0
_BARS = " ▁▂▃▄▅▆▇█"


def summarise(groups: Sequence[Group], version: int) -> dict[str, float | None]:
    """Compute the metrics of a step's episodes, by name (docs/metrics.md).

    `groups` must not be empty. `version` is the number of the version that the update starts from.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    rewards = [reward for group in groups for reward in group.rewards]
    parts = sorted({name for episode in episodes for name in episode.parts})
    return {
        "reward/mean": fmean(rewards) if rewards else None,
        "reward/std": pstdev(rewards) if rewards else None,
        "reward/max": max(rewards, default=None),
        "reward/min": min(rewards, default=None),
        **{f"status/{name}": fmean(episode.status == name for episode in episodes) for name in STATUSES},
        **{f"reward/{name}": fmean(e.parts[name] for e in episodes if name in e.parts) for name in parts},
        "reward/informative_groups": fmean(group.informative for group in groups),
        "completion/length": fmean(episode.sampled_tokens for episode in episodes),
        "completion/truncated": fmean(episode.finish_reason != "stop" for episode in episodes),
        "completion/tokens": sum(episode.sampled_tokens for episode in episodes),
        "completion/env_tokens": sum(len(episode.completion_ids) - episode.sampled_tokens for episode in episodes),
        "staleness": fmean(version - episode.version.number for episode in episodes),
        **(tool_metrics(episodes) if groups[0].prompt.tools else {}),
    }


def summarise_given(groups: Sequence[Group]) -> dict[str, float | None]:
    """Compute the metrics of a step's given completions: those of `summarise`, where rewards and staleness are None."""
    episodes = [replace(episode, reward=None) for group in groups for episode in group.episodes]
    figures = summarise([Group(groups[0].prompt, tuple(episodes))], version=0)
    return figures | {"reward/informative_groups": None, "staleness": None}


def progress(line: Mapping[str, Any]) -> float | None:
    """Return the figure of a step that rises as a policy learns: the mean reward; without rewards the share of pairs
    that are in the right order, or the log-likelihood per token. None if the step has none of these."""
    nll = line.get("objective/nll")
    figures = (line.get("reward/mean"), line.get("objective/accuracy"), None if nll is None else -nll)
    return next((figure for figure in figures if figure is not None), None)


def evaluated(line: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the metric of an evaluation that ended in a step, and its value: the accuracy on held-out prompts or
    pairs, or of SFT `held_out/nll`, where lower is better. None if no evaluation ended."""
    names = ("accuracy/held_out", "held_out/accuracy", "held_out/nll")
    return next(((name, line[name]) for name in names if line.get(name) is not None), None)


class Metrics:
    """Builds the metrics of each step and prints progress: updated in place on a terminal, otherwise as lines.

    `steps` is the total number of training steps. `name` is the prefix of lines if several runs train together;
    progress is then always printed as lines. `is_quiet` turns progress off. Used as a context, which ends the display.
    """

    def __init__(self, steps: int, name: str = "", is_quiet: bool = False) -> None:
        self.steps, self.name, self.is_quiet = steps, name, is_quiet
        self.console = Console()
        self.live = Live(console=self.console, transient=True)
        self.seconds: dict[str, float] = {}  # by phase of the current step
        self.rewards: list[float] = []
        self._advised: set[str] = set()  # bottlenecks whose settings were printed
        self.entered = time.perf_counter()

    def __enter__(self) -> "Metrics":
        if self.is_live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    @property
    def is_live(self) -> bool:
        """Whether progress is one display on the terminal that is overwritten, instead of one line per step."""
        return self.console.is_terminal and not self.name

    def start(self, step: int, fleet: FleetStats) -> None:
        """Start timing at step number `step`. `fleet` are the statistics of the engines so far."""
        self.first_step, self.started, self.lapped = step, time.perf_counter(), time.perf_counter()
        self.fleet = fleet

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Record the time within the context in seconds, as `time/<phase>` of the current step."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start

    def log(
        self, step: int, receipts: Sequence[Receipt], collection: Collection, update: UpdateStats, fleet: FleetStats,
        saved: SaveStats | None, adapter: Adapter, extra: Mapping[str, float | None],
    ) -> dict[str, Any]:  # fmt: skip
        """Print progress, and return the line of metrics.jsonl for the step that made `adapter` (docs/metrics.md).

        `receipts` are those of the version that was delivered last, `collection` has the step's groups, `fleet` are the
        statistics of the engines since their start, `saved` describes the last checkpoint that was written. `extra`
        metrics are added. Metrics that are not finite become None.
        """
        now = time.perf_counter()
        total, sampling = now - self.lapped, fleet.busy_seconds - self.fleet.busy_seconds
        kv, queued = fleet.kv_seconds - self.fleet.kv_seconds, fleet.queued_seconds - self.fleet.queued_seconds
        self.lapped, self.fleet = now, fleet
        figures = summarise(collection.sampled, step) if collection.sampled else summarise_given(collection.groups)
        figures |= {
            "loss": update.loss,
            "grad/norm": update.grad_norm,
            "lr": update.lr,
            "kl/behaviour": update.kl_behaviour,
            "kl/update": update.kl_update,
            "kl/reference": update.kl_reference,
            "ratio/truncated": update.ratio_truncated,
            "ratio/clipped": update.clipped,
            "entropy": update.entropy,
            **{f"objective/{name}": value for name, value in update.objective_metrics.items()},
            "critic/loss": update.value_loss,
            "critic/explained_variance": update.explained_variance,
            "update/minibatches": update.minibatches,
            "update/skipped": update.skipped_in_a_row > 0,
            "rollout/late": collection.late,
            "rollout/stale": collection.stale,
            "rollout/replayed": fleet.replayed,
            "engine/count": fleet.engines,
            "engine/lost": fleet.lost,
            "engine/busy": sampling / total if sampling > 0 else None,
            "engine/kv": kv / sampling if sampling > 0 else None,
            "learner/busy": update.seconds / total,
            "swap/load": max((receipt.load_seconds for receipt in receipts), default=None),
            "swap/proof": max((receipt.proof_seconds for receipt in receipts), default=None),
            "swap/canary": fleet.canaries.get(adapter.policy),
            **{f"time/{phase}": seconds for phase, seconds in self.seconds.items()},
            **{f"time/update/{part}": update.parts.get(part) for part in ("passes", "gradient", "adam")},
            "time/queue": queued if sampling > 0 else None,
            "time/sampling": sampling if sampling > 0 else None,  # 0 if no engine reported
            "time/reward": collection.reward_seconds,
            "time/stragglers": collection.straggler_seconds,
            "checkpoint/seconds": saved.seconds if saved else None,
            "checkpoint/bytes": saved.bytes if saved else None,
            "memory/driver": machine.private_bytes(),
            "memory/learner": update.private_bytes,
            "time/step": total,
            **extra,
        }
        tokens = figures["completion/tokens"] or 0
        figures["rollout/tokens_per_second"] = tokens / sampling if sampling > 0 else None
        figures["learner/tokens_per_second"] = update.tokens / update.seconds if update.tokens else None
        finite: dict[str, Any] = {
            name: value if value is None or math.isfinite(value) else None for name, value in figures.items()
        }
        slowest = bottleneck(finite)
        self._show(step, finite, slowest)
        if slowest:
            finite["bottleneck"], finite["bottleneck/share"] = slowest
        return {"step": step, "adapter": adapter.digest, **finite}

    def totals(self) -> dict[str, float]:
        """Return the seconds of training in this process as `time/train`, and `time/total` since the construction.

        The total includes the start of actors and evaluations.
        """
        now = time.perf_counter()
        return {"time/train": self.lapped - self.started, "time/total": now - self.entered}

    def log_line(self, text: str) -> None:
        """Print a line, with the run's name if several runs train together."""
        _log.info("%s", f"{self.name}: {text}" if self.name else text)

    def _show(self, step: int, figures: Mapping[str, float | None], slowest: tuple[str, float] | None) -> None:
        self.rewards.append(figures["reward/mean"] or 0.0)
        if self.is_quiet:
            return
        remaining = (time.perf_counter() - self.started) / (step + 1 - self.first_step) * (self.steps - step - 1)
        shown = {
            label: form.format(value)
            for name, (label, form) in _SHOWN.items()
            if (value := figures.get(name)) is not None
        }
        shown |= {label: f"{share:.0%}" for name, label in _FAILED.items() if (share := figures.get(name))}
        shown |= {"time": f"{figures['time/step']:.1f} s", "left": f"{remaining:.0f} s"}
        if slowest:
            shown["bottleneck"] = "{} {:.0%}".format(*slowest)
        if self.is_live:
            self.live.update(self._table(step, shown))
        else:
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.log_line(f"step {step + 1}/{self.steps}: {values}")
        if slowest and slowest[0] not in self._advised:
            self._advised.add(slowest[0])
            self.log_line(f"bottleneck {slowest[0]}: to shorten the step, change {advice(slowest[0])}")

    def _table(self, step: int, shown: Mapping[str, str]) -> Table:
        table = Table(title=f"step {step + 1} of {self.steps}", show_header=False)
        for label, value in shown.items():
            table.add_row(label, value)
        table.add_row("reward so far", sparkline(self.rewards))
        return table


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return a bar chart of the last `width` values in one line, scaled between their minimum and maximum.

    `values` must not be empty.
    """
    tail = values[-width:]
    low, high = min(tail), max(tail)
    return "".join(_BARS[1 + round((value - low) / (high - low or 1) * (len(_BARS) - 2))] for value in tail)
