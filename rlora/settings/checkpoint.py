"""Settings of checkpoints."""

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from rlora.settings.fields import STRICT


@dataclass(frozen=True)
class CheckpointConfig:
    __pydantic_config__ = STRICT

    keep_last: PositiveInt = 20
    """Number of newest checkpoints to keep. A checkpoint is written after each step. With `learner.adapter` = `none` at
    most the two newest are kept, and no others."""
    keep_every: NonNegativeInt = 0
    """Interval in steps between checkpoints that are kept in addition to the newest: those whose version number is a
    multiple of this value. `0` keeps none."""
    keep_best: NonNegativeInt = 1
    """Number of best checkpoints, by `checkpoint.best_by`, to keep in addition to the newest; `0` keeps none. The mean
    reward of a version is known `max_staleness` + 1 steps after its checkpoint is written, so `checkpoint.keep_last`
    must be above `max_staleness`."""
    best_by: Literal["reward", "accuracy"] = "reward"
    """Criterion of `checkpoint.keep_best`. `reward`: the mean reward of the training episodes that a version sampled.
    `accuracy`: the accuracy on held-out prompts, which needs `evaluate.every` and `evaluate.prompts` above 0. SFT
    and pairs have no rewards: the best have the lowest loss, or the highest accuracy, on held-out examples."""
    episodes_mib: NonNegativeInt = 64
    """Largest size in MiB of the compressed episodes that a checkpoint stores for `rlora replay`. Episodes of a larger
    size are not stored, with a warning. `0` stores none."""
    patience: PositiveFloat = 600.0
    """Time in seconds for which training continues while checkpoints can't be written, for example because the disk is
    full. After that the run stops, and saves its newest checkpoint to a temporary directory."""
