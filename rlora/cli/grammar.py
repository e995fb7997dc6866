"""The grammar of config fields on the command line: `--learner.rank 4` or `--learner.rank=4`, for every command."""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from rlora.config import ELSEWHERE, check_learnable, like
from rlora.records import RloraError
from rlora.settings import Config
from rlora.settings.earlier import REPLACED, replaced
from rlora.settings.fields import STRICT


class UsageError(RloraError):
    """An unknown field on the command line, or a field without a value. The exit status of `rlora` is then 2."""


_OPEN_TABLES = ("env_args.", "reward_args.", "chat.template_args.", "evaluate.sets.")  # the user chooses names in them


def split(arguments: Sequence[str], options: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the config fields that a command line sets, by full names, and the other arguments.

    A field takes the text after its equals sign, or else the next argument. A list takes all arguments up to the next
    option, and a field that is true or false can stand alone, which sets it to true. `options` are the names of the
    command's own options, which hide fields of the same name. Raises RloraError for a field that does not exist, has no
    value, or is a sampling option that the learner does not support.
    """
    changes: dict[str, Any] = {}
    rest: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        text, equals, value = argument.partition("=")
        name = text.removeprefix("--").replace("-", "_")
        if argument == "--set":
            changes |= _of_set(_pop_values(remaining))
        elif not argument.startswith("--") or name in options or name == "help":
            rest.append(argument)
        elif positive := _negated(name):
            _warn(argument, f"--{positive}=false")
            changes[positive] = False
        elif name in REPLACED:
            changes |= _replaced(text, name, value if equals else _pop_value(name, bool | str, remaining)[0])
        else:
            kind = _kind(name, text)
            changes[name] = parsed(kind, [value] if equals else _pop_value(name, kind, remaining))
    return changes, rest


def change(text: str) -> tuple[str, Any]:
    """Return the field and the value of NAME=VALUE. Raises RloraError if there is no value, or no such field."""
    option, equals, value = text.partition("=")
    if not equals:
        raise RloraError(f"{text}: no value; give NAME=VALUE, such as learner.lr=1e-4")
    name = option.removeprefix("--").replace("-", "_")
    return name, parsed(_kind(name, option), [value])


def parsed(kind: Any, texts: Sequence[str]) -> Any:
    """Return the value that `texts`, the arguments after a field's name, give a field of type `kind`.

    Candidates are, in this order: a single text parsed as JSON, a single text unchanged, the list of the texts parsed
    as JSON, the list of the unchanged texts. Returns the first candidate that the type accepts. If there is none,
    returns the first candidate, which validation then reports.
    """
    values = [value_of(text) for text in texts]
    forms = [values[0], texts[0]] if len(texts) == 1 else []
    forms += [values, [*texts]]
    return next((form for form in forms if _fits(kind, form)), forms[0])


def value_of(text: str) -> Any:
    """Parse a text as JSON, such as a number, a boolean or a list. Returns the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@cache
def kinds() -> dict[str, Any]:
    """Return the type of each field of the config, by the full name of the field."""
    return _kinds(Config, "")


def _kinds(settings: Any, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    hints = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        section: Any = getattr(kind, "__origin__", kind)  # without its tags
        found |= _kinds(section, f"{name}.") if is_dataclass(section) else {name: kind}
    return found


def _kind(name: str, option: str) -> Any:
    """Return the type of a field. Raises RloraError if there is none of this name, which was written as `option`."""
    if name.startswith(_OPEN_TABLES):
        return Any
    if name not in kinds():
        check_learnable([name.rpartition(".")[2]])
        if name in ELSEWHERE:
            raise RloraError(f"{option}: no such option; use --{ELSEWHERE[name].replace('_', '-')}")
        raise UsageError(f"{option}: no such field; {like(name)}")
    return kinds()[name]


def _fits(kind: Any, value: Any) -> bool:
    try:
        _adapter(kind).validate_json(json.dumps(value))
    except ValidationError:
        return False
    return True


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=None if is_dataclass(kind) else STRICT)


def _takes_list(kind: Any) -> bool:
    return get_origin(kind) is tuple or any(_takes_list(part) for part in get_args(kind))


def _pop_value(name: str, kind: Any, remaining: list[str]) -> list[str]:
    if kind is not Any and _takes_list(kind) and (values := _pop_values(remaining)):
        return values
    next_value = remaining[0] if remaining and not remaining[0].startswith("--") else None
    if kind is not Any and _fits(kind, True) and (next_value is None or not _fits(kind, value_of(next_value))):
        return ["true"]
    if next_value is None:
        raise UsageError(f"--{name}: no value; give --{name}=VALUE")
    return [remaining.pop(0)]


def _pop_values(remaining: list[str]) -> list[str]:
    count = next((number for number, text in enumerate(remaining) if text.startswith("--")), len(remaining))
    values, remaining[:] = remaining[:count], remaining[count:]
    return values


# --- forms of earlier releases ---


def _of_set(texts: Sequence[str]) -> dict[str, Any]:
    """Return the fields that `--set NAME=VALUE ...` sets."""
    changes = dict(map(change, texts))
    _warn("--set", " ".join(f"--{text}" for text in texts))
    return changes


def _negated(name: str) -> str | None:
    """Return the field that --section.no-NAME sets to false; None if `name` is not of this form."""
    section, dot, last = name.rpartition(".")
    positive = f"{section}{dot}{last.removeprefix('no_')}"
    return positive if last.startswith("no_") and name not in kinds() and positive in kinds() else None


def _replaced(option: str, name: str, value: str) -> dict[str, Any]:
    """Return the fields that replace the field `name` of an earlier release with its value."""
    section, _, field = name.rpartition(".")
    changes = {f"{section}.{new}": parsed_value for new, parsed_value in replaced({field: value_of(value)}).items()}
    _warn(f"{option} {value}", " ".join(f"--{new}={text}" for new, text in changes.items()))
    return changes


def _warn(old: str, new: str) -> None:
    remedy = f"write {new}" if new else "remove this option"
    logging.getLogger(__name__).warning("%s is the form of an earlier release; %s", old, remedy)
