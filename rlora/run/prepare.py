"""Makes a run ready for the loop: a new one, one that goes on, or a fork. All that can be wrong is found here."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike
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
from rlora.run.source import reachable, split
from rlora.run.start import read_start
from rlora.settings import Config
from rlora.store import holds

PathOf = str | PathLike[str] | UPath | None
Tell = Callable[[str], object]  # is given a line for the user
Load = Callable[[Config], Task]

say = partial(print, flush=True)


@contextmanager
def prepared(
    config: Config, run_dir: PathOf = None, resume: PathOf = None, fork: str | None = None, overwrite: bool = False,
    observers: Sequence[Observer] = (), tell: Tell = say, load: Load = load_task,
) -> Iterator[Run]:  # fmt: skip
    """A run for the loop, which no other process is at meanwhile: a new one, a fork, or with `resume` one that goes on.

    `load` gives what a config trains on. Raises RloraError.
    """
    if not config.env:
        raise RloraError("env = '': a run needs one; write module:name or path/to/file.py:name")
    with ExitStack() as stack:
        if resume is not None:
            stack.enter_context(directory.held(reachable(str(resume))))
            run = resume_run(config, reachable(str(resume)), observers, tell, load)
        else:
            place = reachable(str(run_dir)) if run_dir is not None else None
            run = begin(config, place, overwrite, split(fork) if fork else None, observers, tell, load)
            stack.enter_context(directory.held(run.place))
        if run.task.dropped:
            tell(f"{run.task.dropped} prompts are longer than sampling.max_prompt_tokens and left out")
        tell(f"run: {run.place}" + (f", from version {run.start.version} on" if run.start else ""))
        yield run


def begin(
    config: Config, place: UPath | None = None, overwrite: bool = False, fork: tuple[UPath, int | None] | None = None,
    observers: Sequence[Observer] = (), tell: Tell = say, load: Load = load_task,
) -> Run:  # fmt: skip
    """A new run, in a directory that is made for it: under runs/ where `place` is None.

    With `fork`, a run and a version or its newest, it starts from that one. Raises RloraError.
    """
    as_given, start = config, None
    if fork:
        of, step = fork
        name = f"{of}@{step}" if step is not None else str(of)
        if overwrite and place and holds(place, of):
            raise RloraError(f"--fork {name}: --overwrite would remove it; name another --run-dir")
        config, start = resume.with_own_start(of, config), checkpoint.read_version(of, step)
        before = resume.with_own_start(of, start.config)
        check_same_policy(before, config, "--fork")
        tell_changes(differences(before, config), tell)
        if start.version >= config.steps:
            raise RloraError(f"steps = {config.steps}: {name} has done them all; give more by --steps N")
    task, setup = checked(config, tell, load)
    what = config.env.rpartition(":")[2].lower()
    place = place or UPath("runs") / f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    as_given, config = (resume.with_template(each, task.chat) for each in (as_given, config))
    directory.create(place, as_given, task, overwrite, resume.lineage(start) if start else None)
    config = resume.keep_start(place, config)
    return Run(config, task, setup, place, resume.adopt(start, place) if start else None, observers)


def resume_run(
    config: Config, place: UPath, observers: Sequence[Observer] = (), tell: Tell = say, load: Load = load_task
) -> Run:
    """A run that goes on from its newest whole bundle, under `config`. Raises RloraError."""
    origin = directory.Provenance.of(place)
    config, start = resume.with_own_start(place, config), checkpoint.newest(place, origin)
    if start:
        before = resume.with_own_start(place, start.config)
        check_same_policy(before, config, "--resume")
        tell_changes(changes := differences(before, config), tell)
        if changes and is_finished(place, config, start):
            raise RloraError(f"steps = {config.steps}: {place} has done them all; give more by --set steps=N")
    elif origin.forked_from:
        raise RloraError(f"{place}: its first bundle was never written; fork {origin.forked_from['run']} again")
    task, setup = checked(config, tell, load)
    measured = directory.summary(place).get("accuracy/prompts", 0)
    if measured and len(task.held_out) != measured:
        raise RloraError(
            f"evaluate.prompts = {config.evaluate.prompts}: the run's accuracy before was measured on {measured} "
            f"held-out prompts, and these are {len(task.held_out)}; leave it as it was: `rlora eval --prompts` "
            "measures on others"
        )
    if not start or config.chat.template != start.config.chat.template:
        config = resume.with_template(config, task.chat)
    return Run(config, task, setup, place, start, observers)


def is_finished(place: UPath, config: Config, start: Bundle | None) -> bool:
    """Whether all steps are done, and the summary that comes after them is written."""
    return bool(start and start.version >= config.steps and directory.summary(place).get("steps") == start.version)


def checked(config: Config, tell: Tell = say, load: Load = load_task) -> tuple[Task, Setup]:
    """What is trained on and how, once all that can be wrong with config and data has been looked at."""
    task = load(config)
    tell_checked(task, tell)
    setup = Setup.of(config, read_start(config))
    objective_of(config.algorithm, config.sampling.max_tokens)  # only checked here
    if config.learner.lr == "auto":
        base = AutoConfig.from_pretrained(task.base)
        kind, size = base.model_type, base.get_text_config().hidden_size
        tell(
            f"learner.lr = auto: {auto_lr(config.learner, base):.2g}, by a rule that was fitted on supervised runs, of "
            f"the base's kind ({kind}) and hidden size ({size})"
        )
    return task, setup


def tell_checked(task: Task, tell: Tell) -> None:
    """What trying the reward functions came to, where anything did."""
    if text := str(task.checked):
        tell(text.encode("utf-8", "backslashreplace").decode())


def tell_changes(changes: Mapping[str, tuple[Any, Any]], tell: Tell) -> None:
    for name, (was, now) in changes.items():
        tell(f"{name}: {was!r} -> {now!r}")
