"""The training loop (`drive`), and `rlora.train`, which trains one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlora.records import Adapter, RloraError
from rlora.run import directory
from rlora.run.source import RunPath, Source, reachable, resolve_config

if TYPE_CHECKING:  # torch and Ray take seconds to import, and `import rlora` must not wait for them
    from upath import UPath

    from rlora.run.run import Observer, Run
    from rlora.run.turns import Turns


def drive(runs: Sequence[Run], turns: Turns | None = None) -> None:
    """prompts -> groups of episodes -> rewards -> advantages -> adapter v + 1 -> engines -> prompts ...

    Train runs, each with its policy, until all have done their steps. They share the frozen base, the engines and
    `learner.concurrent` learners. Adapters, optimizers and random states are separate. `turns` decides which runs take
    the next step: by default all, in `rounds`. A failed run ends while others continue; its error is raised at the end.
    """
    from rlora import cluster
    from rlora.run.run import closing
    from rlora.run.turns import active, ended, rounds, updated

    with closing(runs), cluster.start([run.served for run in runs]) as job:
        for run in runs:
            with run.isolated():  # opens the policy, loads version 0, sends the first and the held-out prompts
                run.begin(job)
        for due in (turns or rounds)(runs):  # with a single run, every iteration yields that run
            for run in active(due):
                with run.isolated():  # waits for the step's scored groups
                    run.collect()
            for run in active(due):
                with run.isolated():  # starts the update without blocking: several learners can work at the same time
                    run.start_update()
            for run in active(due):
                with run.isolated():  # waits for the update, writes a line of metrics, and starts writing a bundle
                    run.finish_update()
            for run in updated(due):
                with run.isolated():  # loads the new version on every engine, verifies it, and sends the next prompts
                    run.deliver()
            for run in ended(due):
                with run.isolated():  # waits for the evaluation after training, and writes the summary
                    run.end()
        for run in ended(runs):  # had no step left
            with run.isolated():
                run.end()


@dataclass(frozen=True)
class Result:
    """What `train` returns: the run's directory, its last version, and its metrics."""

    directory: UPath  # the run's directory, for `rlora train --resume`, `rlora eval` and other commands
    adapter: Adapter  # the last version; `adapter.files` has its two files in PEFT's format
    summary: Mapping[str, Any]  # summary.json: accuracy/before, accuracy/after, adapter/path, time/total, ...
    steps: Sequence[Mapping[str, Any]]  # metrics of each step, as in metrics.jsonl


def train(
    config: Source = None, *, run_dir: RunPath = None, overwrite: bool = False, resume: RunPath = None,
    fork: str | None = None, on_step: Callable[[Mapping[str, Any]], object] | None = None,
    observers: Sequence[Observer] = (), **changes: Any,
) -> Result:  # fmt: skip
    """Train one policy, as `rlora train` does. Blocks until the run ends.

    `config` is a TOML file, a mapping with its tables, or a Config. `changes` override fields, with tables as mappings:
    `rlora.train("launch/gsm8k.toml", learner={"rank": 4}, steps=50)`. A field that names a plug-in (`env`, `reward`,
    `algorithm={"name": ...}`) also accepts the object itself: a function, a class, a lambda, or an env instance.
    config.toml records an object that can't be imported as `python:NAME`; `resume` needs such an object again.

    `run_dir` is the directory of a new run (default: runs/ENV-TIME); `overwrite` replaces a run there. `fork` (RUN or
    RUN@STEP) starts the new run from a version. `resume` continues the run in this directory from its newest bundle.
    `on_step` and `observers` receive the metrics of each step. Raises RloraError for errors that the user can fix.
    """
    from rlora import cluster

    if resume and (run_dir or overwrite):
        raise RloraError(f"train: resume = {str(resume)!r} is the run's directory; remove run_dir and overwrite")
    resolved = resolve_config(config, changes, resume, fork)
    is_complete = resume is not None and directory.is_complete(reachable(resume), resolved.steps)
    with nullcontext() if is_complete else cluster.starting(resolved):  # beside the imports and the prompts' loading
        from rlora.cluster.gauges import Gauges
        from rlora.run import checkpoint, prepare
        from rlora.run.run import Callback
        from rlora.trackers.tracking import tracked

        observers = (*observers, Gauges(), *([Callback(on_step)] if on_step else []))
        with prepare.prepared(resolved, run_dir, resume, fork, overwrite, observers) as run, prepare.resume_note(run):
            if not prepare.is_finished(run.path, run.config, run.start):
                with tracked(run):
                    drive([run])
    path, adapter = run.path, checkpoint.read_version(run.path).adapter
    return Result(path, adapter, directory.summary(path), directory.figures(path))
