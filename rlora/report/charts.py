"""The charts of a report (charts.toml)."""

import re
import tomllib
from collections.abc import Collection
from importlib.resources import files
from typing import Any


def charts(names: Collection[str]) -> list[dict[str, Any]]:
    """Return the charts of runs that have the metrics `names`, with the metrics that they have."""
    text = files("rlora.report").joinpath("charts.toml").read_text()
    found = []
    for chart in tomllib.loads(text)["chart"]:
        metrics = [name for pattern in chart["metrics"] for name in names if re.fullmatch(pattern, name)]
        band = chart.get("band", ())
        has_band = len(metrics) == 1 and all(name in names for name in band)
        if metrics:
            found.append(chart | {"metrics": metrics, "band": band if has_band else ()})
    return found
