"""The settings of what watches a run: evaluation, health, trackers, and the check before it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from rlora.fields import STRICT, Arguments, Count, Positive


@dataclass(frozen=True)
class SetConfig:
    """A set of held-out prompts to evaluate on, beside those of the run's own env."""

    __pydantic_config__ = STRICT

    env: str = ""
    """Where its prompts come from, as in `env`; by default the env of the run."""
    env_args: Arguments = field(default_factory=dict)
    """Arguments of its env; without `env` they are added to those of the run."""
    prompts: Count = 100
    """The number of prompts, the first that its held_out() gives."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on held-out prompts. Each set beside the run's own is a table [evaluate.sets.NAME], or
    --evaluate.sets.NAME.prompts 50 and so on."""

    __pydantic_config__ = STRICT

    prompts: Annotated[int, Field(ge=0)] = 100
    """Held-out prompts, the first that the env gives, to answer before and after training; 0 is none."""
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate after every so many steps too, beside training; 0: before and after training only."""
    samples: Count = 1
    """Completions per held-out prompt: one is greedy, several are sampled at `sampling.temperature`."""
    sets: dict[str, SetConfig] = field(default_factory=dict)
    """Other sets of held-out prompts by name, each a table [evaluate.sets.NAME]."""
    threshold: float = 1.0
    """A completion counts as correct from this reward on."""


HealthRule = Literal[
    "floor", "solved", "truncated", "failing_rewards", "dead_part", "engine_learner_apart", "entropy_collapsed",
    "overfitting", "no_signal", "skipped",
]  # fmt: skip


@dataclass(frozen=True)
class HealthConfig:
    __pydantic_config__ = STRICT

    stop: tuple[HealthRule, ...] = ()
    """Rules that stop the run, with everything saved; docs/metrics.md has them. The others are warnings."""
    steps: Annotated[int, Field(ge=2)] = 5
    """The number of steps in a row for which a rule has to hold."""
    errors: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The share of episodes whose reward function may time out or fail before the rule failing_rewards holds."""


@dataclass(frozen=True)
class TrackersConfig:
    __pydantic_config__ = STRICT

    use: tuple[
        Literal["wandb", "tensorboard", "trackio", "mlflow"] | Annotated[str, Field(pattern=r".:\w+$")], ...
    ] = ()
    """Trackers to send figures to: wandb, tensorboard, trackio, mlflow, or a class of your own as file.py:Name."""
    project: str = "rlora"
    """The project of W&B and trackio, and the experiment of MLflow."""
    samples_every: Annotated[int, Field(ge=0)] = 10
    """Send a table of sampled completions every so many steps; 0: none."""
    patience: Positive = 60.0
    """Seconds that a tracker may take for its last figures at the end of a run."""
    strict: bool = False
    """Stop before the run where a tracker can't start, in place of a warning."""


@dataclass(frozen=True)
class CheckConfig:
    __pydantic_config__ = STRICT

    prompts: Annotated[int, Field(ge=0)] = 16
    """Prompts on which the reward functions are tried before a run: with the gold, with another's, and with no text."""
    strict: bool = False
    """Stop where that finds a fault, in place of a warning."""
