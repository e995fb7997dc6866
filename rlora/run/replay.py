"""Computes updates of a run again: proves that a version came of its episodes, or tries other losses on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor
from upath import UPath

from rlora.core.learner import Learner
from rlora.core.setup import Setup
from rlora.core.state import is_by_position
from rlora.records import RloraError, UpdateStats
from rlora.run.checkpoint import Bundle, read_version
from rlora.run.directory import warn


@dataclass(frozen=True)
class Replayed:
    """An update that was computed again."""

    step: int  # the version it started from
    stats: UpdateStats
    exact: bool  # the adapter came out bit for bit
    exact_state: bool  # so did all that the next update depends on: Adam's moments, the critic, random generators
    off: float  # the largest difference of a number of the adapter
    moved: float  # the largest change that the update itself made to one
    rows_were_shared: bool  # by policy and critic, in the release that made it: sums were rounded in another order


def replay(learner: Learner, setup: Setup, before: Bundle, after: Bundle) -> Replayed:
    """Compute the update from `before` to `after` again, under `setup`, on the episodes that `after` keeps.

    Raises RloraError where it keeps none, or was made from another version.
    """
    if after.groups is None:
        raise RloraError(
            f"step {before.version}: the bundle of version {after.version} keeps no episodes (config: "
            f"checkpoint.episodes_mib = {after.config.checkpoint.episodes_mib}), so the update can't be computed again"
        )
    if after.parent != before.adapter.digest:
        raise RloraError(
            f"step {before.version}: version {after.version} was not made from the version {before.version} that is "
            f"there, but from {str(after.parent)[:12]}: it was made again; take one of the two bundles away"
        )
    policy = before.adapter.policy
    learner.open(policy, setup, before.state)
    adapter, stats = learner.update(policy, after.groups)
    made_state, kept_state = safetensors.torch.load(learner.state(policy)), safetensors.torch.load(after.state)
    learner.close(policy)
    by_position = is_by_position(kept_state)
    if by_position:  # an older release wrote it: as its tensors are named today
        learner.open(policy, setup, after.state)
        kept_state = safetensors.torch.load(learner.state(policy))
        learner.close(policy)
    was, made, kept = (safetensors.torch.load(each.weights) for each in (before.adapter, adapter, after.adapter))
    return Replayed(
        step=before.version,
        stats=stats,
        exact=_alike(made, kept),
        exact_state=_alike(made_state, kept_state),
        off=_farthest(made, kept),
        moved=_farthest(was, kept),
        rows_were_shared=setup.critic_spec is not None and by_position,
    )


def pairs(run: UPath, steps: Sequence[int]) -> Iterator[tuple[Bundle, Bundle]]:
    """The bundles before and after each step; none is read twice in a row.

    A step of which one is damaged, or removed meanwhile, is told of and passed over; RloraError if it is the only one.
    """
    after: Bundle | None = None
    for step in steps:
        try:
            before = after if after and after.version == step else read_version(run, step)
            after = read_version(run, step + 1)
        except RloraError as error:
            if len(steps) == 1:
                raise
            warn(f"step {step} is passed over: {error}")
            continue
        yield before, after


def updates(versions: Sequence[int], step: int | None) -> list[int]:
    """The steps whose bundles before and after are both among `versions`. Raises RloraError where `step` is none."""
    steps = [version for version in versions if version + 1 in versions]
    if step is None:
        return steps
    if step not in steps:
        raise RloraError(
            f"--step {step}: it needs the bundles of versions {step} and {step + 1}, and both are there for the steps "
            f"{steps} (config: checkpoint.keep_last)"
        )
    return [step]


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(_bits(one[name]) == _bits(other[name]) for name in one)


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((float((one[name].double() - other[name].double()).abs().max()) for name in one), default=0.0)
