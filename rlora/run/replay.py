"""Recomputes updates of a run: verifies that a version follows from its episodes, or tries a different loss on them."""

import logging
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

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replayed:
    """Result of recomputing an update."""

    step: int  # number of the version that the update started from
    stats: UpdateStats
    exact: bool  # whether the adapter is equal bit for bit
    exact_state: bool  # whether Adam's moments, the critic and random generators are equal bit for bit
    max_difference: float  # largest absolute difference of an element, recomputed minus stored adapter
    max_change: float  # largest absolute change of an element by the stored update
    rows_were_shared: bool  # whether policy and critic shared rows, as in older releases: sums have a different order


def replay(learner: Learner, setup: Setup, start: Bundle, end: Bundle) -> Replayed:
    """Recompute the update from `start` to `end` under `setup`, on the episodes that `end` contains.

    Raises RloraError if `end` has no episodes or was not made from `start`.
    """
    if end.groups is None:
        raise RloraError(
            f"step {start.version}: the bundle of version {end.version} has no episodes, because of "
            f"checkpoint.episodes_mib = {end.config.checkpoint.episodes_mib}; the update can't be recomputed: replay a "
            "different step, or raise checkpoint.episodes_mib for later steps"
        )
    if end.parent != start.adapter.digest:
        raise RloraError(
            f"step {start.version}: version {end.version} was made from {str(end.parent)[:12]}, not from the bundle of "
            f"version {start.version}, which was trained again, so the update can't be recomputed; replay a different "
            "step"
        )
    policy = start.adapter.policy
    learner.open(policy, setup, start.state)
    adapter, stats = learner.update(policy, end.groups)
    new_state, saved_state = safetensors.torch.load(learner.state(policy)), safetensors.torch.load(end.state)
    learner.close(policy)
    by_position = is_by_position(saved_state)
    if by_position:  # written by an older release: convert to the current names of tensors
        learner.open(policy, setup, end.state)
        saved_state = safetensors.torch.load(learner.state(policy))
        learner.close(policy)
    initial, new, saved = (safetensors.torch.load(version.weights) for version in (start.adapter, adapter, end.adapter))
    return Replayed(
        step=start.version,
        stats=stats,
        exact=_bitwise_equal(new, saved),
        exact_state=_bitwise_equal(new_state, saved_state),
        max_difference=_max_difference(new, saved),
        max_change=_max_difference(initial, saved),
        rows_were_shared=setup.critic_spec is not None and by_position,
    )


def pairs(run: UPath, steps: Sequence[int]) -> Iterator[tuple[Bundle, Bundle]]:
    """Yield the bundles before and after each step. Consecutive steps share a bundle, which is read once.

    `steps` are the numbers of the versions that the updates started from. A step with a damaged or removed bundle is
    skipped with a warning; if there is only this step, raises RloraError.
    """
    end: Bundle | None = None
    for step in steps:
        try:
            start = end if end and end.version == step else read_version(run, step)
            end = read_version(run, step + 1)
        except RloraError as error:
            if len(steps) == 1:
                raise
            _log.warning(f"step {step} is skipped: {error}")
            continue
        yield start, end


def updates(versions: Sequence[int], step: int | None) -> list[int]:
    """Return the steps whose bundles before and after are in `versions`, or only `step` if it is not None.

    Raises RloraError if a bundle of `step` is missing.
    """
    steps = [version for version in versions if version + 1 in versions]
    if step is None:
        return steps
    if step not in steps:
        raise RloraError(
            f"--step {step}: needs the bundles of versions {step} and {step + 1}; use one of the steps whose bundles "
            f"are kept: {steps} (checkpoint.keep_last is the number of bundles)"
        )
    return [step]


def _bitwise_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_bits(a[name]) == _bits(b[name]) for name in a)


def _bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _max_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((float((a[name].double() - b[name].double()).abs().max()) for name in a), default=0.0)
