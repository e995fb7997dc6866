"""What the command line takes, and the config that comes of it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import tyro
from upath import UPath

from rlora.config import PRESETS, AlgorithmConfig, Config, like, read, refuse_unlearnable, validate
from rlora.records import RloraError
from rlora.storage import names, read_file


@dataclass(frozen=True)
class Train:
    """Train a policy. FILE is a TOML config; every field below overrides what it says."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    file: tyro.conf.Positional[Path | None] = None
    """A TOML config, such as launch/arithmetic.toml."""
    run_dir: UPath | None = None
    """Where the run goes, a directory or any URL that fsspec knows; a fresh directory under runs/ by default."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the run that is in --run-dir."""
    resume: UPath | None = None
    """Go on with the run that is here, from its newest whole bundle and under its own config. With a FILE it is begun
    where none is here yet."""
    changes: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """With --resume: fields of the config to change, as NAME=VALUE, such as steps=200 learner.lr=1e-4."""
    fork: str | None = None
    """Start a new run from RUN@STEP, or the newest of RUN, under its config and what is given beside it: any field that
    the adapter does not hang on."""


@dataclass(frozen=True)
class Scale:
    """Give a run that goes on more engines or fewer, from its next step on."""

    run: tyro.conf.Positional[UPath]
    """The run's directory."""
    engines: tyro.conf.Positional[int]
    """How many, 1 to the run's engine.max_replicas."""


@dataclass(frozen=True)
class Eval:
    """Answer held-out prompts under an adapter, with pass@k. Every field of the config may be given beside SOURCE."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    source: tyro.conf.Positional[str]
    """RUN or RUN@STEP, the newest by default, or a TOML config."""
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
    threshold: float = 1.0
    """Where the reward function gives a number, a row is correct from this one on."""
    workers: int = 2
    """Processes that grade."""


@dataclass(frozen=True)
class Show:
    """Show a prompt as the policy reads it, with its special tokens, and what ends its message."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    what: tyro.conf.Positional[Literal["prompt"]]
    """What to show."""
    source: tyro.conf.Positional[str]
    """The directory of a run, or a TOML config."""
    number: int = 0
    """Which of the training prompts, from 0."""


@dataclass(frozen=True)
class Export:
    """Write an adapter of a run in PEFT's format, or the whole model with it merged in, and a model card."""

    run: tyro.conf.Positional[str]
    """RUN or RUN@STEP, the newest by default."""
    to: Path
    """The directory to write; it must not be there yet."""
    merge: tyro.conf.FlagCreatePairsOff[bool] = False
    """Add the adapter into the base's weights and write them all."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of merged weights, bfloat16 by default, which loses part of a small update and says how much. An adapter is
    always written in fp32."""


