"""`rlora completion`: the script by which a shell completes commands, options and fields of the config."""

import argparse
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from rlora.cli.arguments import COMMANDS, Completion, OverConfig, Submit
from rlora.cli.grammar import kinds


def completion_command(arguments: list[str]) -> None:
    """Print the script for a shell."""
    options = tyro.cli(Completion, args=arguments, prog="rlora completion")
    import shtab

    print(shtab.complete(_parser(), shell=options.shell))


def _parser() -> argparse.ArgumentParser:
    """Return a parser with the commands, options and fields, which only describes them."""
    import shtab

    parser = argparse.ArgumentParser(prog="rlora")
    commands = parser.add_subparsers()
    for name, kind in COMMANDS.items():
        command = commands.add_parser(name, help=str(kind.__doc__))  # shtab leaves out commands without help
        hints = get_type_hints(kind, include_extras=True)
        own = {field.name: hints[field.name] for field in fields(kind) if field.name not in ("config", "changes")}
        takes_fields = issubclass(kind, OverConfig) or kind is Submit
        for field, hint in (kinds() | own if takes_fields else own).items():
            is_positional = tyro.conf.Positional in getattr(hint, "__metadata__", ())
            option = field if is_positional else f"--{field.replace('_', '-')}"
            if field in own and getattr(hint, "__origin__", None) is bool:  # a flag without a value
                command.add_argument(option, action="store_true")
                continue
            choices = _choices(hint)
            action: Any = command.add_argument(option, choices=choices or None, nargs="*" if is_positional else None)
            if not choices:
                action.complete = shtab.FILE
    return parser


def _choices(kind: Any) -> list[str]:
    """Return the values of a type that has a few."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    return [value for part in get_args(kind) for value in _choices(part)] if get_args(kind) else []
