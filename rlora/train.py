"""The loop, and nothing but the loop; and `rlora.train`, which makes one run and has it learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from rlora.records import Adapter
from rlora.run.source import Source, given

if TYPE_CHECKING:  # torch, Ray and what imports them take seconds: `import rlora` does not wait for that
    from upath import UPath

    from rlora.run.run import Observer, Run
    from rlora.run.turns import Turns


def drive(runs: Sequence[Run], turns: Turns | None = None) -> None:
    """prompts -> groups -> rewards -> advantages -> adapter -> swap. That is the whole framework.

    Each run has a policy of its own. Several share the base, the engines and the turns (by default `rounds`), and
    nothing else: what fails in one ends that one, and is raised once the others are at their end.
    """
    from rlora import cluster
    from rlora.run.run import kept
    from rlora.run.turns import going, rounds

    with kept(runs), cluster.start(runs) as (learners, fleet, loops):
        for run in runs:
            with run.alone():
                run.begin(learners[run.policy], fleet, loops[run.policy])
        for due in (turns or rounds)(runs):  # of one run: that one, every time
            for run in due:
                with run.alone():
                    run.learn()  # its groups go to its learner, which computes meanwhile
            for run in going(due):
                with run.alone():
                    run.keep()  # the adapter v + 1: a line of figures, and a bundle that is written meanwhile
            for run in going(due):
                with run.alone():
                    run.serve()  # swapped in on every engine, proven; then the next prompts are sampled under it
        for run in runs:
            if not run.failure:
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
    from rlora.run import directory
    from rlora.run.checkpoint import newest
    from rlora.run.prepare import is_finished, prepared
    from rlora.run.run import Told

    if on_step:
        observers = (*observers, Told(on_step))
    whole = given(config, changes, resume, fork)
    with prepared(whole, run_dir, resume, fork, overwrite, observers) as run:
        if not is_finished(run.place, run.config, run.start):
            drive([run])
    last = newest(run.place, directory.Origin.of(run.place))
    assert last
    return Result(run.place, last.adapter, directory.summary(run.place), directory.figures(run.place))
