"""`--help`: the options of a command, and the fields of the config."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import tyro

from rlora.cli.arguments import NOTHING, OverConfig
from rlora.cli.grammar import kinds
from rlora.config import doc

_NAMES = {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false"}


def help_of(kind: type[OverConfig], program: str) -> NoReturn:
    """Print the options of the command `program`, which `kind` defines, and the fields of the config. Then exit with
    status 0."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    with suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=program)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, shape, default, description in documented_fields():
        option = f"--{name.replace('_', '-')}"
        table.add_row(
            Text(f"{option} {shape}"), Text(f"{description} (default: {default})" if default else description)
        )
    console = Console()
    with console.capture() as text:
        console.print("fields of the config, each as --FIELD VALUE or --FIELD=VALUE:", table)
    print(text.get())  # not by rich, which exits with 1 if the reader has closed the output
    sys.exit(0)


def documented_fields() -> Iterator[tuple[str, str, str, str]]:
    """Yield the full name of each field of the config, its values, its default ("" for none), and its description."""
    for name, kind in _fields():
        value: Any = NOTHING if "NAME" not in name else ""
        for part in name.split(".") if value else ():
            value = getattr(value, part)
        yield name, _shape(kind), "" if value in ("", (), {}) else str(value), doc(*name.split("."))


def _fields() -> Iterator[tuple[str, Any]]:
    """Yield fields and their types; tables of settings, such as evaluate.sets, have NAME for the user's names."""
    for name, kind in kinds().items():
        values = get_args(kind)
        if get_origin(kind) is dict and is_dataclass(values[1]):
            yield from ((f"{name}.NAME.{field}", hint) for field, hint in get_type_hints(values[1]).items())
        else:
            yield name, kind


def _shape(kind: Any) -> str:
    """Return the values that a type takes, such as INT or lora|none."""
    arguments = get_args(kind)
    if hasattr(kind, "__metadata__"):
        return _shape(kind.__origin__)
    if get_origin(kind) is Literal:
        return "|".join(map(str, arguments))
    if get_origin(kind) is tuple:
        shapes = [_shape(part) for part in arguments if part is not ...]
        return f"{shapes[0]} ..." if ... in arguments else " ".join(shapes)
    if get_origin(kind) is dict:
        return "TABLE"
    return "|".join(dict.fromkeys(map(_shape, arguments))) if arguments else _NAMES.get(kind, "TEXT")
