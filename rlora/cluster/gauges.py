"""Metrics of runs as Ray metrics, for Ray's dashboard and Prometheus."""

import re
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

from rlora.run.run import Run


class Gauges:
    """An observer that sets one gauge per metric: `reward/mean` becomes rlora_reward_mean, tagged with the run."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}

    def on_step(self, run: Run, figures: Mapping[str, Any]) -> None:
        """Set a gauge for each number in `figures`, the metrics of a step by name."""
        for name, value in figures.items():
            if isinstance(value, int | float):
                if name not in self._gauges:
                    text = f"rlora: {name} (docs/metrics.md)"
                    self._gauges[name] = Gauge(re.sub(r"\W", "_", f"rlora_{name}"), text, ("run",))
                self._gauges[name].set(float(value), {"run": run.policy})
