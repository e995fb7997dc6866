"""What the command line takes, and the config that comes of it."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tyro

from rlora.cli.arguments import Check, Eval, Given, Plan, Replay, Show, Sweep, Train
from rlora.config import (
    ELSEWHERE,
    changed,
    check_learnable,
    check_same_policy,
    differences,
    like,
    read_table,
    validate,
)
from rlora.records import RloraError
from rlora.run.source import config_at, reachable, read_run, split
from rlora.settings import Config
from rlora.store import names


def parse_train(arguments: list[str]) -> Train:
    """The command line over the TOML file it names, or over the config of the run that it resumes or forks.

    Raises RloraError where a run that is resumed would get another config than was asked for by `--set`, or a run that
    is resumed or forked another policy.
    """
    given = parse(Train, Train(NOTHING), "rlora train", arguments)
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
        check_same_policy(read_run(split(given.fork)[0]), given.config, "--fork")
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
    check_same_policy(before, asked, "--resume")
    return replace(given, config=asked)


def with_changes(config: Config, changes: Sequence[str]) -> Config:
    """The config with fields changed, each given as NAME=VALUE. Raises RloraError for names that there are not."""
    table, values = asdict(config), {}
    for change in changes:
        name, equals, text = change.partition("=")
        name = name.replace("-", "_")
        section, _, last = name.rpartition(".")
        of: Any = table
        for part in section.split(".") if section else ():
            of = of.get(part) if isinstance(of, dict) else None
        if not equals:
            raise RloraError(f"--set {change}: no value; give NAME=VALUE, such as learner.lr=1e-4")
        chosen = name.startswith(tuple(f"{field}." for field in _ARGUMENTS))
        if not chosen and (not isinstance(of, dict) or last not in of):
            raise RloraError(f"--set {change}: no such field; {like(name)}")
        values[name] = value_of(text)
    return validate(changed(table, values))


def parse_eval(arguments: list[str]) -> Eval:
    """The command line over the config of the run, or over the TOML file, that it names."""
    return parse(Eval, Eval(NOTHING, ""), "rlora eval", arguments)


def parse_check(arguments: list[str]) -> Check:
    """The same."""
    return parse(Check, Check(NOTHING, ""), "rlora check", arguments)


def parse_show(arguments: list[str]) -> Show:
    """The same."""
    return parse(Show, Show(NOTHING, "prompt", ""), "rlora show", arguments)


def parse_plan(arguments: list[str]) -> Plan:
    """The same."""
    return parse(Plan, Plan(NOTHING, ""), "rlora plan", arguments)


def parse_replay(arguments: list[str], over: Config | None = None) -> Replay:
    """The same; over the config `over` of one of its versions, where that is given."""
    return parse(Replay, Replay(NOTHING, ""), "rlora replay", arguments, over)


NOTHING = Config(model="", env="", reward="")
_ARGUMENTS = ("env_args", "reward_args", "chat.template_args", "evaluate.sets")  # tables whose names the user chooses


def parse(kind: type[Given], default: Given, program: str, arguments: list[str], over: Config | None = None) -> Given:
    """The command line over the config that it names, or over `over`. It may give each field of that too."""
    named, others = {}, arguments
    for field_name in _ARGUMENTS:
        named[field_name], others = _named(field_name, others)
    options = [argument.split("=")[0].lstrip("-").replace("-", "_") for argument in others if argument[:2] == "--"]
    check_learnable(option.rpartition(".")[2] for option in options)
    for option in options:
        if option in ELSEWHERE:
            raise RloraError(f"--{option}: no such option; here it is --{ELSEWHERE[option].replace('_', '-')}")
    if "-h" in others or "--help" in others:
        tyro.cli(kind, args=["--help"], prog=program)  # ends here
    parsed = tyro.cli(kind, default=default, args=others, prog=program)
    table, file = (asdict(over), None) if over else _source(parsed)
    if table is None:
        if not arguments:
            raise RloraError(
                f"no config is given; name a TOML file, as in `{program} launch/arithmetic.toml`, or give "
                "at least --model, --env and --reward"
            )
        parsed = tyro.cli(kind, args=others, prog=program)  # which tells what is missing
        table = asdict(NOTHING)
    changes = _given(asdict(parsed.config), options) | {
        f"{field_name}.{name}": value for field_name, values in named.items() for name, value in values.items()
    }
    table = changed(table, changes)
    options += changes
    try:
        return replace(parsed, config=validate(table))
    except RloraError as error:
        at_fault = re.split("[: ]", str(error))[0]
        raise error if at_fault in options or not file else RloraError(f"{file}: {error}") from None


def _given(table: dict[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """The fields that options give, by their full names, as the table has them."""
    given = {}
    for option in options:
        name = option.replace(".no_", ".")
        section, _, last = name.rpartition(".")
        of = table.get(section) if section else table
        if isinstance(of, dict) and last in of:
            given[name] = of[last]
    return given


def _source(given: Train | Sweep | Eval | Check | Show | Plan | Replay) -> tuple[dict[str, Any] | None, Path | None]:
    """The tables that a command line starts from, of a run or of a TOML file, which is named; None where it names
    neither."""
    if not isinstance(given, Train | Sweep):
        source = given.run if isinstance(given, Replay) else given.source
        if not source:
            raise RloraError(
                "no run is named, and no TOML config; give the directory of a run, RUN@STEP, or a FILE.toml"
            )
        if source.endswith(".toml") and not isinstance(given, Replay):
            return read_table(Path(source)), Path(source)
        return asdict(read_run(split(source)[0])), None
    if isinstance(given, Sweep) and given.resume:
        return asdict(NOTHING), None
    if given.file:
        table = read_table(given.file)
        return (swept(table, given.file)[0] if isinstance(given, Sweep) else table), given.file
    if isinstance(given, Sweep):
        return None, None
    if given.resume:
        return asdict(read_run(given.resume)), None
    return (asdict(config_at(*split(given.fork))) if given.fork else None), None


def swept(table: dict[str, Any], file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of the config that members share, and those of the sweep beside them, which a plain config has not.

    `config` is its tables, or names its file, beside `file` or as one is named on the command line.
    """
    own: dict[str, Any] = {name: table[name] for name in ("over", "members", "halving") if name in table}
    if not own:
        return table, {}
    config = table.get("config")
    if not isinstance(config, str | dict):
        raise RloraError(
            f"{file}: config = {config!r}: name the TOML config that the members share, or give its tables"
        )
    if isinstance(config, dict):
        return config, own
    beside = file.parent / config
    return read_table(beside if beside.exists() else Path(config)), own


def _named(field: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What `--<field>.NAME VALUE` gives, and the other arguments."""
    found, others = {}, []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        name = name.replace("-", "_").removeprefix("__")
        if not argument.startswith("--") or not name.startswith(f"{field}."):
            others.append(argument)
            continue
        found[name.removeprefix(f"{field}.")] = value_of(value if equals else next(rest, ""))
    return found, others


def value_of(text: str) -> Any:
    """A number, a boolean, a list; else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
