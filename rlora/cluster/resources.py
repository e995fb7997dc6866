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
    """Return the number of versions of a policy that an engine serves at a time.

    These are the newest version, `max_staleness` older ones, the version that is being delivered and, if
    `evaluate.every` is set, the version that is being evaluated.
    """
    return config.max_staleness + 2 + (config.evaluate.every > 0)


def total_slots(served: Sequence[ServedPolicy]) -> int:
    """Return the number of versions that an engine serves at a time for all policies together."""
    return sum(slots_needed(member.config) for member in served)


def shared_config(served: Sequence[ServedPolicy]) -> Config:
    """Return the config of the job's processes: the shared fields, and the largest values that the policies need.

    Raises RloraError, naming the field, if two policies differ in a field of `SHARED`, or can't train in one job.
    """
    first, *rest = served
    for member in rest:
        for name in SHARED:
            expected, value = (attrgetter(name)(policy.config) for policy in (first, member))
            if value != expected:
                raise RloraError(
                    f"{name} = {value!r} of {member.policy}: {first.policy} has {expected!r}, and policies that train "
                    "together share this field; set the same value, or train the policies one after the other"
                )
        if member.config.algorithm.supervised != first.config.algorithm.supervised:
            raise RloraError(
                f"algorithm.loss = {member.config.algorithm.loss!r} of {member.policy}: {first.policy} has "
                f"{first.config.algorithm.loss!r}, and only one of them samples; train the policies one after the other"
            )
        if bool(member.config.max_staleness) != bool(first.config.max_staleness) and not first.config.learner.threads:
            raise RloraError(
                f"max_staleness = {member.config.max_staleness} of {member.policy}: {first.policy} has "
                f"{first.config.max_staleness}. The default of learner.threads depends on whether max_staleness is 0, "
                "and affects rounding; set learner.threads to the same number for both policies"
            )
        if first.config.learner.full_finetuning:
            raise RloraError(
                'learner.adapter = "none": all weights of the base are trained, so a job can train one policy only, '
                f'not both {first.policy} and {member.policy}; set learner.adapter = "lora", or train the policies '
                "one after the other"
            )
        if (names := [policy.policy for policy in served]).count(member.policy) > 1:
            raise RloraError(f"policy {member.policy}: the name occurs twice in {names}; give each policy its own name")
    configs = [member.config for member in served]
    learner = replace(
        first.config.learner,
        rank=max(config.learner.rank for config in configs),
        head=any(config.learner.head for config in configs),
        start_from=next((config.learner.start_from for config in configs if config.learner.start_from), ""),
    )
    longest = max(configs, key=lambda config: config.max_model_len)
    staleness = max(config.max_staleness for config in configs)
    sampling = next((config.sampling for config in configs if config.sampling.truncates), longest.sampling)
    limits = longest.sampling
    sampling = replace(sampling, max_tokens=limits.max_tokens, max_prompt_tokens=limits.max_prompt_tokens)
    return replace(first.config, learner=learner, sampling=sampling, max_staleness=staleness)


def check_joins(name: str, config: Config, job: Config) -> None:
    """Raise RloraError if the processes of a job, which started with the shared config `job`, can't serve a policy."""
    learner, started = config.learner, job.learner
    is_too_large = {
        f"sampling: max_prompt_tokens + max_tokens = {config.max_model_len}": config.max_model_len > job.max_model_len,
        "sampling: top_k, top_p or min_p": config.sampling.truncates and not job.sampling.truncates,
        f"learner.rank = {learner.rank}": learner.rank > 1 == started.rank and not started.start_from,
        "learner.head = true": learner.head and not started.head,
        f"learner.start_from = {learner.start_from!r}": bool(learner.start_from) and not started.start_from,
    }
    if needs := [field for field, is_needed in is_too_large.items() if is_needed]:
        raise RloraError(
            f"{name}: the engines started without room for {'; '.join(needs)}; stop the sweep, repeat the request, and "
            "resume the sweep with `rlora sweep --resume`, which starts engines for all its members"
        )


def check_sampling_on_gpu(*configs: Config) -> None:
    """Raise RloraError if engines on GPUs can't return the tokens that top-k, top-p and min-p kept, for the policies of
    a job with these configs. vLLM returns them for all requests or for none, and only if top-k limits their number."""
    settings = [config.sampling for config in configs if config.engines]
    unlimited = next((sampling for sampling in settings if not sampling.top_k), None)
    if unlimited and any(sampling.truncates for sampling in settings):
        raise RloraError(
            f"sampling.top_k = 0, with top_p = {unlimited.top_p} and min_p = {unlimited.min_p}: on a GPU, vLLM returns "
            "the tokens that top-p and min-p kept only if top-k limits their number, and does so for all policies of a "
            "job; set sampling.top_k, for example to 512, for each policy that trains with another one that has top_k, "
            "top_p or min_p"
        )


def assign_gpus(config: Config, cluster_gpus: float, can_grow: bool = False) -> Config:
    """Return `config` with numbers for `engine.gpus` and `learner.gpus`, instead of "auto".

    `engine.gpus` is the number of GPUs that each tensor-parallel rank of an engine reserves, `learner.gpus` the number
    that each learner reserves. Both are 0 if the Ray cluster has no GPU (`cluster_gpus` is 0). Raises RloraError if the
    numbers are not possible, or if they exceed `cluster_gpus` and the cluster can't grow.
    """
    engine, learner = config.engine, config.learner
    learners, parts = learner.replicas * learner.concurrent, engine.tensor_parallel_size
    if not cluster_gpus:
        return replace(config, engine=replace(engine, gpus=0.0), learner=replace(learner, gpus=0.0))
    enough = config.engines * parts + learners <= cluster_gpus
    learner_gpus = (1.0 if enough or learner.replicas > 1 else 0.5) if learner.gpus == "auto" else learner.gpus
    engine_gpus = (1.0 if enough or parts > 1 else 0.5) if engine.gpus == "auto" else engine.gpus
    if parts > 1 and engine_gpus < 1:
        raise RloraError(
            f"engine.gpus = {engine_gpus}: engine.tensor_parallel_size = {parts} divides an engine into {parts} parts, "
            "and each part needs a whole GPU; set engine.gpus = 1 (GPUs per part), or unset engine.gpus (then it is 1)"
        )
    if learner.replicas > 1 and 0 < learner_gpus < 1:
        raise RloraError(
            f"learner.gpus = {learner_gpus}: with less than 1, Ray can place several of the learner.replicas = "
            f"{learner.replicas} learners on one GPU, but NCCL requires a GPU for each; set learner.gpus = 1, or unset "
            "learner.gpus (each learner then reserves 1 GPU)"
        )
    needed = config.engines * parts * engine_gpus + learners * learner_gpus
    if needed > cluster_gpus and not can_grow:
        raise RloraError(
            f"GPU: engines need {config.engines} x {parts * engine_gpus:g} and learners {learners} x {learner_gpus:g} "
            f"GPUs, {needed:g} in total, and Ray has {cluster_gpus:g}; lower engine.replicas, "
            "engine.tensor_parallel_size or learner.replicas, or set engine.gpus and learner.gpus below 1, so that "
            "engines and learners share GPUs"
        )
    return replace(
        config, engine=replace(engine, gpus=float(engine_gpus)), learner=replace(learner, gpus=float(learner_gpus))
    )
