"""Write the report of runs and sweeps, once or while they train."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from upath import UPath

from rlora.records import RloraError
from rlora.report.page import Ranking, render
from rlora.report.runs import RunData, read_data
from rlora.run.directory import CONFIG
from rlora.store import names, write_file
from rlora.sweeps.diary import DIARY, SWEEP, complete_lines, member_states
from rlora.sweeps.results import read_results, standings, verdict
from rlora.sweeps.sweep import read_members

_log = logging.getLogger(__name__)

_ENDED = ("finished", "dropped", "failed")  # statuses after which a run does not go on by itself


@dataclass
class _Contents:
    runs: list[RunData] = field(default_factory=list)  # of a sweep, those of the best configurations first
    ranking: Ranking | None = None  # of a single sweep
    notes: list[str] = field(default_factory=list)
    has_waiting: bool = False  # whether members of a sweep have not begun

    @property
    def is_finished(self) -> bool:
        return not self.has_waiting and all(run.status in _ENDED for run in self.runs)


def write_report(sources: Sequence[UPath], out: Path, limit: int, refresh: float | None = None) -> list[RunData]:
    """Write the page of the runs in `sources`, directories of runs or sweeps, to `out`. Return the runs.

    `limit` is the size of all completions in bytes. With `refresh` the page loads its file again after this many
    seconds. Raises RloraError if a source is not a run, or if a package is missing.
    """
    return _write(_gather(sources), out, limit, refresh).runs


def watch(sources: Sequence[UPath], out: Path, limit: int, seconds: float) -> None:
    """Write the page each time that a run has done a step, checking every `seconds`, until all runs have ended.

    Between two checks it waits at least nine times as long as the check took, so that training has the machine. A run
    that is stopped is waited for, because it may be resumed. Raises as `write_report` does.
    """
    seen: list[tuple[str, int, str]] | None = None
    while True:
        start = time.monotonic()
        contents = _gather(sources)
        state = [(run.name, len(run.lines), run.status) for run in contents.runs]
        if state != seen:
            _write(contents, out, limit, None if contents.is_finished else seconds)
            done = ", ".join(f"{name} {status} after {steps} steps" for name, steps, status in state[:5])
            _log.info(f"{out}: {done}{', ...' if len(state) > 5 else ''}")
            seen = state
        if contents.is_finished:
            return
        time.sleep(max(seconds, 9 * (time.monotonic() - start)))


def _write(contents: _Contents, out: Path, limit: int, refresh: float | None) -> _Contents:
    page = render(contents.runs, limit, contents.ranking, refresh, contents.notes)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(UPath(out), page.encode())
    return contents


def _gather(sources: Sequence[UPath]) -> _Contents:
    """Read the runs. Raises RloraError if there are none, or if a source is not a run."""
    if not sources:
        raise RloraError("rlora report: no run; name the directory of a run or a sweep")
    contents = _Contents()
    for source in sources:
        if (source / SWEEP).exists():
            _add_sweep(contents, source, with_ranking=len(sources) == 1)
        else:
            contents.runs.append(read_data(source))
    counts = Counter(run.name for run in contents.runs)
    contents.runs = [
        replace(run, name=f"{run.path.absolute().parent.name}/{run.name}") if counts[run.name] > 1 else run
        for run in contents.runs
    ]
    return contents


def _add_sweep(contents: _Contents, sweep: UPath, with_ranking: bool) -> None:
    """Add the members of a sweep that have begun."""
    states = member_states(complete_lines(Path(str(sweep)) / DIARY))
    members = [name for name in sorted(names(sweep)) if (sweep / name / CONFIG).exists()]
    if not members:
        raise RloraError(f"{sweep}: no member of the sweep has started; wait for its first step")
    try:
        contents.has_waiting |= len(read_members(Path(str(sweep)))[0]) > len(members)
        results = read_results(Path(str(sweep)))
        metric, ranking = standings(results)
        best = [standing.configuration for standing in ranking]
        place = {item.name: best.index(item.configuration) for item in results if item.configuration in best}
        members.sort(key=lambda name: (place.get(name, len(best)), name))
        if with_ranking and ranking:
            rows = [(standing.configuration, str(standing)) for standing in ranking]
            contents.ranking = Ranking(metric, rows, verdict(results))
    except (RloraError, OSError, ValueError, KeyError, TypeError) as error:  # damaged, or of a different release
        contents.notes.append(f"{sweep.name}: its configurations can't be compared: {error}")
    for name in members:
        status = states[name].status if name in states else ""
        contents.runs.append(read_data(sweep / name, status="" if status == "running" else status))
