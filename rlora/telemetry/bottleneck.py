"""Phases of a step, its bottleneck, and the settings that affect it."""

from collections.abc import Mapping
from typing import Any

_SETTINGS = {
    "sampling": "engine.replicas, sampling.max_tokens, prompts_per_step, or max_staleness = 1 (sample during updates)",
    "stragglers": "engine.straggler_seconds, or a lower sampling.max_tokens",
    "rewards": "scoring.workers or scoring.replicas",
    "update": "learner.replicas, learner.microbatch_tokens or learner.threads",
    "swap": "engine.replicas, because the swap waits for every engine",
    "save": "the disk of --run-dir, or checkpoint.episodes_mib",
}


def bottleneck(figures: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the longest part of a step, and its share of the step's time (0 to 1).

    `figures` are the metrics of the step. Returns None without "time/step".
    """
    total = figures.get("time/step") or 0.0
    if total <= 0:
        return None
    parts = phases(figures)
    name = max(parts, key=lambda part: parts[part])
    return name, parts[name] / total


def phases(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds that the loop spent in each phase of a step, whose metrics are `figures`.

    The phases do not overlap. Work that overlaps another phase, such as sampling during an update, is not counted.
    """
    wait = figures.get("time/wait") or 0.0
    late = min(wait, figures.get("time/stragglers") or 0.0)
    idle = max(0.0, wait - (figures.get("time/sampling") or 0.0))  # no sampling left, but groups are incomplete
    rewards = min(idle, figures.get("time/reward") or 0.0, wait - late)
    return {
        "sampling": wait - late - rewards,
        "stragglers": late,
        "rewards": rewards,
        **{name: figures.get(f"time/{name}") or 0.0 for name in ("update", "swap", "save")},
    }


def advice(name: str) -> str:
    """Return the settings that affect a bottleneck, as text. `name` is a part that `bottleneck` returned."""
    return _SETTINGS[name]
