"""The loop, and nothing but the loop; and `rlora.train`, which makes one run and has it learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from rlora.records import Adapter, RloraError
from rlora.run.source import Source, given

if TYPE_CHECKING:  # torch, Ray and what imports them take seconds: `import rlora` does not wait for that
    from upath import UPath

    from rlora.run.run import Observer, Run
    from rlora.run.turns import Turns


def drive(runs: Sequence[Run], turns: Turns | None = None) -> None:
    """prompts -> groups of episodes -> rewards -> advantages -> adapter v + 1 -> engines -> prompts ...

    Train runs, each with a policy of its own, until all have done their steps. They share the frozen base, the engines
    and the learner's process (several, by `learner.concurrent`). Adapters, optimizers and random states are separate.
    `turns` decides which runs take the next step; by default all do, in `rounds`. A run that fails ends, and the others
    go on. Its error is raised at the end.
    """
    from rlora import cluster
    from rlora.run.run import kept
    from rlora.run.turns import ended, going, rounds, updated

    with kept(runs), cluster.start([run.served for run in runs]) as job:
        for run in runs:
            with run.alone():  # opens the policy, loads version 0, and sends the first prompts and the held-out ones
                run.begin(job)
        for due in (turns or rounds)(runs):  # with a single run, every iteration yields that run
            for run in going(due):
                with run.alone():  # waits for the step's scored groups
                    run.collect()
            for run in going(due):
                with run.alone():  # starts the update, and does not wait: several learners may work at once
                    run.start_update()
            for run in going(due):
                with run.alone():  # waits for the update, writes a line of metrics, and starts writing a bundle
                    run.finish_update()
            for run in updated(due):
                with run.alone():  # loads the new version on every engine, proven, and sends the next prompts
                    run.deliver()
            for run in ended(due):
                with run.alone():  # waits for the accuracy after training, and writes the summary
                    run.end()
        for run in ended(runs):  # that had no step left
            with run.alone():
                run.end()


@dataclass(frozen=True)
class Result:
    """What a run has come to."""

    directory: UPath  # `rlora train --resume`, `rlora eval` and the other commands take it
    adapter: Adapter  # the last version: `adapter.files` are the two of PEFT's format
    summary: Mapping[str, Any]  # of the whole run: accuracy/before, accuracy/after, adapter/path, time/total, ...
    steps: Sequence[Mapping[str, Any]]  # the figures of each step, as in metrics.jsonl


def train(
    config: Source = None, *, run_dir: str | PathLike[str] | None = None, overwrite: bool = False,
    resume: str | PathLike[str] | None = None, fork: str | None = None,
    on_step: Callable[[Mapping[str, Any]], object] | None = None, observers: Sequence[Observer] = (), **changes: Any,
) -> Result:  # fmt: skip
    """Train one policy, as `rlora train` does.

    `config` is a TOML file, a mapping with its tables, or a Config; `changes` are fields that differ, tables as
    mappings: `rlora.train("launch/gsm8k.toml", learner={"rank": 4}, steps=50)`. Where a field names what is plugged in
    (`env`, `reward`, `algorithm={"name": ...}`), the object itself may stand: a function, a class, a lambda, or an env
    that is ready made. config.toml names it as `python:NAME`, where it can't be imported.

    With `resume`, the directory of a run, it goes on from its newest bundle, under its own config but for `changes`;
    what was given to it from Python has to be given again. `fork` (RUN or RUN@STEP) starts a new run from a version.
    `on_step` is called with the figures of each step; see `Observer` for more. What it raises costs a warning.

    Raises RloraError for whatever a message can explain, before anything is trained where that is possible.
    """
    from rlora.cluster.gauges import Gauges
    from rlora.run import directory
    from rlora.run.checkpoint import newest
    from rlora.run.prepare import is_finished, prepared
    from rlora.run.run import Callback
    from rlora.trackers.tracking import tracked

    if resume and (run_dir or overwrite):
        raise RloraError(f"train: resume = {str(resume)!r} goes on where the run is; leave out run_dir and overwrite")
    observers = (*observers, Gauges(), *([Callback(on_step)] if on_step else []))
    with prepared(given(config, changes, resume, fork), run_dir, resume, fork, overwrite, observers) as run:
        if not is_finished(run.place, run.config, run.start):
            with tracked(run):
                drive([run])
    last = newest(run.place, directory.Origin.of(run.place))
    assert last
    return Result(run.place, last.adapter, directory.summary(run.place), directory.figures(run.place))
