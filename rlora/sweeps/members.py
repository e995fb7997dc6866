"""Members of a sweep: their names and configs, and which of them can train at the same time."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from operator import attrgetter
from typing import Any

from rlora.cluster.resources import SHARED
from rlora.config import changed, validate
from rlora.records import RloraError
from rlora.settings import Config

_PROCESS_FIELDS = (  # settings of the job's processes, which all members share
    "engine.", "restarts", "learner.replicas", "learner.concurrent", "learner.shard", "learner.checkpointing",
    "learner.deterministic", "learner.threads", "learner.cpus", "learner.gpus",
)  # fmt: skip
_NAME = re.compile(r"[\w.+=-]+")


@dataclass(frozen=True)
class Member:
    """A member of a sweep: a run whose config differs from the sweep's shared config in some fields."""

    name: str  # name of the member, of its directory and of its policy
    changes: Mapping[str, Any]  # the fields that differ from the shared config, by full name
    config: Config

    def configuration(self, pool: Iterable[str]) -> str:
        """Return a key of the member's configuration, which is `changes` without the fields in `pool`."""
        return json.dumps({name: value for name, value in self.changes.items() if name not in pool}, sort_keys=True)


def members(
    table: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], singles: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Member]:
    """Build a member for each combination of the axes' values, and a member for each item of `singles`.

    `table` is the shared config. `axes` has lists of values by full field name; `singles` has changes by member name.
    Raises RloraError, which names member, field and value, for an unknown field, an invalid value, a field of the job's
    processes, two equal members, or fewer than two members.
    """
    for field, values in axes.items():
        if not values:
            raise RloraError(f"--over {field}: no values; add values, as in --over learner.rank=1,8")
    labels = _labels(axes)
    grid: list[Mapping[str, Any]] = (
        [dict(zip(axes, values, strict=True)) for values in product(*axes.values())] if axes else []
    )
    named = [
        ("_".join(f"{labels[field]}-{_name_part(value)}" for field, value in changes.items()), changes)
        for changes in grid
    ]
    named += list((singles or {}).items())
    result: dict[str, Member] = {}
    for name, changes in named:
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise RloraError(f"member {name!r}: not a name for a directory; use letters, digits and any of . _ - + =")
        if name in result:
            raise RloraError(f"member {name}: two members have this name; use unique names in --member NAME:...")
        result[name] = Member(name, changes, config_of(table, name, changes))
    check_distinct(result.values())
    if len(result) < 2:
        raise RloraError(
            f"sweep: {len(result)} members, fewer than 2; add an axis, as in --over learner.rank=1,8, or "
            "--member NAME:field=value, or train a single run with `rlora train`"
        )
    return list(result.values())


def config_of(table: Mapping[str, Any], name: str, changes: Mapping[str, Any]) -> Config:
    """Build the config of a member from the shared config `table`. Raises RloraError that names the member."""
    for field, value in changes.items():
        if field.startswith(_PROCESS_FIELDS):
            raise RloraError(
                f"member {name}: {field} = {value!r}: all members share this setting of the job's processes; set it "
                f"for the whole sweep, with --{field.replace('_', '-')}"
            )
    try:
        return validate(changed(table, changes))
    except RloraError as error:
        raise RloraError(f"member {name}: {error}") from None


def check_distinct(candidates: Iterable[Member]) -> None:
    """Raise RloraError if two members have equal configs."""
    seen: dict[str, str] = {}
    for member in candidates:
        config = json.dumps(asdict(member.config), sort_keys=True)
        if config in seen:
            raise RloraError(
                f"member {member.name}: its config is the same as that of {seen[config]}; remove one of the two "
                "members, or set a different seed"
            )
        seen[config] = member.name


def groups(candidates: Iterable[Member]) -> list[list[Member]]:
    """Partition members into groups that can train at the same time, because they agree in all process-wide settings.

    A member that trains all weights is a group by itself.
    """
    groups_by_key: dict[str, list[Member]] = {}
    for member in candidates:
        shared = [attrgetter(name)(member.config) for name in SHARED]
        is_async = bool(member.config.max_staleness) and not member.config.learner.threads
        exclusive = member.name if member.config.learner.full_finetuning else ""
        is_supervised = member.config.algorithm.supervised  # such a group has no engines
        key = json.dumps([shared, is_async, is_supervised, exclusive], default=asdict)
        groups_by_key.setdefault(key, []).append(member)
    return list(groups_by_key.values())


def _labels(fields: Iterable[str]) -> dict[str, str]:
    """Return the label of each field in member names: the last component of the field's name, or the full name if two
    fields have the same last component."""
    last = [field.rpartition(".")[2] for field in fields]
    return {field: end if last.count(end) == 1 else field for field, end in zip(fields, last, strict=True)}


def _name_part(value: Any) -> str:
    """Format a value for a member's name: 3e-4, 16, math, all-linear."""
    if isinstance(value, float) and value and abs(value) < 0.01:
        digits, _, power = f"{value:e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")
