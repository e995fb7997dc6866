"""What a command line asks for: the command's own options, and the config that its fields make of a run or a file."""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import tyro

from rlora.cli.arguments import AnyOverConfig, Eval, Replay, Sweep, Train
from rlora.cli.grammar import split
from rlora.cli.help import help_of
from rlora.config import changed, check_same_policy, differences, read_table, validate
from rlora.records import RloraError
from rlora.run.source import config_at, reachable, read_run
from rlora.run.source import split as split_source
from rlora.settings import SUPERVISED, Config
from rlora.store import names


def parse_train(arguments: list[str]) -> Train:
    """Return the options of `rlora train` with the config of the TOML file, or of the run that is resumed or forked.

    Raises RloraError if the file or a field is invalid, if the file differs from the config of the run that is resumed,
    or if the saved adapter does not fit the config. Reads the directory of the run, but creates nothing.
    """
    options = parse_options(Train, "rlora train", arguments)
    if options.resume and (options.run_dir or options.overwrite or options.fork):
        raise RloraError(
            f"--resume {options.resume}: a run is resumed where it is; remove --run-dir, --overwrite and --fork"
        )
    for directory in (options.run_dir, options.resume):
        if directory is not None:
            reachable(directory)
    if options.resume and options.file and "config.toml" not in names(options.resume):
        options = replace(options, run_dir=options.resume, resume=None)
    if options.resume:
        return _resumed(options, read_run(options.resume))
    if options.fork:
        if options.file:
            raise RloraError(
                f"{options.file}: a fork has the config of its run; remove the file, and set fields by name"
            )
        run, version = split_source(options.fork)
        forked = replace(options, config=with_changes(asdict(config_at(run, version)), options.changes))
        check_same_policy(read_run(run), forked.config, "--fork")
        return forked
    if not options.file and not options.changes:
        raise RloraError(
            "no config; name a TOML file, as in `rlora train launch/arithmetic.toml`, or give at least --model, --env "
            "and --reward"
        )
    table = read_table(options.file) if options.file else {}
    return replace(options, config=with_changes(table, options.changes, options.file))


def _resumed(options: Train, saved: Config) -> Train:
    config = with_changes(asdict(saved), options.changes)
    if options.file:
        in_file = with_changes(read_table(options.file), options.changes, options.file)
        if unlike := differences(config, in_file):
            lines = "".join(f"\n  {name}: {old!r} -> {new!r}" for name, (old, new) in unlike.items())
            raise RloraError(
                f"--resume {options.resume}: a run keeps its own config, and {options.file} differs from it:{lines}\n"
                "Remove the file, and set the fields to change by name, such as --steps=200"
            )
    check_same_policy(saved, config, "--resume")
    return replace(options, config=config)


def parse_source(kind: type[AnyOverConfig], program: str, arguments: list[str]) -> AnyOverConfig:
    """Return the options of the command `program`, which `kind` defines, with the config of the run or of the TOML file
    that `arguments` name. Raises RloraError if they name neither, or if a field is invalid."""
    options = parse_options(kind, program, arguments)
    source = options.run if isinstance(options, Replay) else getattr(options, "source", "")
    if not source:
        raise RloraError("no run and no config; name the directory of a run, RUN@STEP, or a TOML file")
    file = Path(source) if source.endswith(".toml") and not isinstance(options, Replay) else None
    table = read_table(file) if file else asdict(read_run(split_source(source)[0]))
    changes: Mapping[str, Any] = options.changes
    if isinstance(options, Eval) and dict(table.get("algorithm", {})).get("name") in SUPERVISED:
        changes = {"algorithm.name": "reinforce", **changes}  # evaluation samples, whatever the policy learned from
    return replace(options, config=with_changes(table, changes, file))


def parse_members(arguments: list[str]) -> tuple[Sweep, dict[str, Any]]:
    """Return the options of `rlora sweep` with the config that members share, and the tables over, members and halving
    of the file, as far as the file has them. There are none if a sweep is resumed, or without a file."""
    options = parse_options(Sweep, "rlora sweep", arguments)
    if options.resume:
        if options.changes:
            names_set = ", ".join(f"--{name}" for name in options.changes)
            raise RloraError(
                f"--resume {options.resume}: a resumed sweep keeps the saved config of each member, so options can't "
                f"change it; remove {names_set}"
            )
        return options, {}
    if not options.file and not options.changes:
        raise RloraError("no config; name a TOML file, as in `rlora sweep launch/arithmetic.toml --over seed=0,1`")
    table, own = sweep_tables(read_table(options.file), options.file) if options.file else ({}, {})
    return replace(options, config=with_changes(table, options.changes, options.file)), own


def sweep_tables(table: dict[str, Any], file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tables of the config that members share, and the tables over, members and halving of a sweep's file.

    A plain config has none of these three tables. In a sweep's file `config` is the table of the shared config, or the
    path of a TOML file with it, relative to the directory of `file` or to the working directory. Raises RloraError if
    `config` is missing.
    """
    own: dict[str, Any] = {name: table[name] for name in ("over", "members", "halving") if name in table}
    if not own:
        return table, {}
    config = table.get("config")
    if isinstance(config, dict):
        return config, own
    if not isinstance(config, str):
        raise RloraError(
            f"{file}: config = {config!r}: name the TOML config that the members share, or give its tables"
        )
    relative = file.parent / config
    return read_table(relative if relative.exists() else Path(config)), own


def parse_options(kind: type[AnyOverConfig], program: str, arguments: list[str]) -> AnyOverConfig:
    """Return the command's own options, and in `changes` the config fields that the command line sets.

    `kind` defines the options of the command `program`. With --help, prints the help and exits. Raises RloraError for
    an unknown field; an invalid option exits with status 2.
    """
    options = {field.name for field in fields(kind)} - {"config", "changes"}
    if "-h" in arguments or "--help" in arguments:
        help_of(kind, program)
    changes, rest = split(arguments, options)
    return replace(tyro.cli(kind, args=rest, prog=program), changes=changes)


def with_changes(table: Mapping[str, Any], changes: Mapping[str, Any], file: Path | None = None) -> Config:
    """Return the config in `table`, with `changes` by full field name. Raises RloraError if a field is invalid; the
    message names `file` if the first invalid field comes from the file."""
    try:
        return validate(changed(table, changes))
    except RloraError as error:
        at_fault = re.split("[: ]", str(error))[0]
        raise error if at_fault in changes or not file else RloraError(f"{file}: {error}") from None
