"""Settings of checkpoints."""

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from rlora.settings.fields import STRICT


@dataclass(frozen=True)
class CheckpointConfig:
    __pydantic_config__ = STRICT

    keep_last: PositiveInt = 20
    """Newest checkpoints to keep; one is written after each step. Full fine-tuning keeps two at most, and no others."""
    keep_every: NonNegativeInt = 0
    """Steps between checkpoints that are kept besides the newest; 0 keeps none."""
    keep_best: NonNegativeInt = 1
    """Best checkpoints to keep besides the newest, by `checkpoint.best_by`. Which are best is known `max_staleness` + 1
    steps later, so `checkpoint.keep_last` must be above `max_staleness`."""
    best_by: Literal["reward", "accuracy"] = "reward"
    """Criterion of `checkpoint.keep_best`: the mean reward of training episodes, or the accuracy on held-out prompts
    that `evaluate.every` measures."""
    episodes_mib: NonNegativeInt = 64
    """Largest size in MiB of the compressed episodes that a checkpoint keeps for `rlora replay`; 0 keeps none."""
    patience: PositiveFloat = 600.0
    """Seconds that training continues in memory while checkpoints can't be written, before the run stops."""
