"""What a report shows of a run, read from its directory, also while the run is written or if it is damaged."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upath import UPath

from rlora.records import RloraError
from rlora.run.directory import CONFIG, MATRICES, METRICS, SUMMARY, WEIGHTS, complete_lines, is_locked
from rlora.store import read_file
from rlora.telemetry.bottleneck import phases

Line = Mapping[str, Any]
_UPDATE_PARTS = ("passes", "gradient", "adam")
_COLUMNS = ("norm", "moved", "sigma", "cosine_last", "cosine_update")  # of weights.jsonl
_EVALUATED = {"accuracy/version": "accuracy/", "held_out/version": "held_out/"}  # prefix of the results of a version
_SUMMARY = {  # names in summary.json
    "accuracy/held_out": "accuracy/{}", "held_out/nll": "held_out/nll/{}", "held_out/accuracy": "held_out/accuracy/{}",
}  # fmt: skip


@dataclass(frozen=True)
class RunData:
    """A run as its files describe it. Files that are missing are empty here, and `notes` says what is damaged."""

    name: str
    path: UPath
    config: Mapping[str, Any]  # as in config.toml, not validated: any release may have written it
    lines: Sequence[Line]  # metrics.jsonl
    summary: Mapping[str, Any]
    matrices: Mapping[str, float | None]  # norm of the base's matrix, by the adapter's matrix
    weights: Sequence[Line]  # weights.jsonl
    status: str  # running, finished or stopped; of a sweep's member also waiting, paused, dropped or failed
    notes: list[str] = field(default_factory=list)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the run comes from, as in config.toml."""
        table = self.config.get("provenance")
        return table if isinstance(table, Mapping) else {}

    @property
    def columns(self) -> dict[str, list[float | None]]:
        """The values of each metric that is a number in any step, and of each phase of the steps in seconds.

        Results of evaluations are at the step whose number is the evaluated version. Those before and after training
        are in summary.json; the ones after training are at one more step.
        """
        lines = [dict(line) | _phases(line) for line in self.lines]
        if lines and (final := self._evaluated("after")):
            lines[0] = self._evaluated("before") | lines[0]
            lines.append({"step": lines[-1]["step"] + 1} | final)
        by_step = {line["step"]: line for line in lines}
        for line in [*lines]:
            for version, prefix in _EVALUATED.items():
                moved = by_step.get(line.get(version))
                for name in [name for name in line if name.startswith(prefix)] if moved not in (None, line) else ():
                    moved[name] = line.pop(name)  # type: ignore[index]
        names = dict.fromkeys(name for line in lines for name in line)
        columns = {name: [rounded(line.get(name)) for line in lines] for name in names}
        return {name: values for name, values in columns.items() if any(value is not None for value in values)}

    def _evaluated(self, moment: str) -> dict[str, float]:
        found = {name: rounded(self.summary.get(source.format(moment))) for name, source in _SUMMARY.items()}
        return {name: value for name, value in found.items() if value is not None} if self.status == "finished" else {}


def read_data(path: UPath, name: str = "", status: str = "") -> RunData:
    """Read the run in a directory, with its name and its status if they are known. Raises RloraError if there is no
    run."""
    content = read_file(path / CONFIG)
    if content is None:
        raise RloraError(f"{path}: it is not a run, because it has no {CONFIG}; name the directory of a run or a sweep")
    notes: list[str] = []
    try:
        config = tomllib.loads(content.decode(errors="replace"))
    except tomllib.TOMLDecodeError as error:
        config = {}
        notes.append(f"{CONFIG} is damaged: {error}")
    lines, weights = (_lines(path, file, notes) for file in (METRICS, WEIGHTS))
    summary, matrices = (_object(path, file, notes) for file in (SUMMARY, MATRICES))
    whole = [line for line in weights if all(_fits(line.get(name), len(matrices)) for name in _COLUMNS)]
    if len(whole) < len(weights):
        notes.append(f"{WEIGHTS}: {len(weights) - len(whole)} lines do not match {MATRICES} and are left out")
    is_finished = "steps" in config and summary.get("steps") == config["steps"]
    status = status or ("running" if is_locked(path) else "finished" if is_finished else "stopped")
    return RunData(
        name or path.name or path.absolute().name, path, config, lines, summary, matrices, whole, status, notes
    )


def _fits(column: Any, count: int) -> bool:
    return isinstance(column, list) and len(column) == count > 0


def _lines(path: UPath, file: str, notes: list[str]) -> list[Line]:
    """Return the lines of a file that are objects with a step, in the order of their steps."""
    found, damaged = {}, 0
    for text in complete_lines(path, file):
        try:
            line = json.loads(text)
            found[int(line["step"])] = line
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        notes.append(f"{file}: {damaged} damaged {'line is' if damaged == 1 else 'lines are'} left out")
    return [found[step] for step in sorted(found)]


def _object(path: UPath, file: str, notes: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(read_file(path / file) or b"{}")
        return dict(content)
    except (ValueError, TypeError):
        notes.append(f"{file} is damaged and left out")
        return {}


def _phases(line: Line) -> dict[str, float]:
    """Return the phases of a step: those of the bottleneck, with the update by parts, and the remaining time."""
    line = {name: rounded(value) for name, value in line.items() if name.startswith("time/")}
    if not line.get("time/step"):
        return {}
    seconds = phases(line)
    update = seconds.pop("update")
    parts = {part: line.get(f"time/update/{part}") or 0.0 for part in _UPDATE_PARTS}
    seconds |= {f"update: {part}": value for part, value in parts.items() if value}
    rest = "update: other" if any(parts.values()) else "update"
    seconds[rest] = max(0.0, update - sum(parts.values()))
    seconds["other"] = max(0.0, (line.get("time/step") or 0.0) - sum(seconds.values()))
    return {f"phase/{name}": value for name, value in seconds.items()}


def rounded(value: Any, digits: int = 5) -> float | None:
    """Round a finite number to significant digits; None for anything else."""
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float) or not abs(value) < float("inf"):
        return None
    return float(f"{value:.{digits}g}")
