"""What a run tells: one JSON object a step in metrics.jsonl, and a live display of the same figures."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from rlora import machine
from rlora.records import STATUSES, Adapter, Group, Receipt, SaveStats, UpdateStats
from rlora.rollout.requests import FleetStats
from rlora.rollout.stream import Collection
from rlora.telemetry.bottleneck import advice, bottleneck

_SHOWN = {  # in a line of progress: label and format
    "reward/mean": ("reward", "{:.3f}"),
    "completion/length": ("length", "{:.1f} tokens"),
    "rollout/tokens_per_second": ("engine", "{:.0f} tokens/s"),
    "learner/tokens_per_second": ("learner", "{:.0f} tokens/s"),
    "kl/behaviour": ("KL", "{:.5f}"),
}
_FAILED = {"status/error": "errors", "status/timeout": "timeouts"}  # shown where there are any
_BARS = " ▁▂▃▄▅▆▇█"


def summarise(groups: Sequence[Group], version: int) -> dict[str, float | None]:
    """Figures of a step's episodes; `version` is the one that the update starts from."""
    episodes = [episode for group in groups for episode in group.episodes]
    rewards = [reward for group in groups for reward in group.rewards]
    parts = sorted({name for episode in episodes for name in episode.parts})
    return {
        "reward/mean": fmean(rewards) if rewards else None,
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
    }


class Metrics:
    """Makes one line per step, and shows progress: live on a terminal, as plain lines elsewhere.

    With a `name`, which tells several runs apart, progress is plain lines; where it `is_quiet` none are shown.
    """

    def __init__(self, steps: int, name: str = "", is_quiet: bool = False) -> None:
        self.steps, self.name, self.is_quiet = steps, name, is_quiet
        self.console = Console()
        self.live = Live(console=self.console, transient=True)
        self.seconds: dict[str, float] = {}  # by phase, of the step under way
        self.rewards: list[float] = []
        self._advised: set[str] = set()  # bottlenecks whose settings were named
        self.entered = time.perf_counter()

    def __enter__(self) -> "Metrics":
        if self.is_live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    @property
    def is_live(self) -> bool:
        """Whether figures are shown in place."""
        return self.console.is_terminal and not self.name

    def start(self, step: int, fleet: FleetStats) -> None:
        """Begin at `step`, with what the fleet has done so far."""
        self.first_step, self.began, self.lapped = step, time.perf_counter(), time.perf_counter()
        self.busy_seconds = fleet.busy_seconds

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the time within as `time/<phase>` of the step under way."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start

    def log(
        self,
        step: int,
        proofs: Sequence[Receipt],
        collection: Collection,
        update: UpdateStats,
        fleet: FleetStats,
        saved: SaveStats | None,
        made: Adapter,
        others: Mapping[str, float | None],
    ) -> dict[str, Any]:
        """Show the figures of a step that made an adapter, and return them and `others` (docs/metrics.md)."""
        now = time.perf_counter()
        whole, sampling = now - self.lapped, fleet.busy_seconds - self.busy_seconds
        self.lapped, self.busy_seconds = now, fleet.busy_seconds
        figures = summarise(collection.sampled, step) | {
            "loss": update.loss,
            "grad/norm": update.grad_norm,
            "lr": update.lr,
            "kl/behaviour": update.kl_behaviour,
            "kl/update": update.kl_update,
            "kl/reference": update.kl_reference,
            "ratio/truncated": update.ratio_truncated,
            "ratio/clipped": update.clipped,
            "entropy": update.entropy,
            **{f"objective/{name}": value for name, value in update.others.items()},
            "critic/loss": update.value_loss,
            "critic/explained_variance": update.explained_variance,
            "update/minibatches": update.minibatches,
            "update/skipped": update.skipped_in_a_row > 0,
            "rollout/late": collection.late,
            "rollout/stale": collection.stale,
            "rollout/replayed": fleet.replayed,
            "engine/count": fleet.engines,
            "engine/lost": fleet.lost,
            "engine/busy": sampling / whole if sampling > 0 else None,
            "learner/busy": update.seconds / whole,
            "swap/load": max((proof.load_seconds for proof in proofs), default=None),
            "swap/proof": max((proof.proof_seconds for proof in proofs), default=None),
            "swap/canary": fleet.canaries.get(made.policy),
            **{f"time/{phase}": seconds for phase, seconds in self.seconds.items()},
            "time/sampling": sampling if sampling > 0 else None,  # 0: no engine answered
            "time/reward": collection.reward_seconds,
            "time/stragglers": collection.straggler_seconds,
            "checkpoint/seconds": saved.seconds if saved else None,
            "checkpoint/bytes": saved.bytes if saved else None,
            "memory/driver": machine.own_bytes(),
            "memory/learner": update.own_bytes,
            "time/step": whole,
            **others,
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
        return {"step": step, "adapter": made.digest, **finite}

    def totals(self) -> dict[str, float]:
        """Seconds of this process's training and of all of it so far, start of the actors and evaluation included."""
        now = time.perf_counter()
        return {"time/train": self.lapped - self.began, "time/total": now - self.entered}

    def tell(self, text: str) -> None:
        """Print a line, with the run's name where there are several."""
        print(f"{self.name}: {text}" if self.name else text, flush=True)

    def _show(self, step: int, figures: Mapping[str, float | None], slowest: tuple[str, float] | None) -> None:
        self.rewards.append(figures["reward/mean"] or 0.0)
        if self.is_quiet:
            return
        left = (time.perf_counter() - self.began) / (step + 1 - self.first_step) * (self.steps - step - 1)
        shown = {
            label: form.format(value)
            for name, (label, form) in _SHOWN.items()
            if (value := figures.get(name)) is not None
        }
        shown |= {label: f"{share:.0%}" for name, label in _FAILED.items() if (share := figures.get(name))}
        shown |= {"time": f"{figures['time/step']:.1f} s", "left": f"{left:.0f} s"}
        if slowest:
            shown["bottleneck"] = "{} {:.0%}".format(*slowest)
        if self.is_live:
            self.live.update(self._table(step, shown))
        else:
            self.tell(f"step {step + 1}/{self.steps}: {', '.join(f'{name} {value}' for name, value in shown.items())}")
        if slowest and slowest[0] not in self._advised:
            self._advised.add(slowest[0])
            self.tell(f"bottleneck {slowest[0]}: to shorten the step, change {advice(slowest[0])}")

    def _table(self, step: int, shown: Mapping[str, str]) -> Table:
        table = Table(title=f"step {step + 1} of {self.steps}", show_header=False)
        for label, value in shown.items():
            table.add_row(label, value)
        table.add_row("reward so far", sparkline(self.rewards))
        return table


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last `width` values as bars between the least and the greatest of them."""
    tail = values[-width:]
    low, high = min(tail), max(tail)
    return "".join(_BARS[1 + round((value - low) / (high - low or 1) * (len(_BARS) - 2))] for value in tail)
