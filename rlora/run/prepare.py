"""Prepares a run for the training loop: a new run, a resumed run or a fork. Finds configuration and data errors."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import AutoConfig
from upath import UPath

from rlora.config import check_same_policy, differences
from rlora.core.objectives import objective_of
from rlora.core.setup import Setup
from rlora.model.base import auto_lr
from rlora.records import RloraError
from rlora.rollout.task import Task, load_task
from rlora.run import checkpoint, directory, resume
from rlora.run.checkpoint import Bundle
from rlora.run.run import Observer, Run
from rlora.run.source import RunPath, reachable, split
from rlora.run.start import read_start
from rlora.settings import Config
from rlora.store import holds

_log = logging.getLogger(__name__)

Report = Callable[[str], object]  # receives a line for the user
Load = Callable[[Config], Task]  # loads the prompts, rewards and chat template of a config


@contextmanager
def prepared(
    config: Config, run_dir: RunPath = None, resume: RunPath = None, fork: str | None = None, overwrite: bool = False,
    observers: Sequence[Observer] = (), report: Report = _log.info, load: Load = load_task,
) -> Iterator[Run]:  # fmt: skip
    """Prepare a run, and hold its lock within the context.

    `resume` is the directory of an existing run to continue. Otherwise creates a new run in `run_dir` (None:
    runs/ENV-TIME), in place of a run there if `overwrite` is set; `fork`, RUN or RUN@STEP, is a version to start from.
    `observers` receive the metrics of each step. Raises RloraError for an error in config, data or directory.
    """
    if not config.env:
        raise RloraError("env = '': a run needs an env; use module:name or path/to/file.py:name")
    with ExitStack() as stack:
        if resume is not None:
            stack.enter_context(directory.locked(reachable(str(resume))))
            run = resume_run(config, reachable(str(resume)), observers, report, load)
        else:
            path = reachable(str(run_dir)) if run_dir is not None else None
            run = begin(config, path, overwrite, split(fork) if fork else None, observers, report, load)
            stack.enter_context(directory.locked(run.path))
        if run.task.dropped:
            report(f"{run.task.dropped} prompts exceed sampling.max_prompt_tokens and are dropped")
        report(f"run: {run.path}" + (f", starting from version {run.start.version}" if run.start else ""))
        yield run


@contextmanager
def resume_note(run: Run) -> Iterator[None]:
    """Add a note with the command that resumes the run to an error in the context."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"`rlora train --resume {run.path}` continues from the newest saved step")
        raise


def begin(
    config: Config, path: UPath | None = None, overwrite: bool = False, fork: tuple[UPath, int | None] | None = None,
    observers: Sequence[Observer] = (), report: Report = _log.info, load: Load = load_task,
) -> Run:  # fmt: skip
    """Create a new run in the directory `path`, or in runs/ENV-TIME if `path` is None.

    `fork` has the directory of a run and the number of its version to start from, None for the newest. `overwrite`
    removes a run that is in `path`. Raises RloraError.
    """
    stored, start = config, None  # config.toml keeps the user's path in learner.start_from
    if fork:
        source, step = fork
        name = f"{source}@{step}" if step is not None else str(source)
        if overwrite and path and holds(path, source):
            raise RloraError(
                f"--fork {name}: this run is in {path}, which --overwrite would remove; use a different --run-dir"
            )
        config, start = resume.with_kept_start(source, config), checkpoint.read_version(source, step)
        previous = resume.with_kept_start(source, start.config)
        check_same_policy(previous, config, "--fork")
        report_changes(differences(previous, config), report)
        if start.version >= config.steps:
            raise RloraError(f"steps = {config.steps}: {name} has completed all steps; set --steps to a larger number")
    task, setup = load_and_check(config, report, load)
    env_name = config.env.rpartition(":")[2].lower()
    path = path or UPath("runs") / f"{env_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    stored, config = resume.with_template(stored, task.chat), resume.with_template(config, task.chat)
    forked = start.identity if start else None
    started = checkpoint.identity(UPath(config.learner.start_from)) if config.learner.start_from else None
    directory.create(path, stored, task, overwrite, forked_from=forked, started_from=started)
    config = resume.keep_start(path, config)
    return Run(config, task, setup, path, resume.adopt(start, path) if start else None, observers)


def resume_run(
    config: Config, path: UPath, observers: Sequence[Observer] = (), report: Report = _log.info, load: Load = load_task
) -> Run:
    """Resume the run in `path` from its newest intact bundle, under `config`. Raises RloraError."""
    origin = directory.Provenance.of(path)
    config, start = resume.with_kept_start(path, config), checkpoint.newest(path, origin)
    if start:
        previous = resume.with_kept_start(path, start.config)
        check_same_policy(previous, config, "--resume")
        report_changes(changes := differences(previous, config), report)
        if changes and is_finished(path, config, start):
            raise RloraError(f"steps = {config.steps}: {path} has completed all steps; set --steps to a larger number")
    elif origin.forked_from:
        raise RloraError(
            f"{path}: the first bundle of this fork was never written, so there is nothing to resume; fork "
            f"{origin.forked_from['run']} again, with --run-dir {path} --overwrite"
        )
    task, setup = load_and_check(config, report, load)
    measured = directory.summary(path).get("accuracy/prompts", 0)
    if measured and len(task.held_out) != measured:
        raise RloraError(
            f"evaluate.prompts = {config.evaluate.prompts}: accuracy before training was measured on {measured} "
            f"held-out prompts, but there are {len(task.held_out)} now, so accuracies would not be comparable; restore "
            "the previous evaluate.prompts and env, and use `rlora eval --prompts` for a different number"
        )
    if not start or config.chat.template != start.config.chat.template:
        config = resume.with_template(config, task.chat)
    return Run(config, task, setup, path, start, observers)


def is_finished(path: UPath, config: Config, start: Bundle | None) -> bool:
    """Return whether the run in `path`, with the newest bundle `start`, has done all steps and written its final
    summary."""
    return bool(start and start.version >= config.steps and directory.is_complete(path, start.version))


def load_and_check(config: Config, report: Report = _log.info, load: Load = load_task) -> tuple[Task, Setup]:
    """Load the prompts and rewards of a config, and build the learner's setup.

    Raises RloraError for an error in config or data.
    """
    task = load(config)
    report_checks(task, report)
    setup = Setup.of(config, read_start(config))
    objective_of(config.algorithm, config.sampling.max_tokens)  # only to check it: the learner builds its own
    if config.learner.lr == "auto":
        base = AutoConfig.from_pretrained(task.base)
        kind, size = base.model_type, base.get_text_config().hidden_size
        report(
            f"learner.lr = auto: {auto_lr(config.learner, base):.2g}, by a rule fitted to supervised runs, for model "
            f"type {kind} and hidden size {size}"
        )
    return task, setup


def report_checks(task: Task, report: Report) -> None:
    """Report what the check of the reward functions has found, if anything."""
    if text := str(task.checked):
        report(text.encode("utf-8", "backslashreplace").decode())


def report_changes(changes: Mapping[str, tuple[Any, Any]], report: Report) -> None:
    """Report each changed field with its previous and its current value, as `config.differences` returns them."""
    for name, (previous, current) in changes.items():
        report(f"{name}: {previous!r} -> {current!r}")