@dataclass(frozen=True)
class Replay:
    """Compute updates of a run again from its bundles, and say whether each comes out bit for bit."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    run: tyro.conf.Positional[str]
    """RUN or RUN@STEP. Fields of the config given beside it, such as another loss, change what is computed."""
    step: int | None = None
    """The update to compute, as in RUN@STEP: that from version STEP to STEP + 1. By default all whose bundles are
    kept."""


@dataclass(frozen=True)
class Runs:
    """List runs: how far they are, their best mean reward, and what they were forked from."""

    directory: tyro.conf.Positional[UPath] = field(default_factory=lambda: UPath("runs"))
    """Where they lie side by side."""


Given = TypeVar("Given", Train, Eval, Show, Replay)


def parse_train(arguments: list[str]) -> Train:
    """The command line over the TOML file it names, or over the config of the run that it resumes or forks.

    Raises RloraError where a run that is resumed would get another config than was asked for by `--set`, or a run that
    is resumed or forked another policy.
    """
    given = _parse(Train, Train(_NOTHING), "rlora train", arguments)
    if given.resume and (given.run_dir or given.overwrite or given.fork):
        raise RloraError(
            f"--resume {given.resume}: a run goes on where it is; leave out --run-dir, --overwrite and --fork"
        )
    for place in (given.run_dir, given.resume):
        if place is not None:
            reachable(place)
    if given.resume and given.file and "config.toml" not in names(given.resume):
        given = replace(given, run_dir=given.resume, resume=None)
    if given.changes and not given.resume:
        raise RloraError(
            f"--set {given.changes[0]}: it is for --resume; give --{given.changes[0].replace('=', ' ', 1)}"
        )
    if given.resume:
        return _resumed(given, read_run(given.resume))
    if given.fork:
        if given.file:
            raise RloraError(f"{given.file}: a fork has the config of its run; leave the file out")
        refuse_another_policy(read_run(split(given.fork)[0]), given.config, "--fork")
    return given


def _resumed(given: Train, before: Config) -> Train:
    asked = with_changes(before, given.changes)
    others = differences(asked, given.config) if differences(before, given.config) else {}
    if others:
        lines = "".join(f"\n  {name}: {was!r} -> {now!r}" for name, (was, now) in others.items())
        named = " ".join(
            shlex.quote(f"{name}={json.dumps(now)}") for name, (_, now) in others.items() if now is not None
        )
        raise RloraError(
            f"--resume {given.resume}: a run goes on under its own config, but this would change{lines}\n"
            f"Leave that out, or ask for it by name: --set {named}".removesuffix(": --set ")
        )
    refuse_another_policy(before, asked, "--resume")
    return replace(given, config=asked)


def with_changes(config: Config, changes: Sequence[str]) -> Config:
    """The config with fields changed, each given as NAME=VALUE. Raises RloraError for names that there are not."""
    table = asdict(config)
    for change in changes:
        name, equals, text = change.partition("=")
        section, _, last = name.replace("-", "_").rpartition(".")
        of: Any = table
        for part in section.split(".") if section else ():
            of = of.get(part) if isinstance(of, dict) else None
        if not equals:
            raise RloraError(f"--set {change}: no value; give NAME=VALUE, such as learner.lr=1e-4")
        if not isinstance(of, dict) or (last not in of and not section.endswith("_args")):
            raise RloraError(f"--set {change}: no such field; {like(name)}")
        of[last] = _value(text)
    names = [change.partition("=")[0] for change in changes]
    return validate(_under_its_preset(table, names, config))


_FIXED = (
    "model", "learner.adapter", "learner.rank", "learner.alpha", "learner.targets", "learner.head", "learner.rslora",
    "learner.start_from",
)  # fmt: skip


def refuse_another_policy(before: Config, after: Config, option: str) -> None:
    """Raise RloraError where a saved adapter would be of another base, rank, scale or set of matrices."""
    critics = [config.critic.rank if config.algorithm.advantage == "gae" else 0 for config in (before, after)]
    for name, (was, now) in differences(before, after).items():
        if name in _FIXED or (critics[0] != critics[1] and name in ("critic.rank", "algorithm.advantage")):
            raise RloraError(
                f"{name} = {now!r}: {option} goes on with an adapter that was trained with {was!r}, and what was saved "
                "of it fits nothing else; leave it out, or start a new run"
            )


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, by their full names: before and after."""
    return _differences(json.loads(json.dumps(asdict(before))), json.loads(json.dumps(asdict(after))), "")


def _differences(before: Any, after: Any, name: str) -> dict[str, tuple[Any, Any]]:
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return {name: (before, after)} if before != after else {}
    return {
        path: values
        for key in before | after
        for path, values in _differences(before.get(key), after.get(key), f"{name}.{key}".strip(".")).items()
    }


def split(source: str) -> tuple[UPath, int | None]:
    """RUN or RUN@STEP."""
    run, _, step = source.rpartition("@")
    return (reachable(run), int(step)) if run and step.isdigit() else (reachable(source), None)


def reachable(place: str | UPath) -> UPath:
    """The path. Raises RloraError where fsspec does not know its protocol, or needs another package for it."""
    try:
        path = UPath(place)
        _ = path.fs
    except (ImportError, ValueError) as error:
        raise RloraError(f"{place}: {error}; install what that names, or give a local directory") from None
    return path


def parse_eval(arguments: list[str]) -> Eval:
    """The command line over the config of the run, or over the TOML file, that it names."""
    return _parse(Eval, Eval(_NOTHING, ""), "rlora eval", arguments)


