"""The command line: rlora train | sweep | eval | check | plan | replay | runs | export | grade | show ..."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from upath import UPath

import rlora
from rlora.cli.arguments import Check, Eval, Export, Fork, Grade, Jobs, Plan, Replay, Runs, Scale, Show, Sweep, Train
from rlora.cli.overrides import (
    parse_check,
    parse_eval,
    parse_replay,
    parse_show,
)
from rlora.cli.plan import plan_command
from rlora.cli.submit import jobs_command, submit_command
from rlora.cli.sweep import ask_command, fork_command, sweep_command, tell_sweep
from rlora.cli.train import train_command
from rlora.config import check_same_policy, differences, validate
from rlora.records import BASE, STATUSES, Adapter, RewardError, RloraError
from rlora.run.source import read_run, split
from rlora.store import Place, write_rows
from rlora.watch_settings import CheckConfig

if TYPE_CHECKING:
    from rlora.run.replay import Replayed

# torch, transformers and Ray take seconds to import: that waits until the command line is understood

_USAGE = f"""usage: rlora COMMAND ...

  train     {Train.__doc__}
  sweep     {Sweep.__doc__}
  pause, go, drop   Ask a sweep to pause a member, to go on with it, or to drop it.
  fork      {Fork.__doc__}
  eval      {Eval.__doc__}
  check     {Check.__doc__}
  plan      {Plan.__doc__}
  replay    {Replay.__doc__}
  runs      {Runs.__doc__}
  export    {Export.__doc__}
  grade     {Grade.__doc__}
  show      {Show.__doc__}
  scale     {Scale.__doc__}
  submit    Train on a Ray cluster, as a job of it, and follow it.
  jobs      {Jobs.__doc__}

