"""What a step waited for most, and which setting would move it."""

from collections.abc import Mapping
from typing import Any

_SETTINGS = {
    "sampling": "engine.replicas, sampling.max_tokens, prompts_per_step, or max_staleness = 1 (sample during updates)",
    "stragglers": "engine.straggler_seconds, or a lower sampling.max_tokens",
    "rewards": "scoring.workers or scoring.replicas",
    "update": "learner.replicas, learner.microbatch_tokens or learner.threads",
    "swap": "engine.replicas, for the swap waits for each engine",
    "save": "the disk of --run-dir, or checkpoint.episodes_mib",
}


def bottleneck(figures: Mapping[str, Any]) -> tuple[str, float] | None:
    """The part of a step that took longest, and its share of the step; None where nothing was measured."""
    wait, whole = figures.get("time/wait") or 0.0, figures.get("time/step") or 0.0
    if whole <= 0:
        return None
    late = min(wait, figures.get("time/stragglers") or 0.0)
    idle = max(
        0.0, wait - (figures.get("time/sampling") or 0.0)
    )  # engines have nothing to do, and groups are not there
    rewards = min(idle, figures.get("time/reward") or 0.0, wait - late)
    parts = {
        "sampling": wait - late - rewards,
        "stragglers": late,
        "rewards": rewards,
        **{name: figures.get(f"time/{name}") or 0.0 for name in ("update", "swap", "save")},
    }
    name = max(parts, key=lambda part: parts[part])
    return name, parts[name] / whole


def advice(name: str) -> str:
    """The settings that would move a bottleneck."""
    return _SETTINGS[name]
