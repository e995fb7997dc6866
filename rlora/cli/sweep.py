"""`rlora sweep`, and what can be asked of one that goes on: pause, go, drop, fork."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from upath import UPath

from rlora.cli.arguments import Ask, Fork, Sweep
from rlora.cli.overrides import NOTHING, parse, swept, value_of
from rlora.config import by_full_names, differences, read_table
from rlora.records import RloraError

# torch, transformers and Ray take seconds to import: that waits until the command line is understood


def parse_sweep(arguments: list[str]) -> tuple[Sweep, dict[str, Any]]:
    """What a command line gives, and the tables over, members and halving that it and its file make."""
    given = parse(Sweep, Sweep(NOTHING), "rlora sweep", arguments)
    own = swept(read_table(given.file), given.file)[1] if given.file else {}
    rule = {"at": _steps(given.halve_at), "keep": given.keep} if given.halve_at else {}
    return given, {
        "over": by_full_names(own.get("over", {})) | dict(axis_of(text) for text in given.over),
        "members": {name: by_full_names(changes) for name, changes in own.get("members", {}).items()}
        | dict(member_of(text) for text in given.member),
        "halving": own.get("halving", {}) | rule,
    }


def sweep_command(arguments: list[str]) -> None:
    """Train a sweep, or go on with one."""
    given, tables = parse_sweep(arguments)
    if given.resume and differences(NOTHING, given.config):
        raise RloraError(f"--resume {given.resume}: members go on under their own configs; leave out other fields")
    from rlora.sweeps.halving import Halving
    from rlora.sweeps.sweep import sweep

    asked = tables | {"halving": Halving.of(tables["halving"]) if tables["halving"] else None}
    done = sweep(None if given.resume else given.config, run_dir=given.run_dir, resume=given.resume, **asked)
    tell_sweep(done.directory)
    print(f"List the members, and draw them:\n  rlora runs {done.directory} --plot {done.directory / 'sweep.png'}")


def tell_sweep(place: Path, picture: Path | None = None) -> None:
    """Say which configuration to take, and draw the members."""
    from rlora.sweeps.plot import plot
    from rlora.sweeps.results import ended, verdict

    members = ended(place)
    print(verdict(members))
    if picture:
        plot(members, picture)


def ask_command(what: str, arguments: list[str]) -> None:
    """Ask a sweep to pause a member, to go on with it, or to drop it."""
    given = tyro.cli(Ask, args=arguments, prog=f"rlora {what}")
    place, name = given.member.parent, given.member.name
    from rlora.sweeps.diary import ask

    ask(place, what, name)
    _tell(place, f"{what} {name}")


def fork_command(arguments: list[str]) -> None:
    """Ask a sweep for another member, which begins from a version of one."""
    given = tyro.cli(Fork, args=arguments, prog="rlora fork")
    from rlora.run.checkpoint import read_version
    from rlora.run.source import split
    from rlora.sweeps.diary import ask

    source, version = split(given.source)
    changes = changes_of(given.changes, "rlora fork")
    number = read_version(source, version).version
    ask(_local(source).parent, "fork", source.name, version=number, name=given.name, changes=changes)
    _tell(_local(source).parent, f"fork {source.name}@{number} as {given.name}")


def _local(place: UPath) -> Path:
    if not isinstance(place, Path):
        raise RloraError(f"{place}: a sweep is in a local directory")
    return place


def _tell(place: Path, what: str) -> None:
    from rlora.run.directory import is_held

    when = "in the next turn" if is_held(UPath(place)) else f"once it goes on: `rlora sweep --resume {place}`"
    print(f"{place}: {what}, {when}")


def _steps(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RloraError(f"--halve-at {text}: give steps between commas, such as 12,24") from None


def axis_of(text: str) -> tuple[str, list[Any]]:
    """FIELD=VALUE,VALUE,... Raises RloraError where it is none."""
    field, equals, values = text.partition("=")
    if not equals or not field:
        raise RloraError(f"--over {text}: give FIELD=VALUE,VALUE,..., as in --over learner.rank=1,2,4,8")
    return field.replace("-", "_"), [value_of(value) for value in _parts(values)]


def member_of(text: str) -> tuple[str, dict[str, Any]]:
    """NAME:FIELD=VALUE,FIELD=VALUE,... Raises RloraError where it is none."""
    name, colon, changes = text.partition(":")
    if not colon:
        raise RloraError(f"--member {text}: give NAME:FIELD=VALUE,..., as in --member hot:learner.lr=1e-3,seed=1")
    return name, changes_of(_parts(changes), f"--member {text}")


def changes_of(texts: Sequence[str], option: str) -> dict[str, Any]:
    """Fields by their full names, each given as FIELD=VALUE. Raises RloraError that names `option`."""
    changes = {}
    for each in texts:
        field, equals, value = each.partition("=")
        if not equals:
            raise RloraError(f"{option}: {each} has no value; give FIELD=VALUE, such as learner.lr=1e-4")
        changes[field.replace("-", "_")] = value_of(value)
    return changes


def _parts(text: str) -> list[str]:
    """What stands between commas, but for commas in brackets and quotes."""
    return re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|[^,])+", text)
