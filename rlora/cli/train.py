"""`rlora train`: what a run starts with or goes on from, and the table at its end."""

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from upath import UPath

from rlora.cli.arguments import Train
from rlora.cli.overrides import (
    differences,
    parse_train,
    refuse_another_policy,
    split,
)
from rlora.records import RloraError
from rlora.settings import Config
from rlora.store import holds

if TYPE_CHECKING:
    from rlora.rollout.task import Task
    from rlora.run.checkpoint import Bundle

# torch, transformers and Ray take seconds to import: that waits until the command line is understood


def train_command(arguments: list[str]) -> None:
    given = parse_train(arguments)
    from rlora.run import directory
    from rlora.train import train

    with ExitStack() as stack:  # no other process is at the run meanwhile
        if given.resume:
            stack.enter_context(directory.held(given.resume))
            config, task, run, start = _resumed(given, given.resume)
        else:
            config, task, run, start = _begun(given)
            stack.enter_context(directory.held(run))
        if task.dropped:
            print(f"{task.dropped} prompts are longer than sampling.max_prompt_tokens and left out")
        print(f"run: {run}" + (f", from version {start.version} on" if start else ""), flush=True)
        try:
            if not _finished(run, config, start):  # else who restarts what ended is told the same again
                train(config, task, run, start)
        except BaseException:
            print(f"`rlora train --resume {run}` goes on from what is saved there", file=sys.stderr)
            raise
        _report(run, task.base, config.learner.whole)


def _resumed(given: Train, run: UPath) -> tuple[Config, "Task", UPath, "Bundle | None"]:
    """What to go on with in a run's own directory."""
    from rlora.run import checkpoint, directory, resume

    origin = directory.Origin.of(run)
    config, start = resume.with_own_start(run, given.config), checkpoint.newest(run, origin)
    if start:
        before = resume.with_own_start(run, start.config)
        refuse_another_policy(before, config, "--resume")
        tell_changes(changes := differences(before, config))
        if changes and _finished(run, config, start):
            raise RloraError(f"steps = {config.steps}: {run} has done them all; give more by --set steps=N")
    elif origin.forked_from:
        raise RloraError(f"{run}: its first bundle was never written; fork {origin.forked_from['run']} again")
    task = _checked(config)
    measured = directory.summary(run).get("accuracy/prompts", 0)
    if measured and len(task.held_out) != measured:
        raise RloraError(
            f"evaluate.prompts = {config.evaluate.prompts}: the run's accuracy before was measured on {measured} "
            f"held-out prompts, and these are {len(task.held_out)}; leave it as it was: `rlora eval --prompts` "
            "measures on others"
        )
    if not start or config.chat.template != start.config.chat.template:
        config = resume.with_template(config, task.chat)
    return config, task, run, start


def _finished(run: UPath, config: Config, start: "Bundle | None") -> bool:
    """Whether all steps are done, and the summary that comes after them is written."""
    from rlora.run import directory

    return bool(start and start.version >= config.steps and directory.summary(run).get("steps") == start.version)


def _begun(given: Train) -> tuple[Config, "Task", UPath, "Bundle | None"]:
    """What a new run starts with, in a directory that is made for it."""
    from rlora.run import checkpoint, directory, resume

    config, start = given.config, None
    if given.fork:
        of, step = split(given.fork)
        if given.overwrite and given.run_dir and holds(given.run_dir, of):
            raise RloraError(f"--fork {given.fork}: --overwrite would remove it; name another --run-dir")
        config, start = resume.with_own_start(of, config), checkpoint.read_version(of, step)
        before = resume.with_own_start(of, start.config)
        refuse_another_policy(before, config, "--fork")
        tell_changes(differences(before, config))
        if start.version >= config.steps:
            raise RloraError(f"steps = {config.steps}: {given.fork} has done them all; give more by --steps N")
    task = _checked(config)
    run = given.run_dir or UPath("runs") / f"{config.env.rpartition(':')[2].lower()}-{time.strftime('%Y%m%d-%H%M%S')}"
    as_given, config = (resume.with_template(each, task.chat) for each in (given.config, config))
    directory.create(run, as_given, task, given.overwrite, resume.lineage(start) if start else None)
    return resume.keep_start(run, config), task, run, resume.adopt(start, run) if start else None


def _checked(config: Config) -> "Task":
    """The task, once all that can be wrong with config and data has been looked at."""
    from transformers import AutoConfig

    from rlora.core.objectives import objective_of
    from rlora.model.base import auto_lr
    from rlora.rollout.task import load_task
    from rlora.run.start import read_start

    task = load_task(config)
    tell_checked(task)
    read_start(config), objective_of(config.algorithm, config.sampling.max_tokens)  # only checked here
    if config.learner.lr == "auto":
        base = AutoConfig.from_pretrained(task.base)
        kind, size = base.model_type, base.get_text_config().hidden_size
        print(f"learner.lr = auto: {auto_lr(config.learner, base):.2g}, by a rule that was fitted on supervised runs, "
              f"of the base's kind ({kind}) and hidden size ({size})")  # fmt: skip
    return task


def tell_changes(changes: dict[str, tuple[Any, Any]]) -> None:
    for name, (was, now) in changes.items():
        print(f"{name}: {was!r} -> {now!r}")


def _report(run: UPath, base: str, whole: bool) -> None:
    """The table at the end of a run, and what to do next."""
    from rich.console import Console
    from rich.table import Column, Table

    from rlora.run import directory

    summary = directory.summary(run)
    table = Table("", Column("", overflow="fold"), title="What it gained", show_header=False)
    if "accuracy/prompts" in summary:
        table.add_row("held-out prompts, answered greedily", str(summary["accuracy/prompts"]))
    for when in ("before", "after"):
        if (accuracy := summary.get(f"accuracy/{when}")) is not None:
            table.add_row(f"accuracy {when}", f"{accuracy:.3f}")
    table.add_row("steps", str(summary["steps"]))
    table.add_row("wall time", f"{summary['time/total']:.0f} s, of which training {summary['time/train']:.0f} s")
    table.add_row(
        "all weights" if whole else "adapter",
        f"{summary['adapter/parameters']:,} parameters, {summary['adapter/bytes']:,} bytes",
    )
    table.add_row("where it lies", summary["adapter/path"])
    Console().print(table)
    print(f"Evaluate it again, or go on to N steps in all:\n  rlora eval {run}")
    print(f"  rlora train --resume {run} --set steps=N")
    if whole:
        print(f"Load it:\n  policy = AutoModelForCausalLM.from_pretrained({summary['adapter/path']!r})")
        return
    print(f"Load it with PEFT:\n  base = AutoModelForCausalLM.from_pretrained({base!r})")
    print(f"  policy = PeftModel.from_pretrained(base, {summary['adapter/path']!r})")


def tell_checked(task: "Task") -> None:
    if text := str(task.checked):
        print(text.encode("utf-8", "backslashreplace").decode(), flush=True)
