"""What the command line takes, and the config that comes of it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import tyro

from rlora.config import PRESETS, AlgorithmConfig, Config, read, refuse_unlearnable, validate
from rlora.records import RloraError


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
    """Answer held-out prompts under an adapter, with pass@k. Every field of the config may be given beside SOURCE."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    source: tyro.conf.Positional[Path]
    """The directory of a run, or a TOML config."""
    version: int | None = None
    """The run's adapter version; the last one by default, 0 is what it started from. Of all weights the last alone."""
    adapter: Path | None = None
    """The directory of an adapter in PEFT's format, in place of a run's."""
    base: tyro.conf.FlagCreatePairsOff[bool] = False
    """The base without any adapter; so it is with a TOML config unless --adapter is given."""
    prompts: int | None = None
    """How many held-out prompts to answer, the first ones; evaluate.prompts by default."""
    samples: int = 1
    """Completions a prompt, n: pass@k is told for k = 1, 2, 4, ... up to n."""
    temperature: float | None = None
    """Of the samples; by default 0, greedy, for one and sampling.temperature for several."""
    out: Path | None = None
    """Where completions go with their verdicts, as JSON lines; <run>/eval-<version>.jsonl or eval.jsonl by default."""


@dataclass(frozen=True)
class Grade:
    """Grade rows of {"gold", "prediction"}: adds "status" and "reward"."""

    file: tyro.conf.Positional[Path]
    """JSON lines."""
    out: Path
    """Where the rows go, with all that they had."""
    reward: str = "rlora.rewards.equivalence:math_answer"
    """The reward function: module:name or path/to/file.py:name."""
    style: Literal["auto", "completion", "group", "trl", "verl", "verl-batch", "openrlhf"] = "auto"
    """Its form, where its parameters' names do not tell it."""
    deadline: float = 10.0
    """Seconds that a row may take; then its status is timeout."""
    workers: int = 2
    """Processes that grade."""


@dataclass(frozen=True)
class Show:
    """Show a prompt as the policy reads it, with its special tokens, and what ends its message."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    what: tyro.conf.Positional[Literal["prompt"]]
    """What to show."""
    source: tyro.conf.Positional[Path]
    """The directory of a run, or a TOML config."""
    number: int = 0
    """Which of the training prompts, from 0."""


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


Given = TypeVar("Given", Train, Eval, Show)


def parse_train(arguments: list[str]) -> Train:
    """The command line over the TOML file it names, or over the config of the run that it resumes."""
    given = _parse(Train, Train(_NOTHING), "rlora train", arguments)
    if given.resume:
        before, after = asdict(read_run(given.resume)), asdict(given.config)
        changed = [field for field in before if before[field] != after[field] and field != "steps"]
        if changed or given.file or given.run_dir or given.overwrite:
            raise RloraError(
                f"--resume {given.resume}: a run goes on under its own config, and only --steps may be given beside "
                f"it; leave out {', '.join(changed) or 'the TOML file, --run-dir and --overwrite'}, or start a new run"
            )
    return given


def parse_eval(arguments: list[str]) -> Eval:
    """The command line over the config of the run, or over the TOML file, that it names."""
    return _parse(Eval, Eval(_NOTHING, Path()), "rlora eval", arguments)


def parse_show(arguments: list[str]) -> Show:
    """The same."""
    return _parse(Show, Show(_NOTHING, "prompt", Path()), "rlora show", arguments)


def read_run(run: Path) -> Config:
    """The config of a run. Raises RloraError where no run is."""
    path = run / "config.toml"
    if not path.is_file():
        raise RloraError(
            f"{run}: no run is there (it has no config.toml); name a directory that `rlora train` made, "
            "under runs/ or where --run-dir said"
        )
    return read(path)


_NOTHING = Config(model="", env="", reward="")


def _parse(kind: type[Given], default: Given, program: str, arguments: list[str]) -> Given:
    """The command line over the config that it names, whose every field it may give too."""
    env_args, others = _named("env-args", arguments)
    reward_args, others = _named("reward-args", others)
    options = [argument.split("=")[0].lstrip("-").replace("-", "_") for argument in others if argument[:2] == "--"]
    refuse_unlearnable(option.rpartition(".")[2] for option in options)
    without_help = [argument for argument in others if argument not in ("-h", "--help")]  # shown once all is known
    saved = _source(tyro.cli(kind, default=default, args=without_help, prog=program))
    over = replace(default, config=saved) if saved else None
    parsed = cast(Given, tyro.cli(kind, default=over, args=others, prog=program))
    table = asdict(parsed.config)
    for field, args, of in (("env_args", env_args, "env"), ("reward_args", reward_args, "reward")):
        of_another = table[field] if saved and getattr(saved, of) != table[of] else {}
        table[field] = {name: value for name, value in table[field].items() if name not in of_another} | args
    if "algorithm.name" in options:  # then what the file's own name set goes; what was given beside either stays
        before = PRESETS[saved.algorithm.name] if saved else {}
        given_too = {option.removeprefix("algorithm.").removeprefix("no_") for option in options}
        for name in (PRESETS[table["algorithm"]["name"]] | before).keys() - given_too:
            if table["algorithm"][name] == before.get(name, getattr(AlgorithmConfig(), name)):
                del table["algorithm"][name]
    return replace(parsed, config=validate(table))


def _source(given: Train | Eval | Show) -> Config | None:
    """The config that a command line starts from: of a run, or of a TOML file; None where it names neither."""
    if isinstance(given, Train):
        if given.resume:
            return read_run(given.resume)
        return read(given.file) if given.file else None
    return read(given.source) if given.source.suffix == ".toml" else read_run(given.source)


def _named(field: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What `--<field>.NAME VALUE` gives, and the other arguments. Which names there are only the plug-in knows."""
    found, others = {}, []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith(f"--{field}."):
            others.append(argument)
            continue
        name, equals, value = argument.removeprefix(f"--{field}.").partition("=")
        text = value if equals else next(rest, "")
        try:
            given = json.loads(text)  # a number or a boolean
        except json.JSONDecodeError:
            given = text
        found[name.replace("-", "_")] = given
    return found, others
