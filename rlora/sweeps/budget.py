"""Estimates what a sweep needs before it starts: completions in flight, adapter slots, memory and disk."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlora.cluster.resources import shared_config, slots_needed
from rlora.core.footprint import adapter_bytes
from rlora.model.base import read_config
from rlora.planning import gib, plan
from rlora.records import RloraError
from rlora.rollout.task import ServedPolicy, Task
from rlora.settings import AlgorithmConfig, Config
from rlora.sweeps.members import Member

_MIB = 2**20
_STATE_SHARE = 12 / 16  # of the bytes of fp32 master weights, gradient and Adam's moments: a state has no gradient


@dataclass(frozen=True)
class Budget:
    """Estimated needs of the members that train together, from `budget`; sizes in bytes."""

    members: int
    rows: int  # completions in flight
    concurrent_rows: int  # completions that the engines sample at a time
    slots: int  # adapter versions that each engine keeps loaded
    slot_bytes: int  # memory of one slot
    base: int  # learner, engines and driver with the first member
    member_bytes: int  # all members together, in the learner, the driver and the slots
    disk: int  # size of the bundles that all members keep
    free: int  # free disk space
    total: int  # RAM, or memory of the GPU
    device: str  # name of the GPU, or "CPU" with the number of cores

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Label and text of each line of the report."""
        sampling = [] if not self.concurrent_rows else self._sampling_lines
        return [
            ("members", str(self.members)),
            *sampling,
            ("memory", f"base and processes {gib(self.base)}, members {gib(self.member_bytes)} of {gib(self.total)}"),
            ("disk", f"{gib(self.disk)} of {gib(self.free)} free"),
        ]

    @property
    def _sampling_lines(self) -> list[tuple[str, str]]:
        limit = f"; the engines sample {self.concurrent_rows} at a time" if self.rows > self.concurrent_rows else ""
        return [
            ("completions in flight", f"{self.rows}{limit}"),
            ("adapter slots per engine", f"{self.slots}, {self.slot_bytes / _MIB:.1f} MiB each"),
        ]

    def check(self) -> None:
        """Raise RloraError if the members need more memory or disk space than there is."""
        if self.base + self.member_bytes > self.total:
            per_member = self.member_bytes / self.members
            fit = max(0, int((self.total - self.base) / per_member))
            raise RloraError(
                f"sweep: {self.members} members need {gib(self.member_bytes)} in addition to {gib(self.base)} for base "
                f"and processes, but {self.device} has {gib(self.total)}: {fit} members fit; train fewer members at a "
                "time, or lower engine.kv_cache_gib"
            )
        if self.disk > self.free:
            raise RloraError(
                f"sweep: {self.members} members need {gib(self.disk)} of disk space, but {gib(self.free)} are free; "
                "lower checkpoint.keep_last, or use a different --run-dir"
            )


def budget(group: Sequence[Member], tasks: Mapping[str, Task], path: Path) -> Budget:
    """Estimate what a group of members needs to train together.

    `tasks` has the task of each member, by the member's name; `path` is the sweep's directory.
    """
    base = read_config(group[0].config.model)
    job = shared_config([ServedPolicy(member.name, member.config, tasks[member.name]) for member in group])
    estimate = plan(job)
    bucket = replace(job, learner=replace(job.learner, rank=1 if job.learner.rank == 1 else 8))
    slot_bytes = (
        0
        if job.learner.full_finetuning
        else adapter_bytes(replace(bucket, algorithm=AlgorithmConfig()), base) // 16 * 2
    )
    slots = sum(slots_needed(member.config) for member in group)
    size_of, sizes = dict[str, int](), list[int]()
    for member in group:
        key = str((member.config.learner, member.config.critic, member.config.algorithm.advantage))
        size_of[key] = size_of.get(key) or adapter_bytes(member.config, base)
        sizes.append(size_of[key])
    engines = job.engines
    learner = estimate.learner.fixed + estimate.learner.per_row + estimate.slack
    engine = estimate.weights + estimate.overhead + estimate.kv_cache
    base_bytes = estimate.used if estimate.on_gpu else estimate.overhead + learner + engines * engine
    return Budget(
        members=len(group),
        rows=sum(_rows(member.config) for member in group),
        concurrent_rows=engines * job.engine.sequences(estimate.on_gpu),
        slots=slots,
        slot_bytes=slot_bytes,
        base=base_bytes,
        member_bytes=sum(int(size * (1 + _STATE_SHARE)) for size in sizes) + engines * slots * slot_bytes,
        disk=sum(  # a bundle contains adapter and state, which take as much as in the learner
            size * min(member.config.checkpoint.keep_last, member.config.steps + 1)
            for size, member in zip(sizes, group, strict=True)
        ),
        free=shutil.disk_usage(_existing_parent(path)).free,
        total=estimate.total,
        device=estimate.device,
    )


def _rows(config: Config) -> int:
    return config.prompts_per_step * config.group_size * (config.max_staleness + 1)


def _existing_parent(path: Path) -> Path:
    """Return the absolute path, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
