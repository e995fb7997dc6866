"""The command line: rlora train | eval | check | replay | runs | export | grade | show | scale."""

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from upath import UPath

import rlora
from rlora.cli.overrides import (
    Check,
    Eval,
    Export,
    Grade,
    Replay,
    Runs,
    Scale,
    Show,
    Train,
    differences,
    parse_check,
    parse_eval,
    parse_replay,
    parse_show,
    parse_train,
    read_run,
    refuse_another_policy,
    split,
)
from rlora.config import CheckConfig, Config, validate
from rlora.records import BASE, STATUSES, Adapter, RewardError, RloraError
from rlora.store import Place, holds, write_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlora.rollout.task import Task
    from rlora.run.checkpoint import Bundle
    from rlora.run.replay import Replayed

# torch, transformers and Ray take seconds to import: that waits until the command line is understood

_USAGE = f"""usage: rlora COMMAND ...

  train     {Train.__doc__}
  eval      {Eval.__doc__}
  check     {Check.__doc__}
  replay    {Replay.__doc__}
  runs      {Runs.__doc__}
  export    {Export.__doc__}
  grade     {Grade.__doc__}
  show      {Show.__doc__}
  scale     {Scale.__doc__}

`rlora COMMAND --help` documents every option, `rlora --version` prints the version."""


