"""The command line: rlora train | eval | export."""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from rlora.config import Config, read, refuse_unlearnable, validate
from rlora.records import RloraError

# torch, transformers and Ray take seconds to import: that waits until the command line is understood


@dataclass(frozen=True)
class Train:
    """Train a policy. FILE is a TOML config; every field below overrides what it says."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    file: tyro.conf.Positional[Path | None] = None
    """A TOML config, such as launch/arithmetic.toml."""
    run_dir: Path | None = None
    """Where the run goes; a fresh directory under runs/ by default."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the run that is in --run-dir."""
    resume: Path | None = None
    """Go on with the run in this directory, under its own config; only --steps may be given beside it."""


@dataclass(frozen=True)
class Eval:
    """Answer the held-out prompts of a run greedily, under one of its adapters."""

    run: tyro.conf.Positional[Path]
    """The run's directory."""
    version: int | None = None
    """The adapter version; the last one by default, 0 is what the run started from."""


@dataclass(frozen=True)
class Export:
    """Write an adapter of a run in PEFT's format, or the whole model with the adapter merged into it."""

    run: tyro.conf.Positional[Path]
    """The run's directory."""
    to: Path
    """The directory to write; it must not be there yet."""
    version: int | None = None
    """The adapter version; the last one by default."""
    merge: tyro.conf.FlagCreatePairsOff[bool] = False
    """Add the adapter into the base's weights and write them all."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of merged weights. bfloat16 loses part of a small update, and says how much."""


