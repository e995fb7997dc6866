"""Settings of what watches a run: evaluation, health, trackers, and the check before the start."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rlora.settings.fields import STRICT, Arguments, Problem, Share

_TAKEN = ("held_out", "before", "after", "prompts", "version")  # names that metrics have already as accuracy/NAME


@dataclass(frozen=True)
class SetConfig:
    """An additional set of held-out prompts to evaluate on."""

    __pydantic_config__ = STRICT

    env: str = ""
    """Env that the set's prompts come from; the run's `env` by default."""
    env_args: Arguments = field(default_factory=dict)
    """Arguments of the set's env. If the set has no `env` of its own, they are added to the run's `env_args`."""
    prompts: PositiveInt = 100
    """Number of prompts, the first ones that the env's `held_out()` returns."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on held-out prompts. Each additional set is a table [evaluate.sets.NAME], or
    --evaluate.sets.NAME.prompts 50 and so on."""

    __pydantic_config__ = STRICT

    prompts: NonNegativeInt = 100
    """Held-out prompts to answer before and after training, the first ones that the env returns; 0 disables it."""
    every: NonNegativeInt = 0
    """Steps between evaluations during training; 0 evaluates before and after training only."""
    samples: PositiveInt = 1
    """Completions per held-out prompt: one is greedy, several are sampled at `sampling.temperature`."""
    sets: dict[str, SetConfig] = field(default_factory=dict)
    """Additional sets of held-out prompts by name, each a table [evaluate.sets.NAME]."""
    threshold: float = 1.0
    """Smallest reward at which a completion counts as correct."""

    def check(self) -> Iterator[Problem]:
        names = [name for name in self.sets if not re.fullmatch(r"\w+", name) or name in _TAKEN]
        if names:
            yield Problem(
                "evaluate.sets",
                f"{', '.join(names)}: use letters, digits and _ in names, and none of {', '.join(_TAKEN)}",
            )


HealthRule = Literal[
    "floor", "solved", "truncated", "failing_rewards", "dead_part", "engine_learner_apart", "entropy_collapsed",
    "overfitting", "no_signal", "skipped",
]  # fmt: skip


@dataclass(frozen=True)
class HealthConfig:
    __pydantic_config__ = STRICT

    stop: tuple[HealthRule, ...] = ()
    """Health rules that stop the run, with everything saved; the other rules only warn. See docs/metrics.md."""
    steps: Annotated[int, Field(ge=2)] = 5
    """Consecutive steps for which a health rule must hold before it fires."""
    errors: Share = 0.1
    """Share of episodes whose reward function may time out or fail before the rule failing_rewards holds."""


@dataclass(frozen=True)
class TrackersConfig:
    __pydantic_config__ = STRICT

    use: tuple[
        Literal["wandb", "tensorboard", "trackio", "mlflow"] | Annotated[str, Field(pattern=r".:\w+$")], ...
    ] = ()
    """Trackers that receive the metrics: wandb, tensorboard, trackio, mlflow, or your own class as file.py:Name."""
    project: str = "rlora"
    """Project in W&B and trackio, and experiment in MLflow."""
    samples_every: NonNegativeInt = 10
    """Steps between tables of sampled completions that trackers receive; 0 sends none."""
    patience: PositiveFloat = 60.0
    """Time limit in seconds for a tracker to send its last metrics at the end of a run."""
    strict: bool = False
    """Stop before the run if a tracker can't start, instead of warning."""

    def check(self) -> Iterator[Problem]:
        if len(set(self.use)) < len(self.use):
            yield Problem("trackers.use", "a tracker is named twice; name each once")


@dataclass(frozen=True)
class CheckConfig:
    __pydantic_config__ = STRICT

    prompts: NonNegativeInt = 16
    """Prompts on which the reward functions are tried before a run: with the gold answer, with another prompt's, and
    with an empty text."""
    strict: bool = False
    """Stop if the check before a run finds a fault, instead of warning."""
