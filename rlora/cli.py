"""The command line: rlora train | scale | eval | export."""

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

import rlora
from rlora.config import PRESETS, AlgorithmConfig, Config, read, refuse_unlearnable, validate
from rlora.records import Adapter, RloraError

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
class Scale:
    """Give a run that goes on more engines or fewer, from its next step on."""

    run: tyro.conf.Positional[Path]
    """The run's directory."""
    engines: tyro.conf.Positional[int]
    """How many, 1 to the run's engine.max_replicas."""


@dataclass(frozen=True)
class Eval:
    """Answer the held-out prompts of a run greedily, under one of its adapters."""

    run: tyro.conf.Positional[Path]
    """The run's directory."""
    version: int | None = None
    """The adapter version; the last one by default, 0 is what the run started from. Of all weights, the last alone."""
    prompts: int | None = None
    """How many held-out prompts to answer; the run's evaluate.prompts by default."""


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
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of merged weights, bfloat16 by default, which loses part of a small update and says how much. An adapter is
    always written in fp32."""


_USAGE = f"""usage: rlora COMMAND ...

  train     {Train.__doc__}
  scale     {Scale.__doc__}
  eval      {Eval.__doc__}
  export    {Export.__doc__}

`rlora COMMAND --help` documents every option, `rlora --version` prints the version."""


def main() -> None:
    """Run the command in sys.argv; exits with 0, 1 (an error that its message explains), 2 (usage) or 130 (Ctrl-C)."""
    commands = {"train": _train, "scale": _scale, "eval": _eval, "export": _export}
    command, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command in ("-h", "--help", "--version"):
        print(f"rlora {rlora.__version__}" if command == "--version" else _USAGE)
        sys.exit(0)
    if command not in commands:
        print(_USAGE, file=sys.stderr)
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
    given = _parse_train(arguments)
    from transformers import AutoConfig

    from rlora import checkpoint
    from rlora.learner import first_adapter
    from rlora.optimizer import auto_lr
    from rlora.task import load_task

    config = checkpoint.with_own_start(given.resume, given.config) if given.resume else given.config
    task = load_task(config)
    first_adapter(config.learner)  # it is only looked at here: the learner's process reads it
    if config.learner.lr == "auto":
        base = AutoConfig.from_pretrained(task.base)
        print(f"learner.lr = auto: {auto_lr(config, base):.2g}, by a rule that was fitted on supervised runs, of the "
              f"base's kind ({base.model_type}) and hidden size ({base.get_text_config().hidden_size})")  # fmt: skip
    from rlora.train import train

    if given.resume:
        run = given.resume
        if (checkpoint.last_version(run) or 0) >= config.steps:
            raise RloraError(f"steps = {config.steps}: {run} has them all; give more by --steps")
        checkpoint.write_config(run, given.config)
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
    _report(run, task.base, config.learner.whole)


def _parse_train(arguments: list[str]) -> Train:
    """The command line over the TOML file it names, or over the config of the run that it resumes."""
    env_args, others = _env_args(arguments)
    options = [argument.split("=")[0].lstrip("-").replace("-", "_") for argument in others if argument[:2] == "--"]
    refuse_unlearnable(option.rpartition(".")[2] for option in options)
    saved = _source(others)
    default = Train(saved) if saved else None
    parsed = cast(Train, tyro.cli(Train, default=default, args=others, prog="rlora train"))
    of_another_env = saved.env_args if saved and saved.env != parsed.config.env else {}
    kept = {name: value for name, value in parsed.config.env_args.items() if name not in of_another_env}
    table = asdict(parsed.config) | {"env_args": kept | env_args}
    if "algorithm.name" in options:  # then what the file's own name set goes; what was given beside either stays
        before = PRESETS[saved.algorithm.name] if saved else {}
        given_too = {option.removeprefix("algorithm.").removeprefix("no_") for option in options}
        for name in (PRESETS[table["algorithm"]["name"]] | before).keys() - given_too:
            if table["algorithm"][name] == before.get(name, getattr(AlgorithmConfig(), name)):
                del table["algorithm"][name]
    given = replace(parsed, config=validate(table))
    if given.resume and saved:
        before, after = asdict(saved), asdict(given.config)
        changed = [field for field in before if before[field] != after[field] and field != "steps"]
        if changed or given.file or given.run_dir or given.overwrite:
            raise RloraError(
                f"--resume {given.resume}: a run goes on under its own config, and only --steps may be given beside "
                f"it; leave out {', '.join(changed) or 'the TOML file, --run-dir and --overwrite'}, or start a new run"
            )
    return given


def _source(arguments: list[str]) -> Config | None:
    """The config that the command line starts from: of the run that it resumes, else of its FILE, if it names one."""
    nothing = Train(Config(model="", env="", reward=""))
    arguments = [argument for argument in arguments if argument not in ("-h", "--help")]  # shown once that is known
    named = tyro.cli(Train, default=nothing, args=arguments, prog="rlora train")
    if named.resume:
        return _read_run(named.resume)
    return read(named.file) if named.file else None


def _read_run(run: Path) -> Config:
    """The config of a run. Raises RloraError where no run is."""
    path = run / "config.toml"
    if not path.is_file():
        raise RloraError(
            f"{run}: no run is there (it has no config.toml); name a directory that `rlora train` made, "
            "under runs/ or where --run-dir said"
        )
    return read(path)


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


def _report(run: Path, base: str, whole: bool) -> None:
    """The table at the end of a run, and what to do next."""
    from rich.console import Console
    from rich.table import Column, Table

    from rlora import checkpoint

    summary = checkpoint.summarise(run, {})
    table = Table("", Column("", overflow="fold"), title="What it gained", show_header=False)
    if "accuracy/after" in summary:
        table.add_row("held-out prompts, answered greedily", str(summary["accuracy/prompts"]))
        table.add_row("accuracy before", f"{summary['accuracy/before']:.3f}")
        table.add_row("accuracy after", f"{summary['accuracy/after']:.3f}")
    table.add_row("steps", str(summary["steps"]))
    table.add_row("wall time", f"{summary['time/total']:.0f} s, of which training {summary['time/train']:.0f} s")
    table.add_row(
        "all weights" if whole else "adapter",
        f"{summary['adapter/parameters']:,} parameters, {summary['adapter/bytes']:,} bytes",
    )
    table.add_row("where it lies", summary["adapter/path"])
    Console().print(table)
    print(f"Evaluate it again, or go on to N steps in all:\n  rlora eval {run}\n  rlora train --resume {run} --steps N")
    if whole:
        print(f"Load it:\n  policy = AutoModelForCausalLM.from_pretrained({summary['adapter/path']!r})")
        return
    print(f"Load it with PEFT:\n  base = AutoModelForCausalLM.from_pretrained({base!r})")
    print(f"  policy = PeftModel.from_pretrained(base, {summary['adapter/path']!r})")


def _scale(arguments: list[str]) -> None:
    given = tyro.cli(Scale, args=arguments, prog="rlora scale")
    most = _read_run(given.run).engine.max_replicas
    if not 1 <= given.engines <= most:
        raise RloraError(f"engines = {given.engines}: the run's engine.max_replicas lets it have 1 to {most}")
    from rlora import checkpoint

    checkpoint.ask_for_engines(given.run, given.engines)
    print(f"{given.run}: {given.engines} engines from its next step on")


def _eval(arguments: list[str]) -> None:
    given = tyro.cli(Eval, args=arguments, prog="rlora eval")
    config = _read_run(given.run)
    if given.prompts is not None:
        config = validate(replace(config, evaluate=replace(config.evaluate, prompts=given.prompts)))
    from rlora import checkpoint, cluster
    from rlora.evaluate import evaluate
    from rlora.task import load_task

    adapter = checkpoint.read_adapter(given.run, given.version)
    task = load_task(config)
    if not task.held_out:
        raise RloraError(
            f"env = {config.env!r}: none of its first evaluate.prompts = {config.evaluate.prompts} held-out prompts "
            "can be used; give --prompts where that is 0, or let held_out() return some"
        )
    with cluster.start(config, task, given.run.name, learn=False) as (_, fleet):
        fleet.swap(adapter)
        result = evaluate(config, task, fleet)
    print(
        f"version {adapter.version}: greedy accuracy {result.accuracy:.3f}, mean reward {result.reward:.3f}, "
        f"over {len(task.held_out)} held-out prompts"
    )


def _export(arguments: list[str]) -> None:
    given = tyro.cli(Export, args=arguments, prog="rlora export")
    config = _read_run(given.run)
    if given.dtype and not given.merge:
        raise RloraError(f"--dtype {given.dtype}: it is of merged weights; add --merge, or leave it out")
    from rlora import checkpoint

    adapter = checkpoint.read_adapter(given.run, given.version)
    if given.to.exists():
        raise RloraError(f"--to {given.to}: it is there already; name another directory")
    if adapter.whole:
        _export_all_weights(config, adapter, given)
        return
    if not given.merge:
        base = json.loads(adapter.config)["base_model_name_or_path"]
        print(f"version {adapter.version}: {checkpoint.write_adapter(adapter, given.to)}, over the base {base}")
        return
    import torch
    from transformers import AutoModelForCausalLM

    from rlora import machine
    from rlora.base import load_tokenizer, locate
    from rlora.merge import merge

    where = locate(config.model)
    base = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    dtype = given.dtype or "bfloat16"
    off = merge(base, adapter, machine.DTYPES[dtype])
    base.save_pretrained(given.to)
    load_tokenizer(where).save_pretrained(given.to)
    print(f"version {adapter.version} merged in {dtype}: {given.to}; its update is {off:.2%} off the adapter's own")


def _export_all_weights(config: Config, version: Adapter, given: Export) -> None:
    """A directory that transformers and vLLM load as a model."""
    from transformers import GenerationConfig

    from rlora import checkpoint
    from rlora.base import load_tokenizer, locate

    if given.merge:
        raise RloraError("--merge: this run trained all weights, so there is no adapter to merge; leave it out")
    checkpoint.write_adapter(version, given.to)
    where = locate(config.model)
    load_tokenizer(where).save_pretrained(given.to)
    with suppress(OSError):  # it has none
        GenerationConfig.from_pretrained(where).save_pretrained(given.to)
    print(f"version {version.version}, all weights: {given.to}")