def main() -> None:
    """Run the command in sys.argv; exits with 0, 1 (an error that its message explains), 2 (usage) or 130 (Ctrl-C)."""
    commands = {"train": _train, "eval": _eval, "export": _export}
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command not in commands:
        print(f"usage: rlora {{{','.join(commands)}}} ...\n`rlora train --help` documents every field", file=sys.stderr)
        sys.exit(0 if command in ("-h", "--help") else 2)
    try:
        commands[command](arguments)
    except (RloraError, OSError) as error:
        print(f"rlora: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("rlora: interrupted", file=sys.stderr)
        sys.exit(130)


def _train(arguments: list[str]) -> None:
    given = _parse_train(arguments)
    from rlora import checkpoint
    from rlora.task import load_task

    config = given.config
    task = load_task(config)
    from rlora.train import train

    if given.resume:
        run = given.resume
        if (checkpoint.last_version(run) or 0) >= config.steps:
            raise RloraError(f"steps = {config.steps}: {run} has them all; give more by --steps")
        checkpoint.write_config(run, config)
        if config.learner.start_from:  # it may be gone by now; the run has its own copy
            own = str(checkpoint.adapter_path(run, 0))
            config = replace(config, learner=replace(config.learner, start_from=own))
    else:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run = given.run_dir or Path("runs") / f"{config.env.rpartition(':')[2].lower()}-{stamp}"
        checkpoint.create(run, config, task, given.overwrite)
    if task.dropped:
        print(f"{task.dropped} prompts are longer than sampling.max_prompt_tokens and left out")
    print(f"run: {run}")
    try:
        train(config, task, run)
    except BaseException:
        if (version := checkpoint.last_version(run)) is not None:
            print(f"The last whole adapter is {checkpoint.adapter_path(run, version)}; "
                  f"go on from it with `rlora train --resume {run}`", file=sys.stderr)  # fmt: skip
        raise
    _report(run, task.base)


def _parse_train(arguments: list[str]) -> Train:
    """The command line over the TOML file it names, or over the config of the run that it resumes."""
    options = [argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument[:2] == "--"]
    refuse_unlearnable(option.rpartition(".")[2] for option in options)
    files = [Path(argument) for argument in arguments if argument.endswith(".toml")]
    resumed = _value(arguments, "--resume")
    source = Path(resumed) / "config.toml" if resumed else files[0] if files else None
    saved = read(source) if source else None
    default = Train(saved) if saved else None
    env_args, others = _env_args(arguments)
    parsed = cast(Train, tyro.cli(Train, default=default, args=others, prog="rlora train"))
    config = replace(parsed.config, env_args={**parsed.config.env_args, **env_args})
    given = replace(parsed, config=validate(config))
    if resumed and saved:
        before, after = asdict(saved), asdict(given.config)
        changed = [field for field in before if before[field] != after[field] and field != "steps"]
        if changed or files or given.run_dir or given.overwrite:
            raise RloraError(
                f"--resume {resumed}: a run goes on under its own config, and only --steps may be given beside it; "
                f"leave out {', '.join(changed) or 'the TOML file, --run-dir and --overwrite'}, or start a new run"
            )
    return given


def _env_args(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What `--env-args.NAME VALUE` gives, and the other arguments. Which names there are only the env knows."""
    found, others = {}, []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--env-args."):
            others.append(argument)
            continue
        name, equals, value = argument.removeprefix("--env-args.").partition("=")
        text = value if equals else next(rest, "")
        try:
            given = json.loads(text)  # a number or a boolean
        except json.JSONDecodeError:
            given = text
        found[name.replace("-", "_")] = given
    return found, others


def _value(arguments: list[str], option: str) -> str | None:
    """What follows an option, as `--option value` or `--option=value`."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def _report(run: Path, base: str) -> None:
    """The table at the end of a run, and what to do next."""
    from rich.console import Console
    from rich.table import Column, Table

    from rlora import checkpoint

    summary = checkpoint.summarise(run, {})
    table = Table("", Column("", overflow="fold"), title="What it gained", show_header=False)
    if "accuracy/after" in summary:
        table.add_row("greedy held-out accuracy before", f"{summary['accuracy/before']:.3f}")
        table.add_row("greedy held-out accuracy after", f"{summary['accuracy/after']:.3f}")
    table.add_row("steps", str(summary["steps"]))
    table.add_row("wall time", f"{summary['time/total']:.0f} s, of which training {summary['time/train']:.0f} s")
    table.add_row("adapter", f"{summary['adapter/parameters']:,} parameters, {summary['adapter/bytes']:,} bytes")
    table.add_row("where it lies", summary["adapter/path"])
    Console().print(table)
    print(f"Evaluate it again, or go on:\n  rlora eval {run}\n  rlora train --resume {run} --steps N")
    print(f"Load it with PEFT:\n  base = AutoModelForCausalLM.from_pretrained({base!r})")
    print(f"  policy = PeftModel.from_pretrained(base, {summary['adapter/path']!r})")


def _eval(arguments: list[str]) -> None:
    given = tyro.cli(Eval, args=arguments, prog="rlora eval")
    config = read(given.run / "config.toml")
    from rlora import checkpoint, cluster
    from rlora.delivery import swap
    from rlora.evaluate import evaluate
    from rlora.task import load_task

    adapter = checkpoint.read_adapter(given.run, given.version)
    task = load_task(config)
    if not task.held_out:
        raise RloraError(f"env = {config.env!r}: it has no held-out prompts, or evaluate.prompts is 0")
    with cluster.start(config, task, given.run.name, learn=False) as (_, engines):
        swap(engines, adapter)
        result = evaluate(config, task, engines, adapter.version)
    print(
        f"version {adapter.version}: greedy held-out accuracy {result.accuracy:.3f}, "
        f"mean reward {result.reward:.3f}, {len(task.held_out)} prompts"
    )


def _export(arguments: list[str]) -> None:
    given = tyro.cli(Export, args=arguments, prog="rlora export")
    config = read(given.run / "config.toml")
    from rlora import checkpoint

    adapter = checkpoint.read_adapter(given.run, given.version)
    if given.to.exists():
        raise RloraError(f"--to {given.to}: it is there already; name another directory")
    if adapter.whole and given.merge:
        raise RloraError("--merge: this run trained all weights, so there is no adapter to merge; leave it out")
    if not given.merge:
        print(f"version {adapter.version}: {checkpoint.write_adapter(adapter, given.to)}")
        return
    import torch
    from transformers import AutoModelForCausalLM

    from rlora import machine
    from rlora.base import load_tokenizer, locate
    from rlora.merge import merge

    where = locate(config.model)
    base = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    off = merge(base, adapter, machine.DTYPES[given.dtype])
    base.save_pretrained(given.to)
    load_tokenizer(where).save_pretrained(given.to)
    print(
        f"version {adapter.version} merged in {given.dtype}: {given.to}; its update is {off:.2%} off the adapter's own"
    )
