"""The types that fields of the config have."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field


def _absolute(directory: str) -> str:
    """A local directory from the root, for an actor's working directory is another; anything else as it is."""
    return str(Path(directory).absolute()) if directory and Path(directory).is_dir() else directory


Directory = Annotated[str, AfterValidator(_absolute)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Value = bool | int | float | str
Arguments = dict[str, Value | list[Value]]  # of a plug-in or a template, by name

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
Gpus = Annotated[float, Field(ge=0)] | Literal["auto"]
