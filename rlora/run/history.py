"""What runs there are, and how far each has come."""

from collections.abc import Iterator
from dataclasses import dataclass

from upath import UPath

from rlora.config import read
from rlora.records import RloraError
from rlora.run.checkpoint import versions
from rlora.run.directory import CONFIG, Provenance, figures, is_held, summary


@dataclass(frozen=True)
class RunSummary:
    """A run, as far as it has come."""

    name: str
    status: str  # running, finished, stopped or not readable
    steps: str  # done, of all
    best: str  # mean reward of a step, and the version that it started from
    accuracy: str  # before and after, on held-out prompts
    origin: str  # what it was forked from


def list_runs(directory: UPath) -> Iterator[RunSummary]:
    """The runs in a directory, by name."""
    for run in sorted(directory.iterdir(), key=lambda path: path.name) if directory.is_dir() else ():
        if (run / CONFIG).exists():
            yield _past(run)


def _past(run: UPath) -> RunSummary:
    try:
        config, origin = read(run / CONFIG), Provenance.of(run)
    except RloraError:  # another release wrote it
        return RunSummary(run.name, "not readable", "", "", "", "")
    lines, told = figures(run), summary(run)
    logged = lines[-1]["step"] + 1 if lines else origin.first
    done = min(logged, max(versions(run), default=0))  # a line may be ahead of its bundle, or a bundle be damaged
    status = "running" if is_held(run) else "finished" if done >= config.steps else "stopped"
    rewards = {line["step"]: line["reward/mean"] for line in lines if line["reward/mean"] is not None}
    best = max(rewards, key=lambda step: rewards[step], default=None)
    accuracy = [f"{told[name]:.3f}" for name in ("accuracy/before", "accuracy/after") if name in told]
    return RunSummary(
        name=run.name,
        status=status,
        steps=f"{done}/{config.steps}",
        best="" if best is None else f"{rewards[best]:.3f} at version {best}",
        accuracy=" -> ".join(accuracy),
        origin="{run}@{version}".format(**origin.forked_from) if origin.forked_from else "",
    )
