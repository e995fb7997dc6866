"""`rlora sweep`, and the requests to a running one: pause, go, drop, fork."""

import re
from pathlib import Path
from typing import Any

import tyro
from upath import UPath

from rlora.cli.arguments import Ask, Fork, Sweep
from rlora.cli.grammar import change, value_of
from rlora.cli.overrides import parse_members
from rlora.config import by_full_names
from rlora.records import RloraError

# torch, transformers and Ray take seconds to import, so they are imported after the command line is parsed


def parse_sweep(arguments: list[str]) -> tuple[Sweep, dict[str, Any]]:
    """Return the options of `rlora sweep`, and the tables over, members and halving of the sweep.

    An entry of a table comes from an option (--over, --member, --halve-at with --keep) or else from the file. Raises
    RloraError if an option or a field is invalid.
    """
    options, tables = parse_members(arguments)
    members = {name: by_full_names(changes) for name, changes in tables.get("members", {}).items()}
    rule = {"at": _steps(options.halve_at), "keep": options.keep} if options.halve_at else {}
    return options, {
        "over": by_full_names(tables.get("over", {})) | dict(map(axis_of, options.over)),
        "members": members | dict(map(member_of, options.member)),
        "halving": tables.get("halving", {}) | rule,
    }


def sweep_command(arguments: list[str]) -> None:
    """Train a new or resumed sweep until all members have ended, and print the result."""
    options, tables = parse_sweep(arguments)
    from rlora.sweeps.halving import Halving
    from rlora.sweeps.sweep import sweep

    config = None if options.resume else options.config
    tables["halving"] = Halving.of(tables["halving"]) if tables["halving"] else None
    swept = sweep(config, run_dir=options.run_dir, resume=options.resume, **tables)
    report_sweep(swept.directory)
    print(f"List the members, and draw them:\n  rlora runs {swept.directory} --plot {swept.directory / 'sweep.png'}")


def report_sweep(directory: Path, picture: Path | None = None) -> None:
    """Print which configuration of the sweep in `directory` to use. If `picture` is given, draw the members' curves
    into this file."""
    from rlora.sweeps.plot import plot
    from rlora.sweeps.results import read_results, verdict

    members = read_results(directory)
    print(verdict(members))
    if picture:
        plot(members, picture)


def ask_command(request: str, arguments: list[str]) -> None:
    """Leave a request for the sweep of the member that `arguments` name, without waiting for the sweep.

    `request` is pause, go (resume) or drop. The sweep carries out the request in its next turn, or once it is resumed.
    Raises RloraError if there is no such member, or if the member's status does not permit the request.
    """
    options = tyro.cli(Ask, args=arguments, prog=f"rlora {request}")
    directory, name = options.member.parent, options.member.name
    from rlora.sweeps.diary import ask

    ask(directory, request, name)
    _report_request(directory, f"{request} {name}")


def fork_command(arguments: list[str]) -> None:
    """Leave a request for a new member that starts from a version of another member, without waiting for the sweep."""
    options = tyro.cli(Fork, args=arguments, prog="rlora fork")
    from rlora.run.checkpoint import read_version
    from rlora.run.source import split
    from rlora.sweeps.diary import ask

    source, version = split(options.source)
    changes = dict(map(change, options.changes))
    number = read_version(source, version).version
    directory = _local(source).parent
    ask(directory, "fork", source.name, version=number, name=options.name, changes=changes)
    _report_request(directory, f"fork {source.name}@{number} as {options.name}")


def _local(path: UPath) -> Path:
    if not isinstance(path, Path):
        raise RloraError(
            f"{path}: this is a URL, but the members of a sweep are in local directories; name a member's directory, "
            "runs/SWEEP/MEMBER"
        )
    return path


def _report_request(directory: Path, request: str) -> None:
    from rlora.run.directory import is_locked

    is_running = is_locked(UPath(directory))
    start = "in the next turn" if is_running else f"once it is resumed: `rlora sweep --resume {directory}`"
    print(f"{directory}: {request}, {start}")


def _steps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RloraError(f"--halve-at {text}: give steps separated by commas, such as 12,24") from None


def axis_of(text: str) -> tuple[str, list[Any]]:
    """Return the field and the values of FIELD=VALUE,VALUE,... Raises RloraError if the text is not of this form."""
    field, equals, values = text.partition("=")
    if not equals or not field:
        raise RloraError(f"--over {text}: give FIELD=VALUE,VALUE,..., as in --over learner.rank=1,2,4,8")
    return field.replace("-", "_"), [value_of(value) for value in _items(values)]


def member_of(text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the changes of NAME:FIELD=VALUE,... Raises RloraError if the text is not of this form."""
    name, colon, changes = text.partition(":")
    if not colon:
        raise RloraError(f"--member {text}: give NAME:FIELD=VALUE,..., as in --member hot:learner.lr=1e-3,seed=1")
    try:
        return name, dict(map(change, _items(changes)))
    except RloraError as error:
        raise RloraError(f"--member {name}: {error}") from error


def _items(text: str) -> list[str]:
    """Split a text at its commas, except those in brackets and quotes."""
    return re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|[^,])+", text)
