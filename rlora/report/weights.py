"""The heat maps of a report: what each step changed in each matrix of a run."""

from typing import Any

from rlora.report.runs import RunData, rounded
from rlora.telemetry.weights import rank_used

_MOST_STEPS = 100  # columns of a heat map

FIGURES = {  # of a matrix in a step: title and explanation
    "norm": ("size of the update", "Frobenius norm of s B A"),
    "relative": ("size relative to the base", "Frobenius norm of s B A divided by that of the base's matrix"),
    "moved": ("change in the step", "Frobenius norm of the change of s B A"),
    "cosine_last": ("cosine with the last change", "between the change of the step and that of the step before"),
    "cosine_update": ("cosine with the update", "between the change of the step and the update before it"),
    "rank_used": ("rank in use", "effective rank of s B A divided by the rank of the adapter"),
}


def heat_maps(run: RunData) -> dict[str, Any] | None:
    """Return the matrices, the steps, and for each figure a list by matrix of lists by step; None without telemetry.

    A run of more than 100 steps is shown at evenly spaced ones.
    """
    if not run.weights:
        return None
    last = len(run.weights) - 1
    count = min(_MOST_STEPS, len(run.weights))
    lines = [run.weights[round(index * last / max(1, count - 1))] for index in range(count)]
    norms = list(run.matrices.values())
    figures: dict[str, list[list[float | None]]] = {}
    for name in FIGURES:
        columns = []
        for line in lines:
            if name == "relative":
                values = [norm / base if base else None for norm, base in zip(line["norm"], norms, strict=True)]
            elif name == "rank_used":
                values = [rank_used(sigma) for sigma in line["sigma"]]
            else:
                values = line[name]
            columns.append([rounded(value, 4) for value in values])
        rows = [list(row) for row in zip(*columns, strict=True)]
        distinct = {value for row in rows for value in row if value is not None}
        if len(distinct) > 1:  # at rank 1 the whole rank is in use
            figures[name] = rows
    return {
        "matrices": [name.removeprefix("model.") for name in run.matrices],
        "steps": [line["step"] for line in lines],
        "of": len(run.weights),
        "figures": figures,
    }
