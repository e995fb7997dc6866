"""Resources of a job: the fields that its policies share, version slots, and GPUs for each engine and learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING

from rlora.records import RloraError
from rlora.settings import Config

if TYPE_CHECKING:
    from rlora.rollout.task import ServedPolicy  # imports transformers

SHARED = (  # fields that all policies of a job share, because a process has them once
    "model", "dtype", "engine", "restarts", "learner.adapter", "learner.quantise", "learner.shard", "learner.replicas",
    "learner.concurrent", "learner.checkpointing", "learner.deterministic", "learner.threads", "learner.cpus",
    "learner.gpus",
)  # fmt: skip


def slots_needed(config: Config) -> int:
    """Number of versions of a policy that an engine serves at a time.

    The newest one, `max_staleness` older ones, one that is being delivered, and one that is being evaluated.
    """
    return config.max_staleness + 2 + (config.evaluate.every > 0)


def total_slots(served: Sequence[ServedPolicy]) -> int:
    return sum(slots_needed(member.config) for member in served)


def shared_config(served: Sequence[ServedPolicy]) -> Config:
    """Config of the job's processes: the fields that all policies share, and the maximum of what they need.

    Raises RloraError, naming the field, if two policies differ in a field that they have to share.
    """
    first, *rest = served
    for member in rest:
        for name in SHARED:
            expected, value = (attrgetter(name)(policy.config) for policy in (first, member))
            if value != expected:
                raise RloraError(
                    f"{name} = {value!r} of {member.policy}: {first.policy} has {expected!r}, and policies that train "
                    "together share this field; set the same value, or train them one after the other"
                )
        if bool(member.config.max_staleness) != bool(first.config.max_staleness) and not first.config.learner.threads:
            raise RloraError(
                f"max_staleness = {member.config.max_staleness} of {member.policy}: {first.policy} has "
                f"{first.config.max_staleness}. Whether it is 0 decides the learner's default number of threads, which "
                "affects rounding; set learner.threads for both"
            )
        if first.config.learner.full_finetuning:
            raise RloraError(
                f'learner.adapter = "none": a learner then trains one policy only, not both {first.policy} and '
                f"{member.policy}; train them one after the other"
            )
        if (names := [policy.policy for policy in served]).count(member.policy) > 1:
            raise RloraError(f"policy {member.policy}: the name occurs twice in {names}; give each policy its own name")
        if member.task.stop != first.task.stop:
            raise RloraError(
                f"{member.policy}: its env or chat.stop ends messages with {list(member.task.stop)}, and that of "
                f"{first.policy} with {list(first.task.stop)}; policies that train together share stop strings: set "
                "the same ones, or train them one after the other"
            )
    configs = [member.config for member in served]
    learner = replace(
        first.config.learner,
        rank=max(config.learner.rank for config in configs),
        head=any(config.learner.head for config in configs),
        start_from=next((config.learner.start_from for config in configs if config.learner.start_from), ""),
    )
    longest = max(configs, key=lambda config: config.max_model_len)
    staleness = max(config.max_staleness for config in configs)
    return replace(first.config, learner=learner, sampling=longest.sampling, max_staleness=staleness)


def assign_gpus(config: Config, cluster_gpus: float, can_grow: bool = False) -> Config:
    """Resolve `engine.gpus` and `learner.gpus`: what each engine (per tensor-parallel rank) and learner reserves.

    Raises RloraError if that is impossible, or if the cluster has too few GPUs and can't grow.
    """
    engine, learner = config.engine, config.learner
    learners, parts = learner.replicas * learner.concurrent, engine.tensor_parallel_size
    if not cluster_gpus:
        return replace(config, engine=replace(engine, gpus=0.0), learner=replace(learner, gpus=0.0))
    enough = engine.replicas * parts + learners <= cluster_gpus
    learner_gpus = (1.0 if enough or learner.replicas > 1 else 0.5) if learner.gpus == "auto" else learner.gpus
    engine_gpus = (1.0 if enough or parts > 1 else 0.5) if engine.gpus == "auto" else engine.gpus
    if parts > 1 and engine_gpus < 1:
        raise RloraError(
            f"engine.gpus = {engine_gpus}: with engine.tensor_parallel_size = {parts} an engine takes whole GPUs; "
            "leave engine.gpus out"
        )
    if learner.replicas > 1 and 0 < learner_gpus < 1:
        raise RloraError(
            f"learner.gpus = {learner_gpus}: {learner.replicas} learners might share a GPU, and NCCL needs one per "
            "process; leave learner.gpus out"
        )
    needed = engine.replicas * parts * engine_gpus + learners * learner_gpus
    if needed > cluster_gpus and not can_grow:
        raise RloraError(
            f"GPU: engines need {engine.replicas} x {parts * engine_gpus:g} and learners {learners} x {learner_gpus:g} "
            f"GPUs, {needed:g} in total, and Ray has {cluster_gpus:g}; lower engine.replicas, "
            "engine.tensor_parallel_size or learner.replicas, or let them share GPUs by engine.gpus and learner.gpus"
        )
    return replace(
        config, engine=replace(engine, gpus=float(engine_gpus)), learner=replace(learner, gpus=float(learner_gpus))
    )
