"""The charts of a report (charts.toml)."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

Columns = Mapping[str, Sequence[float | None]]  # values by metric


def charts(runs: Sequence[Columns]) -> list[dict[str, Any]]:
    """Return the charts of runs, each with the metrics that a run has."""
    names = dict.fromkeys(name for columns in runs for name in columns)
    found = []
    for chart in tomllib.loads(files("rlora.report").joinpath("charts.toml").read_text())["chart"]:
        metrics = [name for pattern in chart["metrics"] for name in names if re.fullmatch(pattern, name)]
        varies = any(len({*columns.get(name, ())} - {None}) > 1 for columns in runs for name in metrics)
        if len(metrics) < chart.get("at_least", 1) or (chart.get("varies") and not varies):
            continue
        found.append(chart | {"metrics": metrics})
        ends = chart.get("band") or [chart.get("spread")]
        if len(metrics) > 1 or not names.keys() >= set(ends):
            found[-1] |= {"band": None, "spread": None}
    return found
