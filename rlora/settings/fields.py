"""Types of config fields, and tags that say what a change of a field means for a saved run."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, NonNegativeFloat


class Tag(Enum):
    """What else depends on a field, so that a change matters for a saved run. `tagged` lists the fields of each tag."""

    POLICY = "the shape of the saved adapter or its base: it may not change on resume or fork"
    EPISODES = "how episodes are sampled and scored: if it changes on resume, prompts in flight are sampled again"


def _absolute(directory: str) -> str:
    """Return the absolute path of a local directory, because actors have different working directories. Any other text,
    such as a URL or a hub id, is returned unchanged."""
    return str(Path(directory).absolute()) if directory and Path(directory).is_dir() else directory


Directory = Annotated[str, AfterValidator(_absolute)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Value = bool | int | float | str
Arguments = dict[str, Value | list[Value]]  # arguments of a plug-in or a template, by name
Gpus = NonNegativeFloat | Literal["auto"]

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Problem(NamedTuple):
    """A rule that a config breaks, as `Config.problems` yields it."""

    field: str  # full name, such as learner.rank
    reason: str  # what is wrong with its value, and how to fix it


def tagged(settings: type, tag: Tag, prefix: str = "") -> Iterator[str]:
    """Yield the full names, such as learner.rank, of the fields of `settings` that have a tag. `prefix` starts each
    name."""
    hints = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        kind: Any = hints[field.name]
        if tag in getattr(kind, "__metadata__", ()):
            yield f"{prefix}{field.name}"
        elif is_dataclass(kind) and isinstance(kind, type):
            yield from tagged(kind, tag, f"{prefix}{field.name}.")