def main() -> None:
    """Run the command in sys.argv; exits with 0, 1 (an error that its message explains), 2 (usage) or 130 (Ctrl-C)."""
    commands = {
        "train": _train, "eval": _eval, "check": _check, "replay": _replay, "runs": _runs, "export": _export,
        "grade": _grade, "show": _show, "scale": _scale,
    }  # fmt: skip
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command in ("-h", "--help", "--version"):
        print(f"rlora {rlora.__version__}" if command == "--version" else _USAGE)
        sys.exit(0)
    if command not in commands:
        print((f"rlora: {command!r} is no command\n\n" if command else "") + _USAGE, file=sys.stderr)
        sys.exit(2)
    try:
        commands[command](arguments)
    except (RloraError, OSError) as error:
        print(f"rlora: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("rlora: interrupted", file=sys.stderr)
        sys.exit(130)


def _train(arguments: list[str]) -> None:
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
        _tell_changes(changes := differences(before, config))
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
        _tell_changes(differences(before, config))
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

    from rlora.core.learner import first_adapter
    from rlora.core.optimizer import auto_lr
    from rlora.rollout.task import load_task

    task = load_task(config)
    _tell_checked(task)
    first_adapter(config.learner, partial(_base, config))  # only checked here: the learner's process reads it
    if config.learner.lr == "auto":
        base = AutoConfig.from_pretrained(task.base)
        print(f"learner.lr = auto: {auto_lr(config, base):.2g}, by a rule that was fitted on supervised runs, of the "
              f"base's kind ({base.model_type}) and hidden size ({base.get_text_config().hidden_size})")  # fmt: skip
    return task


def _base(config: Config) -> "PreTrainedModel":
    """The frozen base in RAM, to compare weights with."""
    import torch

    from rlora.machine import DTYPES
    from rlora.model.base import load_base, locate

    return load_base(locate(config.model), DTYPES[config.dtype], torch.device("cpu"))


def _tell_changes(changes: dict[str, tuple[Any, Any]]) -> None:
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


def _scale(arguments: list[str]) -> None:
    given = tyro.cli(Scale, args=arguments, prog="rlora scale")
    most = read_run(given.run).engine.max_replicas
    if not 1 <= given.engines <= most:
        raise RloraError(f"engines = {given.engines}: the run's engine.max_replicas lets it have 1 to {most}")
    from rlora.run import directory

    directory.ask_for_engines(given.run, given.engines)
    when = "from its next step on" if directory.is_held(given.run) else "once it goes on: no process trains it now"
    print(f"{given.run}: {given.engines} engines {when}")


def _eval(arguments: list[str]) -> None:
    given = parse_eval(arguments)
    config = given.config
    if given.prompts is not None:
        config = validate(replace(config, evaluate=replace(config.evaluate, prompts=given.prompts)))
    if given.samples < 1:
        raise RloraError(f"--samples {given.samples}: give 1 or more")
    adapter, name, out = _adapter_to_evaluate(given)
    if given.adapter:  # of any rank
        config = replace(config, learner=replace(config.learner, start_from=str(given.adapter)))
    from rlora import cluster
    from rlora.rollout.evaluate import answer, pass_at, rows, summarise
    from rlora.rollout.stream import sampling_of
    from rlora.rollout.task import load_task

    task = load_task(config)
    _tell_checked(task)
    if not task.held_out:
        raise RloraError(
            f"env = {config.env!r}: none of its first evaluate.prompts = {config.evaluate.prompts} held-out prompts "
            "can be used; give --prompts where that is 0, or let held_out() return some"
        )
    greedy = given.samples == 1 and given.temperature is None
    sampling = sampling_of(config, given.samples, 0.0 if greedy else given.temperature)
    with cluster.start(config, task, name, learn=False) as (_, fleet, loop):
        fleet.swap(adapter)
        try:
            groups = answer(config, task.held_out, sampling, fleet, loop)
        except RewardError as error:
            write_rows(out, rows(error.groups))
            raise RloraError(f"{error}\nThe completions are kept in {out}") from error
    write_rows(out, rows(groups))
    result = summarise(groups)
    each = "greedy" if greedy else f"{given.samples} at temperature {sampling.temperature:g}"
    print(f"{name}: {len(groups)} held-out prompts, completions a prompt: {each}")
    for k in sorted({min(2**power, given.samples) for power in range(given.samples.bit_length() + 1)}):
        print(f"  pass@{k}  {pass_at(k, groups)}")
    print(f"  mean reward {result.reward:.3f}; {', '.join(f'{n} {status}' for status, n in result.statuses.items())}")
    print(f"  each completion with its verdict: {out}")


def _adapter_to_evaluate(given: Eval) -> tuple[Adapter, str, Place]:
    """The adapter that is asked for, what it is called, and where its completions go."""
    from rlora.core import peft_format
    from rlora.run import checkpoint

    run, step = split(given.source)
    if given.adapter or given.base or given.source.endswith(".toml"):
        if step is not None or (given.adapter and given.base):
            raise RloraError("RUN@STEP, --adapter and --base: each names what to evaluate; give one of them")
        adapter = BASE
        if given.adapter:
            files = peft_format.read(given.adapter)
            try:
                adapter = Adapter("given", 0, *peft_format.plain(*files, partial(_base, given.config)))
            except RloraError as error:
                raise RloraError(f"--adapter {given.adapter}: {error}") from error
        return adapter, str(given.adapter or "base"), given.out or UPath("eval.jsonl")
    adapter = checkpoint.read_version(run, step).adapter
    out = given.out or run / f"eval-{adapter.version}.jsonl"
    return adapter, f"{run.name} version {adapter.version}", out


def _grade(arguments: list[str]) -> None:
    given = tyro.cli(Grade, args=arguments, prog="rlora grade")
    from rlora.scoring.grading import grade, read_rows
    from rlora.scoring.worker import Setup

    for field in ("deadline", "workers"):
        if getattr(given, field) <= 0:
            raise RloraError(f"--{field} {getattr(given, field):g}: give more than 0")
    if given.out.resolve() == given.file.resolve():
        raise RloraError(f"--out {given.out}: that is the file to grade; name another")
    table = read_rows(given.file)
    setup = Setup(
        (given.reward,), given.style, directory=str(Path.cwd()), deadline=given.deadline,
        first_deadline=given.first_deadline,
    )  # fmt: skip
    start = time.perf_counter()
    graded = grade(table, setup, given.workers, given.threshold)
    seconds = time.perf_counter() - start
    write_rows(given.out, graded)
    counts = {status: sum(row["status"] == status for row in graded) for status in STATUSES}
    print(f"{len(graded)} rows in {seconds:.1f} s: {', '.join(f'{n} {status}' for status, n in counts.items() if n)}")
    if failed := [row["detail"] for row in graded if row["status"] == "error"]:
        print(f"the first error: {failed[0]}", file=sys.stderr)


def _check(arguments: list[str]) -> None:
    given = parse_check(arguments)
    if not given.config.check.prompts:
        raise RloraError("check.prompts = 0: that tries nothing; give 1 or more")
    from rlora.rollout.task import load_task

    task = load_task(given.config)
    report = task.checked
    print(f"{report.prompts} prompts tried in {report.seconds:.1f} s with {', '.join(given.config.rewards)}: "
          f"{len(report.faults) or 'no'} {'fault' if len(report.faults) == 1 else 'faults'}")  # fmt: skip
    _tell_checked(task)
    if report.faults:
        sys.exit(1)


def _tell_checked(task: "Task") -> None:
    if text := str(task.checked):
        print(text.encode("utf-8", "backslashreplace").decode(), flush=True)


def _show(arguments: list[str]) -> None:
    given = parse_show(arguments)
    from rlora.rollout.task import load_task

    task = load_task(replace(given.config, check=CheckConfig(prompts=0)))
    if not 0 <= given.number < len(task.prompts):
        raise RloraError(f"--number {given.number}: there are {len(task.prompts)} training prompts, from 0")
    prompt = task.prompts[given.number]
    ends = [task.chat.shown([token]) for token in task.chat.stop_token_ids] + list(task.stop)
    print(f"{task.chat.shown(prompt.token_ids)}\n--- {len(prompt.token_ids)} tokens; answer {prompt.answer!r}; "
          f"the policy's message ends with {' or '.join(map(repr, ends))}")  # fmt: skip
    if prompt.columns:
        print(f"--- columns {dict(prompt.columns)!r}")


def _replay(arguments: list[str]) -> None:
    given = parse_replay(arguments)
    from itertools import groupby

    from rlora import cluster, machine
    from rlora.model.base import locate
    from rlora.run import checkpoint, resume
    from rlora.run.replay import pairs, replay, updates

    run, step = split(given.run)
    refuse_another_policy(read_run(run), given.config, "rlora replay")
    step = given.step if step is None else step
    steps = updates(checkpoint.versions(run), step)
    if not steps:
        raise RloraError(f"{run}: no two bundles in a row are kept (config: checkpoint.keep_last)")

    done, changed = [], False
    for made_under, of in groupby(pairs(run, steps), key=lambda pair: pair[1].config):
        asked = parse_replay(arguments, made_under).config
        _tell_changes(changes := differences(made_under, asked))
        changed |= bool(changes)
        config = resume.with_own_start(run, asked)
        with cluster.learning(config, locate(config.model), run.name) as learner:
            for before, after in of:
                what, made_on = f"step {before.version}", after.origin.machine
                if after.update is None and step is None:
                    print(f"{what}: its episodes were not kept (checkpoint.episodes_mib)")
                    continue
                if made_on != machine.name():
                    print(f"{what}: made on another machine ({made_on}; this is {machine.name()})")
                done.append(replay(learner, before, after))
                _tell_replayed(done[-1])
    exact = sum(each.exact and each.exact_state for each in done)
    left_out = f"; {len(steps) - len(done)} left out" if len(done) < len(steps) else ""
    print(f"{exact} of {len(done)} updates bit for bit{left_out}")
    if not done:
        raise RloraError(f"{run}: no step could be replayed; what is wrong with each is told above")
    if exact < len(done) and not changed:
        raise RloraError(f"{run}: {len(done) - exact} updates did not come out as they were saved")


def _tell_replayed(each: "Replayed") -> None:
    figures = {
        name: value for name, value in asdict(each.stats).items() if isinstance(value, float) and name != "seconds"
    }
    verdict = "bit for bit"
    if not each.exact:
        verdict = f"differs by up to {each.off:.3g}, of an update of up to {each.moved:.3g}"
    elif not each.exact_state:
        verdict = "the adapter bit for bit, but not the optimizer's state"
    print(
        f"step {each.step}: {verdict}; " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()),
        flush=True,
    )


def _runs(arguments: list[str]) -> None:
    given = tyro.cli(Runs, args=arguments, prog="rlora runs")
    from rich.console import Console
    from rich.table import Column, Table

    from rlora.run.history import past_runs

    columns = Column("run", no_wrap=True), "status", "steps", "best reward", "accuracy", "forked from"
    table = Table(*columns, box=None)
    for past in past_runs(given.directory):
        table.add_row(*asdict(past).values())
    if not table.row_count:
        raise RloraError(f"{given.directory}: no runs lie there; name the directory that they are in")
    Console(width=None if sys.stdout.isatty() else 200).print(table)  # for what reads lines, one a run


def _export(arguments: list[str]) -> None:
    given = tyro.cli(Export, args=arguments, prog="rlora export")
    if given.dtype and not given.merge:
        raise RloraError(f"--dtype {given.dtype}: it is of merged weights; add --merge, or leave it out")
    run, step = split(given.run)
    read_run(run)  # or it says that no run is there
    from rlora.run import checkpoint
    from rlora.run.export import export

    print(
        export(run, checkpoint.read_version(run, step), given.to, (given.dtype or "bfloat16") if given.merge else None)
    )
