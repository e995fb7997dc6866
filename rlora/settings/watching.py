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
    """Env that provides the prompts of the set. Empty (the default) is the run's `env`."""
    env_args: Arguments = field(default_factory=dict)
    """Keyword arguments with which the set's env is constructed. If the set names no env, these arguments are added to
    the run's `env_args` and take precedence."""
    prompts: PositiveInt = 100
    """Number of prompts in the set: the first ones that `held_out()` of the set's env returns."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on held-out prompts. Each additional set is a table [evaluate.sets.NAME], or
    --evaluate.sets.NAME.prompts 50 and so on."""

    __pydantic_config__ = STRICT

    prompts: NonNegativeInt = 100
    """Number of held-out prompts on which the policy is evaluated before and after training: the first ones that the
    env's `held_out()` returns. `0` disables this evaluation, but not that of `evaluate.sets`."""
    every: NonNegativeInt = 0
    """Interval in steps between evaluations during training. `0` evaluates before and after training only."""
    samples: PositiveInt = 1
    """Number of completions per held-out prompt. `1` is decoded greedily; several are sampled as in training, at
    `sampling.temperature` and with `sampling.top_k`, `top_p` and `min_p`."""
    sets: dict[str, SetConfig] = field(default_factory=dict)
    """Additional sets of held-out prompts by name, each a table [evaluate.sets.NAME]. The sets are evaluated before and
    after training, and every `evaluate.every` steps."""
    threshold: float = 1.0
    """Smallest number from which a completion counts as correct, if the reward functions return numbers instead of a
    status. With several functions, the number of the first one counts."""

    def check(self) -> Iterator[Problem]:
        """Yield a Problem for every rule that these settings break."""
        names = [name for name in self.sets if not re.fullmatch(r"\w+", name) or name in _TAKEN]
        if names:
            yield Problem(
                "evaluate.sets",
                f"{', '.join(names)}: use letters, digits and _ in names, and none of {', '.join(_TAKEN)}, which are "
                "names of metrics",
            )


HealthRule = Literal[
    "floor", "solved", "truncated", "failing_rewards", "dead_part", "engine_learner_apart", "entropy_collapsed",
    "overfitting", "no_signal", "masked", "skipped",
]  # fmt: skip


@dataclass(frozen=True)
class HealthConfig:
    __pydantic_config__ = STRICT

    stop: tuple[HealthRule, ...] = ()
    """Health rules that stop the run when they trigger, with everything saved; the other rules only warn. None by
    default. docs/metrics.md has the exact conditions. `floor`: all rewards are equal and the lowest so far. `solved`:
    every completion is correct. `truncated`: every completion is cut off. `failing_rewards`: reward functions fail
    (`health.errors`). `dead_part`: one of several reward functions always returns 0. `engine_learner_apart`: the KL
    between engine and learner is far above its median. `entropy_collapsed`: the entropy is below a tenth of its first
    values. `overfitting`: held-out accuracy falls while the reward rises. `no_signal`: the rewards within each group
    are equal. `masked`: masks leave less than a tenth of the tokens. `skipped`: two consecutive updates were
    skipped."""
    steps: Annotated[int, Field(ge=2)] = 5
    """Number of consecutive steps in which the condition of a health rule must be met before the rule triggers, 2 or
    more. Larger values give fewer false alarms. `failing_rewards` takes the mean over these steps. `skipped` and
    `overfitting` have conditions of their own (docs/metrics.md)."""
    errors: Share = 0.1
    """Share of episodes with a timeout or an error of a reward function, 0 to 1, above which the health rule
    `failing_rewards` triggers."""


@dataclass(frozen=True)
class TrackersConfig:
    __pydantic_config__ = STRICT

    use: tuple[
        Literal["wandb", "tensorboard", "trackio", "mlflow"] | Annotated[str, Field(pattern=r".:\w+$")], ...
    ] = ()
    """Trackers that receive the metrics, none by default: `wandb` (W&B), `tensorboard`, `trackio`, `mlflow`, or your
    own class as module:Name or path/to/file.py:Name."""
    project: str = "rlora"
    """Name of the project in W&B and trackio, and of the experiment in MLflow."""
    samples_every: NonNegativeInt = 10
    """Interval in steps between tables of sampled completions that trackers receive. `0` sends none. The completions
    come from the checkpoints, so `checkpoint.episodes_mib` must be above 0."""
    patience: PositiveFloat = 60.0
    """Time limit in seconds for a tracker to send its last metrics at the end of a run. A tracker that takes longer is
    ended with a warning; metrics.jsonl has all metrics."""
    strict: bool = False
    """Whether the run stops before its first step if a tracker can't start. With `false` there is a warning, and
    training continues."""

    def check(self) -> Iterator[Problem]:
        """Yield a Problem for every rule that these settings break."""
        if len(set(self.use)) < len(self.use):
            yield Problem("trackers.use", "a tracker is named twice; name each tracker once")


@dataclass(frozen=True)
class CheckConfig:
    __pydantic_config__ = STRICT

    prompts: NonNegativeInt = 16
    """Number of prompts on which the reward functions are tried before a run: with the prompt's gold (reference)
    answer, with the gold answer of another prompt, and with an empty completion. `0` skips this check."""
    strict: bool = False
    """Whether the run stops before its first step if the check of the reward functions (`check.prompts`) finds a fault.
    With `false` there are warnings, and training continues."""
