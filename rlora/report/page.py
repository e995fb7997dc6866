"""Render runs as one HTML page: tables by Jinja, charts by Plotly, which is embedded, and completions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import rlora
from rlora.records import RloraError
from rlora.report.charts import charts
from rlora.report.completions import compressed, packed, read_completions
from rlora.report.runs import RunData, rounded
from rlora.report.weights import FIGURES, heat_maps, path

MOST_RUNS = 20  # that a page overlays
_MOST_WEIGHTS = 6  # runs with heat maps
_SECRET = ("key", "token", "secret", "password")  # arguments with these words in their names are not shown
_SUMMARY = {  # a run's row in the table of runs: metric, label and format
    "accuracy/before": ("accuracy before", ".3f"),
    "accuracy/after": ("accuracy after", ".3f"),
    "held_out/nll/before": ("held-out nll before", ".4f"),
    "held_out/nll/after": ("held-out nll after", ".4f"),
    "adapter/parameters": ("parameters", ",.0f"),
    "time/total": ("seconds", ",.0f"),
}


@dataclass(frozen=True)
class Ranking:
    """Results of a sweep: the configurations from the best to the worst, and what follows."""

    metric: str
    rows: Sequence[tuple[str, str]]  # configuration, and its mean with the interval
    verdict: str


def render(
    runs: Sequence[RunData], limit: int, ranking: Ranking | None = None, refresh: float | None = None,
    notes: Sequence[str] = (),
) -> str:  # fmt: skip
    """Return the page of the first `MOST_RUNS` runs. `limit` is the size of all completions in bytes. `refresh` is the
    number of seconds after which the page loads its file again, for `rlora report --watch`. `notes` say what is left
    out.

    Raises RloraError if plotly or jinja2 is not installed.
    """
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise RloraError(f"rlora report: {error}; install it with pip install 'rlora[report]'") from error
    shown, notes = list(runs[:MOST_RUNS]), [*notes]
    if left_out := [run.name for run in runs[MOST_RUNS:]]:
        notes.append(
            f"{len(left_out)} of {len(runs)} runs are left out, the page shows {MOST_RUNS}: {', '.join(left_out)}"
        )
    columns = [run.columns for run in shown]
    maps = [heat_maps(run) if number < _MOST_WEIGHTS else None for number, run in enumerate(shown)]
    paths = [path(run) if number < _MOST_WEIGHTS else None for number, run in enumerate(shown)]
    if len(shown) > _MOST_WEIGHTS:
        notes.append(f"heat maps and paths are of the first {_MOST_WEIGHTS} runs")
    completions = []
    for run in shown:
        completions.append(read_completions(run, limit // len(shown)))
        notes += [f"{run.name}: {note}" for note in (*run.notes, *completions[-1].notes)]
    data = {
        "runs": [
            {"name": run.name, "columns": values, "weights": weights, "path": way}
            for run, values, weights, way in zip(shown, columns, maps, paths, strict=True)
        ],
        "charts": charts(columns),
        "figures": FIGURES,
        "refresh": refresh,
    }
    chunks = {"data": packed(data)}
    for number, found in enumerate(completions):
        chunks[f"completions-{number}"] = packed({"prompts": found.prompts, "texts": list(found.pieces)})
        chunks |= {f"completions-{number}-{step}": chunk for step, chunk in sorted(found.chunks.items())}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("page.html.jinja")).render(
        title=", ".join(run.name for run in shown[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else ""),
        runs=_without_empty([_row(run) for run in shown]),
        events=[(run.name, *event) for run in shown for event in _events(run)],
        notes=notes,
        ranking=ranking,
        configs=[(run.name, _flat(run.config), _lineage(run)) for run in shown],
        chunks=chunks,
        css=_asset("page.css"),
        script=_asset("page.js"),
        plotly=compressed(get_plotlyjs()),
        version=rlora.__version__,
    )


def _asset(name: str) -> str:
    return files("rlora.report").joinpath(name).read_text()


def _row(run: RunData) -> dict[str, str]:
    row = {"run": run.name, "status": run.status, "steps": f"{len(run.lines)} of {run.config.get('steps', '?')}"}
    rewards = [reward for line in run.lines if (reward := rounded(line.get("reward/mean"))) is not None]
    row["reward"] = f"{rewards[0]:.3g} → {rewards[-1]:.3g}" if rewards else ""
    values = {label: (rounded(run.summary.get(name), 9), form) for name, (label, form) in _SUMMARY.items()}
    return row | {label: "" if value is None else format(value, form) for label, (value, form) in values.items()}


def _without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    return [{name: row[name] for name in names} for row in rows]


def _events(run: RunData) -> list[tuple[str, int, int]]:
    """Return the health rules that matched: name, first and last step of each time."""
    events: list[tuple[str, int, int]] = []
    for line in run.lines:
        for name, first in line.items():
            if name.startswith("health/") and isinstance(first, int):
                event = (name.removeprefix("health/"), first)
                events = [old for old in events if old[:2] != event] + [(*event, line["step"])]
    return events


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the fields of a config by their full names, without the provenance."""
    rows = []
    for name, value in table.items():
        if isinstance(value, Mapping) and value and prefix + name != "provenance":
            rows += _flat(value, f"{prefix}{name}.")
        elif prefix + name != "provenance":
            is_secret = "_args." in prefix and any(word in name.lower() for word in _SECRET)
            rows.append((prefix + name, "…" if is_secret else json.dumps(value, default=str, ensure_ascii=False)))
    return rows


def _lineage(run: RunData) -> list[tuple[str, str]]:
    """Return where the run comes from: its source if it is a fork, the packages and the machine."""
    rows = [("directory", str(run.path))]
    for name, value in run.provenance.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}: {key}", str(item)) for key, item in value.items()]
        else:
            rows.append((name, str(value)))
    return rows