`rlora COMMAND --help` documents every option, `rlora --version` prints the version."""


def main() -> None:
    """Run the command in sys.argv; exits with 0, 1 (an error that its message explains), 2 (usage) or 130 (Ctrl-C)."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train_command, "eval": _eval, "check": _check, "plan": plan_command, "replay": _replay, "runs": _runs,
        "export": _export, "grade": _grade, "show": _show, "scale": _scale, "submit": submit_command,
        "jobs": jobs_command, "sweep": sweep_command, "fork": fork_command,
        **{what: partial(ask_command, what) for what in ("pause", "go", "drop")},
    }  # fmt: skip
    try:
        _run(commands)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as in `rlora runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (RloraError, OSError) as error:
        print(f"rlora: {error}", *_notes(error), sep="\n", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        print("rlora: interrupted", *_notes(error), sep="\n", file=sys.stderr)
        sys.exit(130)
    except SystemExit as error:  # by a signal, which has been told, or after a usage message
        for note in _notes(error):
            print(note, file=sys.stderr)
        raise


def _run(commands: Mapping[str, Callable[[list[str]], None]]) -> None:
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command in ("-h", "--help", "--version"):
        print(f"rlora {rlora.__version__}" if command == "--version" else _USAGE)
    elif command in commands:
        commands[command](arguments)
    else:
        print((f"rlora: {command!r} is no command\n\n" if command else "") + _USAGE, file=sys.stderr)
        sys.exit(2)


def _notes(error: BaseException) -> Sequence[str]:
    return getattr(error, "__notes__", [])


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
    from rlora.rollout.task import ServedPolicy, load_task
    from rlora.run.prepare import tell_checked

    task = load_task(config)
    tell_checked(task, print)
    if not task.held_out:
        raise RloraError(
            f"env = {config.env!r}: none of its first evaluate.prompts = {config.evaluate.prompts} held-out prompts "
            "can be used; give --prompts where that is 0, or let held_out() return some"
        )
    greedy = given.samples == 1 and given.temperature is None
    sampling = sampling_of(config, given.samples, 0.0 if greedy else given.temperature)
    served = ServedPolicy(adapter.policy, config, task)
    with cluster.start([served], learn=False) as job:
        fleet, loops = job.fleet, job.loops
        fleet.swap(adapter)
        try:
            groups = answer(config, task.held_out, sampling, fleet, loops[adapter.policy])
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
    from rlora.run import checkpoint
    from rlora.run.start import base_in_ram, plain, read

    run, step = split(given.source)
    if given.adapter or given.base or given.source.endswith(".toml"):
        if step is not None or (given.adapter and given.base):
            raise RloraError("RUN@STEP, --adapter and --base: each names what to evaluate; give one of them")
        adapter = BASE
        if given.adapter:
            files = read(given.adapter)
            try:
                adapter = Adapter("given", 0, *plain(*files, partial(base_in_ram, given.config)))
            except RloraError as error:
                raise RloraError(f"--adapter {given.adapter}: {error}") from error
        return adapter, str(given.adapter or given.config.model), given.out or UPath("eval.jsonl")
    adapter = checkpoint.read_version(run, step).adapter
    out = given.out or run / f"eval-{adapter.number}.jsonl"
    return adapter, f"{run.name} version {adapter.number}", out


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
    from rlora.run.prepare import tell_checked

    task = load_task(given.config)
    report = task.checked
    print(f"{report.prompts} prompts tried in {report.seconds:.2g} s with {', '.join(given.config.rewards)}: "
          f"{len(report.faults) or 'no'} {'fault' if len(report.faults) == 1 else 'faults'}")  # fmt: skip
    tell_checked(task, print)
    if report.faults:
        sys.exit(1)


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
    from rlora.core.setup import Setup
    from rlora.model.base import locate
    from rlora.run import checkpoint, resume
    from rlora.run.prepare import tell_changes
    from rlora.run.replay import pairs, replay, updates
    from rlora.run.start import read_start

    run, step = split(given.run)
    check_same_policy(read_run(run), given.config, "rlora replay")
    step = given.step if step is None else step
    steps = updates(checkpoint.versions(run), step)
    if not steps:
        raise RloraError(f"{run}: no two bundles in a row are kept (config: checkpoint.keep_last)")

    done, changed = [], False
    for made_under, of in groupby(pairs(run, steps), key=lambda pair: pair[1].config):
        asked = parse_replay(arguments, made_under).config
        tell_changes(changes := differences(made_under, asked), print)
        changed |= bool(changes)
        config = resume.with_own_start(run, asked)
        setup = Setup.of(config, read_start(config))
        with cluster.learning(config, locate(config.model)) as learner:
            for before, after in of:
                what, made_on = f"version {after.version}", after.origin.machine
                if after.update is None and step is None:
                    print(f"{what}: its episodes were not kept (checkpoint.episodes_mib)")
                    continue
                if made_on != machine.name():
                    print(f"{what}: made on another machine ({made_on}; this is {machine.name()})")
                done.append(replay(learner, setup, before, after))
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
        if each.rows_were_shared:
            verdict += " (made by a release in which policy and critic shared rows, so sums were rounded otherwise)"
    elif not each.exact_state:
        verdict = "the adapter bit for bit, but not the optimizer's state"
    print(
        f"version {each.step} -> {each.step + 1}: {verdict}; "
        + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()),
        flush=True,
    )


def _runs(arguments: list[str]) -> None:
    given = tyro.cli(Runs, args=arguments, prog="rlora runs")
    from rich.console import Console
    from rich.table import Column, Table

    from rlora.run.history import list_runs
    from rlora.sweeps.diary import DIARY, SWEEP, fates, whole_lines

    columns = Column("run", no_wrap=True), "status", "steps", "best reward", "accuracy", "forked from"
    table = Table(*columns, box=None)
    is_sweep, known = (given.directory / SWEEP).exists(), fates(whole_lines(Path(str(given.directory)) / DIARY))
    for past in list_runs(given.directory):
        fate = known.get(past.name)
        status = fate.status if fate and fate.status not in ("running", "waiting") else past.status
        table.add_row(*asdict(replace(past, status=status)).values())
    if not table.row_count:
        raise RloraError(f"{given.directory}: no runs lie there; name the directory that they are in")
    Console(width=None if sys.stdout.isatty() else 200).print(table)  # for what reads lines, one a run
    if is_sweep:
        tell_sweep(Path(str(given.directory)), given.plot)
    elif given.plot:
        raise RloraError(
            f"--plot {given.plot}: {given.directory} is no sweep; name a directory that `rlora sweep` made"
        )


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