def parse_show(arguments: list[str]) -> Show:
    """The same."""
    return _parse(Show, Show(_NOTHING, "prompt", ""), "rlora show", arguments)


def parse_replay(arguments: list[str], over: Config | None = None) -> Replay:
    """The same; over the config `over` of one of its versions, where that is given."""
    return _parse(Replay, Replay(_NOTHING, ""), "rlora replay", arguments, over)


def read_run(run: UPath) -> Config:
    """The config of a run. Raises RloraError where no run is."""
    path = reachable(run) / "config.toml"
    if read_file(path) is None:
        raise RloraError(
            f"{run}: no run is there (it has no config.toml); name a directory that `rlora train` made, "
            "under runs/ or where --run-dir said"
        )
    return read(path)


_NOTHING = Config(model="", env="", reward="")


def _parse(kind: type[Given], default: Given, program: str, arguments: list[str], over: Config | None = None) -> Given:
    """The command line over the config that it names, or over `over`. It may give each field of that too."""
    env_args, others = _named("env-args", arguments)
    reward_args, others = _named("reward-args", others)
    options = [argument.split("=")[0].lstrip("-").replace("-", "_") for argument in others if argument[:2] == "--"]
    refuse_unlearnable(option.rpartition(".")[2] for option in options)
    if "-h" in others or "--help" in others:
        tyro.cli(kind, args=["--help"], prog=program)  # ends here
    saved = over or _source(tyro.cli(kind, default=default, args=others, prog=program))
    under = replace(default, config=saved) if saved else None
    parsed = cast(Given, tyro.cli(kind, default=under, args=others, prog=program))
    table = asdict(parsed.config)
    for name, args, of in (("env_args", env_args, "env"), ("reward_args", reward_args, "reward")):
        of_another = table[name] if saved and getattr(saved, of) != table[of] else {}
        table[name] = {key: value for key, value in table[name].items() if key not in of_another} | args
    return replace(parsed, config=validate(_under_its_preset(table, options, saved)))


def _under_its_preset(table: dict[str, Any], given: Sequence[str], before: Config | None) -> dict[str, Any]:
    """A config where, if `algorithm.name` is given, all that the name before set goes; what was given beside stays."""
    if "algorithm.name" in given:
        was = PRESETS[before.algorithm.name] if before else {}
        kept = {option.removeprefix("algorithm.").removeprefix("no_") for option in given}
        for name in (PRESETS.get(table["algorithm"]["name"], {}) | was).keys() - kept:
            if table["algorithm"][name] == was.get(name, getattr(AlgorithmConfig(), name)):
                del table["algorithm"][name]
    return table


def _source(given: Train | Eval | Show | Replay) -> Config | None:
    """The config that a command line starts from: of a run, or of a TOML file; None where it names neither."""
    if not isinstance(given, Train):
        source = given.run if isinstance(given, Replay) else given.source
        if not source:
            raise RloraError(
                "no run is named, and no TOML config; give the directory of a run, RUN@STEP, or a FILE.toml"
            )
        is_file = source.endswith(".toml") and not isinstance(given, Replay)
        return read(Path(source)) if is_file else read_run(split(source)[0])
    if given.file:
        return read(given.file)
    if given.resume:
        return read_run(given.resume)
    return _config_at(*split(given.fork)) if given.fork else None


def _config_at(run: UPath, step: int | None) -> Config:
    """That of a version, or of the newest."""
    newest = read_run(run)  # or it says that no run is there
    if step is None:
        return newest
    from rlora.checkpoint import read_config  # which imports torch

    return read_config(run, step)


def _named(field: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What `--<field>.NAME VALUE` gives, and the other arguments. Which names there are only the plug-in knows."""
    found, others = {}, []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith(f"--{field}."):
            others.append(argument)
            continue
        name, equals, value = argument.removeprefix(f"--{field}.").partition("=")
        found[name.replace("-", "_")] = _value(value if equals else next(rest, ""))
    return found, others


def _value(text: str) -> Any:
    """A number, a boolean, a list; else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
