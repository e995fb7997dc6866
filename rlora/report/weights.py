"""What a report shows of the weights: a heat map of the update by matrix and step, and the path of the policy."""

from collections.abc import Sequence
from typing import Any

from rlora.records import RloraError
from rlora.report.runs import RunData, rounded
from rlora.run import checkpoint
from rlora.telemetry.weights import path_of, rank_used

_MOST_STEPS = 100  # columns of a heat map
_MOST_VERSIONS = 60  # points of a path

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

    A run of more than 100 steps is shown at evenly spaced ones. Figures that are the same everywhere are left out.
    """
    if not run.weights:
        return None
    lines = [run.weights[index] for index in evenly(len(run.weights), _MOST_STEPS)]
    norms = list(run.matrices.values())
    figures: dict[str, list[list[float | None]]] = {}
    for name in FIGURES:
        columns = []
        for line in lines:
            if name == "relative":
                pairs = [(rounded(norm), base) for norm, base in zip(line["norm"], norms, strict=True)]
                values = [norm / base if norm is not None and base else None for norm, base in pairs]
            elif name == "rank_used":
                values = [rank_used([rounded(value) or 0.0 for value in sigma]) for sigma in line["sigma"]]
            else:
                values = line[name]
            columns.append([rounded(value, 4) for value in values])
        rows = [list(row) for row in zip(*columns, strict=True)]
        distinct = {value for row in rows for value in row if value is not None}
        if len(distinct) > 1:  # at rank 1 the whole rank is in use
            figures[name] = rows
    if not figures:  # no step has changed the policy yet
        return None
    return {
        "matrices": [name.removeprefix("model.") for name in run.matrices],
        "steps": [line["step"] for line in lines],
        "of": len(run.weights),
        "figures": figures,
    }


def path(run: RunData) -> dict[str, Any] | None:
    """Return the path of the policy over the versions whose bundles are kept, at most 60; None with fewer than two, or
    in full finetuning. Bundles that can't be read are left out, and a note says so."""
    try:
        versions = checkpoint.versions(run.path)
    except OSError:  # the completions say why
        return None
    adapters = []
    for index in evenly(len(versions), _MOST_VERSIONS):
        try:
            adapters.append(checkpoint.read_adapter(run.path, versions[index]))
        except (RloraError, OSError, ValueError) as error:  # damaged, or removed by the run in the meantime
            run.notes.append(f"version {versions[index]} is left out of the path: {error}")
        if adapters and adapters[-1].full_weights:
            return None
    if len(adapters) < 2:
        return None
    found = path_of(adapters)
    return {
        "versions": [adapter.number for adapter in adapters],
        "points": [[rounded(value) for value in point] for point in found.coordinates],
        "explained": [rounded(share, 3) for share in found.explained],
        "cosines": [rounded(cosine, 3) for cosine in found.cosines],
        "straightness": rounded(found.straightness, 3),
    }


def evenly(count: int, most: int) -> Sequence[int]:
    """Return the indices of at most `most` of `count` items, evenly spaced, with the first and the last."""
    return (
        sorted({round(index * (count - 1) / max(1, most - 1)) for index in range(most)})
        if count > most
        else range(count)
    )
