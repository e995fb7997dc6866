"""What a sweep will take: rows in flight, slots, memory and disk; known before anything is started."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlora.cluster import shared, versions_of
from rlora.core.footprint import adapter_bytes
from rlora.model.base import read_config
from rlora.planning import gib, plan
from rlora.records import RloraError
from rlora.rollout.task import ServedPolicy, Task
from rlora.settings import AlgorithmConfig, Config
from rlora.sweeps.members import Member

_MIB = 2**20
_OF_STATE = 12 / 16  # of masters, gradient and moments, without the gradient: what the driver and a bundle hold


@dataclass(frozen=True)
class Budget:
    """Of members that train together; sizes in bytes."""

    members: int
    rows: int  # completions in flight
    at_once: int  # that the engines sample at a time
    slots: int  # versions that engines hold
    of_slot: int
    base: int  # learner, engines and driver with the first member
    of_members: int  # what all take together in the learner, the driver and the slots
    disk: int
    free: int  # of the disk
    total: int  # of the RAM, or of the card
    where: str

    @property
    def lines(self) -> list[tuple[str, str]]:
        """In words."""
        more = f"; the engines sample {self.at_once} at a time" if self.rows > self.at_once else ""
        return [
            ("members", str(self.members)),
            ("completions in flight", f"{self.rows}{more}"),
            ("versions that engines hold", f"{self.slots}, {self.of_slot / _MIB:.1f} MiB each"),
            ("memory", f"base and processes {gib(self.base)}, members {gib(self.of_members)} of {gib(self.total)}"),
            ("disk", f"{gib(self.disk)} of {gib(self.free)} that are free"),
        ]

    def check(self) -> None:
        """Raise RloraError where memory or disk can't hold it."""
        if self.base + self.of_members > self.total:
            each = self.of_members / self.members
            fit = max(0, int((self.total - self.base) / each))
            raise RloraError(
                f"sweep: {self.members} members take {gib(self.of_members)} beside {gib(self.base)} of base and "
                f"processes, and {self.where} has {gib(self.total)}: {fit} of them fit; train fewer at a time, or "
                "lower engine.kv_cache_gib"
            )
        if self.disk > self.free:
            raise RloraError(
                f"sweep: {self.members} members take {gib(self.disk)} of disk, and {gib(self.free)} are free; lower "
                "checkpoint.keep_last, or give another --run-dir"
            )


def budget(group: Sequence[Member], tasks: Mapping[str, Task], place: Path) -> Budget:
    """What the members of a group take together; `tasks` has what each trains on, and `place` is on the disk."""
    base = read_config(group[0].config.model)
    job = shared([ServedPolicy(each.name, each.config, tasks[each.name]) for each in group])
    made = plan(job)
    bucket = replace(job, learner=replace(job.learner, rank=1 if job.learner.rank == 1 else 8))
    of_slot = (
        0
        if job.learner.full_finetuning
        else adapter_bytes(replace(bucket, algorithm=AlgorithmConfig()), base) // 16 * 2
    )
    slots = sum(versions_of(each.config) for each in group)
    known, sizes = dict[str, int](), list[int]()
    for each in group:
        key = str((each.config.learner, each.config.critic, each.config.algorithm.advantage))
        known[key] = known.get(key) or adapter_bytes(each.config, base)
        sizes.append(known[key])
    engines = job.engine.replicas
    learner = made.learner.fixed + made.learner.of_rows + made.slack
    engine = made.weights + made.overhead + made.kv_cache
    alone = made.taken if made.on_gpu else made.overhead + learner + engines * engine
    return Budget(
        members=len(group),
        rows=sum(_rows(each.config) for each in group),
        at_once=engines * job.engine.sequences(made.on_gpu),
        slots=slots,
        of_slot=of_slot,
        base=alone,
        of_members=sum(int(size * (1 + _OF_STATE)) for size in sizes) + engines * slots * of_slot,
        disk=sum(  # a bundle holds the adapter beside the state: as much as the learner
            size * min(each.config.checkpoint.keep_last, each.config.steps + 1)
            for size, each in zip(sizes, group, strict=True)
        ),
        free=shutil.disk_usage(_there(place)).free,
        total=made.total,
        where=made.where,
    )


def _rows(config: Config) -> int:
    return config.prompts_per_step * config.group_size * (config.max_staleness + 1)


def _there(place: Path) -> Path:
    """The nearest directory that is there."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place
