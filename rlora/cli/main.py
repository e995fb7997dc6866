"""The command line: rlora train | sweep | eval | check | plan | replay | runs | export | grade | show ..."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import tyro
from upath import UPath

import rlora
from rlora.cli.arguments import COMMANDS, Check, Eval, Export, Grade, Runs, Scale, Show
from rlora.cli.completion import completion_command
from rlora.cli.grammar import UsageError
from rlora.cli.logs import show_log
from rlora.cli.overrides import parse_source
from rlora.cli.plan import plan_command
from rlora.cli.replay import replay_command
from rlora.cli.report import report_command
from rlora.cli.submit import jobs_command, submit_command
from rlora.cli.sweep import ask_command, fork_command, report_sweep, sweep_command
from rlora.cli.train import train_command
from rlora.config import validate
from rlora.records import BASE, STATUSES, Adapter, RewardError, RloraError
from rlora.run.source import read_run, split
from rlora.settings import CheckConfig, Config
from rlora.store import AnyPath, write_rows

# torch, transformers and Ray take seconds to import, so they are imported after the command line is parsed


def _usage() -> str:
    """List all commands with the first sentence of their help."""
    named: dict[type, list[str]] = {}
    for name, options in COMMANDS.items():
        named.setdefault(options, []).append(name)
    rows = {", ".join(names): " ".join(str(options.__doc__).split()) for options, names in named.items()}
    width = max(map(len, rows))
    commands = "\n".join(f"  {names:<{width}}  {text.split('. ')[0].rstrip('.')}." for names, text in rows.items())
    return (
        f"usage: rlora COMMAND ...\n\n{commands}\n\n"
        "`rlora COMMAND --help` documents every option, `rlora --version` prints the version."
    )


def main() -> None:
    """Run the command in sys.argv. Exits with status 0, 1 (an error, with a message), 2 (usage) or 130 (Ctrl-C)."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train_command, "sweep": sweep_command, "fork": fork_command, "eval": _eval, "check": _check,
        "plan": plan_command, "replay": replay_command, "runs": _runs, "report": report_command, "export": _export,
        "grade": _grade, "show": _show, "scale": _scale, "submit": submit_command, "jobs": jobs_command,
        "completion": completion_command,
        **{request: partial(ask_command, request) for request in ("pause", "go", "drop")},
    }  # fmt: skip
    show_log()
    try:
        _run(commands)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as in `rlora runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (RloraError, OSError) as error:
        print(f"rlora: {error}", *_notes(error), sep="\n", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt as error:
        print("rlora: interrupted", *_notes(error), sep="\n", file=sys.stderr)
        sys.exit(130)
    except SystemExit as error:  # after a signal, which was reported, or a usage message
        for note in _notes(error):
            print(note, file=sys.stderr)
        raise


def _run(commands: Mapping[str, Callable[[list[str]], None]]) -> None:
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command in ("-h", "--help", "--version"):
        print(f"rlora {rlora.__version__}" if command == "--version" else _usage())
    elif command in commands:
        commands[command](arguments)
    else:
        print((f"rlora: {command!r} is not a command\n\n" if command else "") + _usage(), file=sys.stderr)
        sys.exit(2)


def _notes(error: BaseException) -> Sequence[str]:
    return getattr(error, "__notes__", [])


def _scale(arguments: list[str]) -> None:
    options = tyro.cli(Scale, args=arguments, prog="rlora scale")
    most = read_run(options.run).engine.max_replicas
    if not 1 <= options.engines <= most:
        raise RloraError(
            f"engines = {options.engines}: the run's engine.max_replicas allows 1 to {most}; use a "
            "number in this range, or resume the run with a larger engine.max_replicas"
        )
    from rlora.run import directory

    directory.request_engines(options.run, options.engines)
    start = (
        "from its next step on" if directory.is_locked(options.run) else "once it is resumed; no process trains it now"
    )
    print(f"{options.run}: {options.engines} engines {start}")


def _eval(arguments: list[str]) -> None:
    options = parse_source(Eval, "rlora eval", arguments)
    config = options.config
    if options.prompts is not None:
        config = validate(replace(config, evaluate=replace(config.evaluate, prompts=options.prompts)))
    if options.samples < 1:
        raise RloraError(f"--samples {options.samples}: each prompt needs a completion; use 1 or more")
    if options.adapter:  # any rank: with learner.start_from the engine supports it
        config = replace(config, learner=replace(config.learner, start_from=str(options.adapter)))
    from rlora import cluster

    with cluster.starting(config, learn=False):  # Ray starts while this process imports torch and loads the prompts
        _evaluate(options, config)


def _evaluate(options: Eval, config: Config) -> None:
    from rlora import cluster
    from rlora.rollout.evaluate import answer, pass_at, rows, summarise
    from rlora.rollout.stream import sampling_of
    from rlora.rollout.task import ServedPolicy, load_task
    from rlora.run.prepare import report_checks

    adapter, name, out = _adapter_to_evaluate(options)
    task = load_task(config)
    report_checks(task, print)
    if not config.evaluate.prompts:
        raise RloraError("evaluate.prompts = 0: there is no prompt to evaluate on; set --prompts to 1 or more")
    if not task.held_out:
        raise RloraError(
            f"env = {config.env!r}: held_out() returned no prompt of 1 to {config.sampling.max_prompt_tokens} tokens "
            f"(among the first evaluate.prompts = {config.evaluate.prompts}); return such prompts from held_out(), or "
            "raise sampling.max_prompt_tokens"
        )
    greedy = options.samples == 1 and options.temperature is None
    sampling = sampling_of(config, options.samples, 0.0 if greedy else options.temperature)
    served = ServedPolicy(adapter.policy, config, task)
    with cluster.start([served], learn=False) as job:
        fleet, loops = job.fleet, job.loops
        fleet.swap(adapter)
        try:
            groups = answer(config, task.held_out, sampling, fleet, loops[adapter.policy])
        except RewardError as error:
            write_rows(out, rows(error.groups))
            raise RloraError(f"{error}\nThe completions are saved in {out}") from error
    write_rows(out, rows(groups))
    result = summarise(groups)
    decoding = "greedy" if greedy else f"{options.samples} at temperature {sampling.temperature:g}"
    print(f"{name}: {len(groups)} held-out prompts, completions per prompt: {decoding}")
    for k in sorted({min(2**power, options.samples) for power in range(options.samples.bit_length() + 1)}):
        print(f"  pass@{k}  {pass_at(k, groups)}")
    print(f"  mean reward {result.reward:.3f}; {', '.join(f'{n} {status}' for status, n in result.statuses.items())}")
    print(f"  each completion with its verdict: {out}")


def _adapter_to_evaluate(options: Eval) -> tuple[Adapter, str, AnyPath]:
    """Return the adapter to evaluate, its name, and the file for its completions."""
    from rlora.run import checkpoint
    from rlora.run.start import base_in_ram, read, without_base_weights

    run, step = split(options.source)
    if options.adapter or options.base or options.source.endswith(".toml"):
        if step is not None or (options.adapter and options.base):
            raise RloraError("RUN@STEP, --adapter and --base: each selects what is evaluated; use only one")
        adapter = BASE
        if options.adapter:
            files = read(options.adapter)
            try:
                adapter = Adapter("given", 0, *without_base_weights(*files, partial(base_in_ram, options.config)))
            except RloraError as error:
                raise RloraError(f"--adapter {options.adapter}: {error}") from error
        return adapter, str(options.adapter or options.config.model), options.out or UPath("eval.jsonl")
    adapter = checkpoint.read_version(run, step).adapter
    out = options.out or run / f"eval-{adapter.number}.jsonl"
    return adapter, f"{run.name} version {adapter.number}", out


def _grade(arguments: list[str]) -> None:
    options = tyro.cli(Grade, args=arguments, prog="rlora grade")
    from rlora.scoring.grading import grade, read_rows
    from rlora.scoring.worker import Setup

    for field in ("deadline", "workers"):
        if getattr(options, field) <= 0:
            raise RloraError(f"--{field} {getattr(options, field):g}: not a positive number; use a number above 0")
    if options.out.resolve() == options.file.resolve():
        raise RloraError(f"--out {options.out}: it is the file to grade; name a different file")
    table = read_rows(options.file)
    setup = Setup(
        (options.reward,), options.style, directory=str(Path.cwd()), deadline=options.deadline,
        first_deadline=options.first_deadline,
    )  # fmt: skip
    start = time.perf_counter()
    graded = grade(table, setup, options.workers, options.threshold)
    seconds = time.perf_counter() - start
    write_rows(options.out, graded)
    counts = {status: sum(row["status"] == status for row in graded) for status in STATUSES}
    print(f"{len(graded)} rows in {seconds:.1f} s: {', '.join(f'{n} {status}' for status, n in counts.items() if n)}")
    if failed := [row["detail"] for row in graded if row["status"] == "error"]:
        print(f"first error: {failed[0]}", file=sys.stderr)


def _check(arguments: list[str]) -> None:
    options = parse_source(Check, "rlora check", arguments)
    if options.config.algorithm.supervised:
        raise RloraError(
            f"algorithm.loss = {options.config.algorithm.loss!r}: there is no reward function to check; look at an "
            "example with `rlora show prompt CONFIG`"
        )
    if not options.config.check.prompts:
        raise RloraError("check.prompts = 0: there is no prompt to try; set check.prompts to 1 or more")
    from rlora.rollout.task import load_task
    from rlora.run.prepare import report_checks

    task = load_task(options.config)
    report = task.checked
    print(f"{report.prompts} prompts tried in {report.seconds:.2g} s with {', '.join(options.config.rewards)}: "
          f"{len(report.faults) or 'no'} {'fault' if len(report.faults) == 1 else 'faults'}")  # fmt: skip
    report_checks(task, print)
    if report.faults:
        sys.exit(1)


def _show(arguments: list[str]) -> None:
    options = parse_source(Show, "rlora show", arguments)
    from rlora.rollout.task import load_task

    task = load_task(replace(options.config, check=CheckConfig(prompts=0)))
    if not 0 <= options.number < len(task.prompts):
        raise RloraError(
            f"--number {options.number}: there are {len(task.prompts)} training prompts, counted from 0; use 0 to "
            f"{len(task.prompts) - 1}"
        )
    prompt = task.prompts[options.number]
    ends = [task.chat.decode([token]) for token in task.chat.stop_token_ids] + list(task.stop)
    print(f"{task.chat.decode(prompt.token_ids)}\n--- {len(prompt.token_ids)} tokens; answer {prompt.answer!r}; "
          f"the policy's message ends with {' or '.join(map(repr, ends))}")  # fmt: skip
    if prompt.columns:
        print(f"--- columns {dict(prompt.columns)!r}")
    for number, episode in enumerate(task.examples[options.number].episodes if task.examples else ()):
        label = ("chosen", "rejected")[number] if len(prompt.completions) > 1 else "completion"
        learned = f"{episode.sampled_tokens} of {len(episode.completion_ids)} tokens are learned from"
        print(f"--- {label}: {learned}\n{task.chat.decode(episode.completion_ids)}")


def _runs(arguments: list[str]) -> None:
    options = tyro.cli(Runs, args=arguments, prog="rlora runs")
    from rich.console import Console
    from rich.table import Column, Table

    from rlora.run.history import list_runs
    from rlora.sweeps.diary import DIARY, SWEEP, complete_lines, member_states

    columns = Column("run", no_wrap=True), "status", "steps", "best reward", "accuracy", "from"
    table = Table(*columns, box=None)
    is_sweep = (options.directory / SWEEP).exists()
    states = member_states(complete_lines(Path(str(options.directory)) / DIARY))
    for run in list_runs(options.directory):
        state = states.get(run.name)
        status = state.status if state and state.status not in ("running", "waiting") else run.status
        table.add_row(*asdict(replace(run, status=status)).values())
    if not table.row_count:
        raise RloraError(f"{options.directory}: it contains no runs; name the directory that contains them")
    Console(width=None if sys.stdout.isatty() else 200).print(table)  # one line per run for programs that read lines
    if is_sweep:
        report_sweep(Path(str(options.directory)), options.plot)
    elif options.plot:
        raise RloraError(
            f"--plot {options.plot}: {options.directory} is not a sweep; name a directory that `rlora sweep` made"
        )


def _export(arguments: list[str]) -> None:
    options = tyro.cli(Export, args=arguments, prog="rlora export")
    if options.dtype and not options.merge:
        raise RloraError(f"--dtype {options.dtype}: it applies to merged weights only; add --merge, or remove it")
    run, step = split(options.run)
    read_run(run)  # raises if there is no run
    from rlora.run import checkpoint
    from rlora.run.export import export

    print(
        export(
            run,
            checkpoint.read_version(run, step),
            options.to,
            (options.dtype or "bfloat16") if options.merge else None,
        )
    )
