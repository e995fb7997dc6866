"""Write the report of runs and sweeps, once or while they train."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from upath import UPath

from rlora.records import RloraError
from rlora.report.page import Ranking, render
from rlora.report.runs import RunData, read_data
from rlora.run.directory import CONFIG
from rlora.store import names, write_file
from rlora.sweeps.diary import SWEEP
from rlora.sweeps.results import read_results, standings, verdict

_log = logging.getLogger(__name__)


def write_report(sources: Sequence[UPath], out: Path, limit: int, refresh: float | None = None) -> list[RunData]:
    """Write the page of the runs in `sources`, directories of runs or sweeps, to `out`. Return the runs.

    `limit` is the size of all completions in bytes. With `refresh` the page loads its file again after this many
    seconds. Raises RloraError if a source is not a run, or if a package is missing.
    """
    runs, ranking = _gather(sources)
    write_file(UPath(out), render(runs, limit, ranking, refresh).encode())
    return runs


def watch(sources: Sequence[UPath], out: Path, limit: int, seconds: float) -> None:
    """Write the page each time that a run has done a step, checking every `seconds`, until all runs are finished.

    A run that is stopped is waited for, because it may be resumed. Raises as `write_report` does.
    """
    seen: list[tuple[int, str]] | None = None
    while True:
        runs = _gather(sources)[0]
        is_finished = all(run.status == "finished" for run in runs)
        state = [(len(run.lines), run.status) for run in runs]
        if state != seen:
            write_report(sources, out, limit, None if is_finished else seconds)
            done = ", ".join(f"{run.name} {run.status} after {len(run.lines)} steps" for run in runs[:5])
            _log.info(f"{out}: {done}{', ...' if len(runs) > 5 else ''}")
            seen = state
        if is_finished:
            return
        time.sleep(seconds)


def _gather(sources: Sequence[UPath]) -> tuple[list[RunData], Ranking | None]:
    """Read the runs, with the members of a sweep in the order of the directory. A single sweep has a ranking."""
    runs: list[RunData] = []
    for source in sources:
        if (source / SWEEP).exists():
            members = [source / name for name in sorted(names(source)) if (source / name / CONFIG).exists()]
            if not members:
                raise RloraError(f"{source}: no member of the sweep has started; wait for its first step")
            runs += [read_data(member) for member in members]
        else:
            runs.append(read_data(source))
    return runs, _ranking(sources[0]) if len(sources) == 1 and (sources[0] / SWEEP).exists() else None


def _ranking(sweep: UPath) -> Ranking | None:
    results = read_results(Path(str(sweep)))
    metric, ranking = standings(results)
    rows = [(standing.configuration, str(standing)) for standing in ranking]
    return Ranking(metric, rows, verdict(results)) if rows else None
