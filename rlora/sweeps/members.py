"""The members of a sweep: what each changes in the config that they share, and which can train at the same time."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from operator import attrgetter
from typing import Any

from rlora.cluster import SHARED
from rlora.config import changed, validate
from rlora.records import RloraError
from rlora.settings import Config

_OF_PROCESS = (
    "engine.", "restarts", "learner.replicas", "learner.concurrent", "learner.shard", "learner.checkpointing",
    "learner.deterministic", "learner.threads", "learner.cpus", "learner.gpus",
)  # fmt: skip
_NAME = re.compile(r"[\w.+=-]+")


@dataclass(frozen=True)
class Member:
    """A run of a sweep."""

    name: str  # of its directory, and of its policy
    changes: Mapping[str, Any]  # by the fields' full names, what it changes in the config of the sweep
    config: Config

    def configuration(self, pool: Iterable[str]) -> str:
        """What it changes beside the fields of `pool`: members that agree in it are one configuration."""
        return json.dumps({name: value for name, value in self.changes.items() if name not in pool}, sort_keys=True)


def members(
    table: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], singles: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Member]:
    """Those of every combination of the axes' values, and `singles`, each with the changes that it is given.

    `table` has the tables of the config that they share. Raises RloraError that names the member, the field and the
    value: for an unknown field, a value that it refuses, one that the job has once, and members that are alike.
    """
    for field, values in axes.items():
        if not values:
            raise RloraError(f"--over {field}: it has no value; give some, as in --over learner.rank=1,8")
    label = _labels(axes)
    grid: list[Mapping[str, Any]] = (
        [dict(zip(axes, values, strict=True)) for values in product(*axes.values())] if axes else []
    )
    named = [("_".join(f"{label[field]}-{_written(value)}" for field, value in each.items()), each) for each in grid]
    named += list((singles or {}).items())
    made: dict[str, Member] = {}
    for name, changes in named:
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise RloraError(f"member {name!r}: it names a directory; use letters, digits and any of . _ - + =")
        if name in made:
            raise RloraError(f"member {name}: there are two of this name; give each another by --member NAME:...")
        made[name] = Member(name, changes, config_of(table, name, changes))
    check_distinct(made.values())
    if len(made) < 2:
        raise RloraError(
            f"sweep: {len(made)} members; give an axis, as in --over learner.rank=1,8, or --member NAME:field=value "
            "twice, or train a single run by `rlora train`"
        )
    return list(made.values())


def config_of(table: Mapping[str, Any], name: str, changes: Mapping[str, Any]) -> Config:
    """The config of a member. Raises RloraError that names it."""
    for field, value in changes.items():
        if field.startswith(_OF_PROCESS):
            raise RloraError(
                f"member {name}: {field} = {value!r}: the job's processes have it once, and no policy learns otherwise "
                f"by it; give it to the whole sweep, by --{field.replace('_', '-')}"
            )
    try:
        return validate(changed(table, changes))
    except RloraError as error:
        raise RloraError(f"member {name}: {error}") from None


def check_distinct(made: Iterable[Member]) -> None:
    """Raise RloraError where two members have the same config."""
    seen: dict[str, str] = {}
    for each in made:
        config = json.dumps(asdict(each.config), sort_keys=True)
        if config in seen:
            raise RloraError(f"member {each.name}: it is the same as {seen[config]}; leave one out, or change its seed")
        seen[config] = each.name


def groups(made: Sequence[Member], stops: Mapping[str, Sequence[str]]) -> list[list[Member]]:
    """The members that can train at the same time, in their order: they share what a process has once.

    `stops` has the strings that end a message, by member. All weights are trained by one member at a time.
    """
    found: dict[str, list[Member]] = {}
    for each in made:
        shared = [attrgetter(name)(each.config) for name in SHARED]
        ahead = bool(each.config.max_staleness) and not each.config.learner.threads
        alone = each.name if each.config.learner.full_finetuning else ""
        found.setdefault(json.dumps([shared, ahead, alone, list(stops[each.name])], default=asdict), []).append(each)
    return list(found.values())


def _labels(fields: Iterable[str]) -> dict[str, str]:
    """What names call each field: its last word, or all of them where two end alike."""
    last = [field.rpartition(".")[2] for field in fields]
    return {field: end if last.count(end) == 1 else field for field, end in zip(fields, last, strict=True)}


def _written(value: Any) -> str:
    """A value as it stands in a name: 3e-4, 16, math, all-linear."""
    if isinstance(value, float) and value and abs(value) < 0.01:
        digits, _, power = f"{value:e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")
