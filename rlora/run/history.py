"""List of the runs in a directory, with their progress."""

from collections.abc import Iterator
from dataclasses import dataclass

from upath import UPath

from rlora.config import read
from rlora.records import RloraError
from rlora.run.checkpoint import versions
from rlora.run.directory import CONFIG, Provenance, figures, is_locked, summary


@dataclass(frozen=True)
class RunSummary:
    """Progress of a run, as text for the table that `rlora runs` prints."""

    name: str
    status: str  # running, finished, stopped or not readable
    steps: str  # done/total
    best: str  # highest mean reward of a step, and the version that the step started from
    accuracy: str  # before -> after training, on held-out prompts or pairs; of SFT the held-out nll
    origin: str  # RUN@VERSION that the run was forked from, or whose adapter it started from; empty if there is none


_HELD_OUT, _MOMENTS = ("accuracy", "held_out/accuracy", "held_out/nll"), ("before", "after")


def list_runs(directory: UPath) -> Iterator[RunSummary]:
    """Yield a summary of each run in a directory, sorted by name."""
    for run in sorted(directory.iterdir(), key=lambda path: path.name) if directory.is_dir() else ():
        if (run / CONFIG).exists():
            yield _summarise(run)


def _summarise(run: UPath) -> RunSummary:
    try:
        config, origin = read(run / CONFIG), Provenance.of(run)
    except RloraError:  # written by a different release
        return RunSummary(run.name, "not readable", "", "", "", "")
    lines, totals = figures(run), summary(run)
    logged = lines[-1]["step"] + 1 if lines else origin.first
    done = min(
        logged, max(versions(run), default=0)
    )  # a line is written before its bundle, and a bundle may be damaged
    status = "running" if is_locked(run) else "finished" if done >= config.steps else "stopped"
    rewards = {line["step"]: line["reward/mean"] for line in lines if line["reward/mean"] is not None}
    best = max(rewards, key=lambda step: rewards[step], default=None)
    measured = next((name for name in _HELD_OUT if f"{name}/before" in totals or f"{name}/after" in totals), "")
    accuracy = [f"{totals[f'{measured}/{moment}']:.3f}" for moment in _MOMENTS if f"{measured}/{moment}" in totals]
    return RunSummary(
        name=run.name,
        status=status,
        steps=f"{done}/{config.steps}",
        best="" if best is None else f"{rewards[best]:.3f} at version {best}",
        accuracy="nll " * measured.endswith("nll") + " -> ".join(accuracy),
        origin="{run}@{version}".format(**source) if (source := origin.forked_from or origin.started_from) else "",
    )
