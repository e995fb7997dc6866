"""The settings of a run: one frozen dataclass, a section per part of it, and a docstring for each field."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import NonNegativeInt, PositiveInt

from rlora.settings.algorithm import PRESETS, AlgorithmConfig
from rlora.settings.checkpoint import CheckpointConfig
from rlora.settings.engine import EngineConfig
from rlora.settings.fields import STRICT, Arguments, Directory, Problem, Tag
from rlora.settings.learner import CriticConfig, LearnerConfig
from rlora.settings.sampling import ChatConfig, SamplingConfig
from rlora.settings.scoring import ScoringConfig
from rlora.settings.watching import CheckConfig, EvaluateConfig, HealthConfig, HealthRule, SetConfig, TrackersConfig

__all__ = [
    "PRESETS", "AlgorithmConfig", "ChatConfig", "CheckConfig", "CheckpointConfig", "Config", "CriticConfig",
    "EngineConfig", "EvaluateConfig", "HealthConfig", "HealthRule", "LearnerConfig", "SamplingConfig", "ScoringConfig",
    "SetConfig", "TrackersConfig",
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = STRICT

    model: Annotated[Directory, Tag.POLICY]
    """Frozen base model: a hub id, a local directory, or demo:smollm2-135m."""
    env: Annotated[str, Tag.EPISODES]
    """Env that prompts come from: module:Name or path/to/file.py:Name."""
    reward: Annotated[str | tuple[str, ...], Tag.EPISODES]
    """Reward function: module:name or path/to/file.py:name. If there are several, the reward is their weighted sum."""
    env_args: Annotated[Arguments, Tag.EPISODES] = field(default_factory=dict)
    """Arguments of the env, also --env-args.NAME VALUE. If a different env is named, they are dropped."""
    reward_args: Annotated[Arguments, Tag.EPISODES] = field(default_factory=dict)
    """Arguments of the reward functions, by parameter name, also --reward-args.NAME VALUE."""
    reward_weights: Annotated[tuple[float, ...], Tag.EPISODES] = ()
    """Weight of each reward function; all 1 by default."""
    steps: PositiveInt = 100
    """Total training steps, including those before a resume; each makes one new adapter version."""
    prompts_per_step: PositiveInt = 16
    """Prompts per step."""
    group_size: Annotated[PositiveInt, Tag.EPISODES] = 8
    """Completions per prompt (G); 2 or more if an advantage is relative to the group."""
    max_staleness: NonNegativeInt = 0
    """Maximum number of versions between the one that sampled an episode and the learner's; 0 is on policy, 1 samples
    while the learner updates."""
    restarts: NonNegativeInt = 3
    """Consecutive restarts of a lost engine or learner before the run continues without it, or stops."""
    seed: Annotated[int, Tag.EPISODES] = 0
    """Seed of the order of prompts, the initial adapter, and sampling."""
    dtype: Annotated[Literal["bfloat16", "float32"], Tag.EPISODES] = "bfloat16"
    """Data type of the frozen base in engine and learner. The adapter's masters and Adam's moments are always fp32."""
    sampling: Annotated[SamplingConfig, Tag.EPISODES] = field(default_factory=SamplingConfig)
    chat: Annotated[ChatConfig, Tag.EPISODES] = field(default_factory=ChatConfig)
    scoring: Annotated[ScoringConfig, Tag.EPISODES] = field(default_factory=ScoringConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)

    @property
    def max_model_len(self) -> int:
        """Longest sequence of prompt and completion, in tokens."""
        return self.sampling.max_prompt_tokens + self.sampling.max_tokens

    @property
    def straggler_seconds(self) -> float:
        """Seconds that a step waits for its last groups after half have arrived."""
        return self.engine.straggler_seconds or 120.0 + self.sampling.max_tokens / 10

    @property
    def rewards(self) -> tuple[str, ...]:
        """The reward functions."""
        return (self.reward,) * bool(self.reward) if isinstance(self.reward, str) else self.reward

    def problems(self) -> Iterator[Problem]:
        """Every rule that the values break, each with the full name of a field."""
        for section in (self.chat, self.scoring, self.learner, self.algorithm, self.evaluate, self.trackers):
            yield from section.check()
        yield from self._rewards_at_fault()
        yield from self._algorithm_at_fault()
        yield from self._checkpoints_at_fault()
        if self.learner.full_finetuning:
            yield from self._at_fault_without_adapter()

    def _rewards_at_fault(self) -> Iterator[Problem]:
        functions = self.rewards
        if len(self.reward_weights) not in (0, len(functions)):
            yield Problem(
                "reward_weights", f"there are {len(functions)} reward functions; give as many weights, or none"
            )
        if (self.env and not functions) or len(set(functions)) < len(functions):
            yield Problem("reward", "name at least one reward function, and each only once")

    def _algorithm_at_fault(self) -> Iterator[Problem]:
        algorithm = self.algorithm
        if algorithm.of_group and self.group_size == 1:
            yield Problem(
                "group_size",
                f"algorithm.advantage = {algorithm.advantage!r} is relative to the other completions of a prompt; set "
                "it to 2 or more, or use whitened or gae",
            )
        if algorithm.advantage == "gae" and self.critic.warmup >= self.steps:
            yield Problem("critic.warmup", f"the policy would never learn in {self.steps} steps; set it below `steps`")
        if algorithm.minibatches > self.prompts_per_step:
            yield Problem(
                "algorithm.minibatches",
                f"a step has {self.prompts_per_step} groups (prompts_per_step), and groups are not split; set it to "
                "that or less",
            )
        if algorithm.overlong_tokens >= self.sampling.max_tokens:
            yield Problem(
                "algorithm.overlong_tokens",
                f"a completion has at most {self.sampling.max_tokens} tokens (sampling.max_tokens); set it below that",
            )

    def _checkpoints_at_fault(self) -> Iterator[Problem]:
        checkpoint, evaluate = self.checkpoint, self.evaluate
        by_accuracy = checkpoint.best_by == "accuracy"
        if checkpoint.keep_best and checkpoint.keep_last <= self.max_staleness and not self.learner.full_finetuning:
            yield Problem(
                "checkpoint.keep_last",
                f"with max_staleness = {self.max_staleness} a checkpoint is deleted before it is known to be the best; "
                f"set it to {self.max_staleness + 1} or more, or checkpoint.keep_best to 0",
            )
        if by_accuracy and not (evaluate.every and evaluate.prompts):
            yield Problem(
                "checkpoint.best_by",
                "held-out accuracy is only measured if evaluate.every and evaluate.prompts are set; set both, or use "
                "reward",
            )
        if checkpoint.keep_best and by_accuracy and 0 < evaluate.every >= checkpoint.keep_last > 0:
            yield Problem(
                "checkpoint.keep_last",
                f"with evaluate.every = {evaluate.every} a checkpoint may be deleted before its accuracy is known; set "
                "it above that",
            )

    def _at_fault_without_adapter(self) -> Iterator[Problem]:
        one_version = 'with learner.adapter = "none" an engine holds one version at a time'
        if self.evaluate.every:
            yield Problem("evaluate.every", f"{one_version}, and training would wait for each evaluation; set it to 0")
        if self.max_staleness:
            yield Problem("max_staleness", f"{one_version}, so sampling can't overlap with updates; set it to 0")
        if self.algorithm.kl:
            yield Problem(
                "algorithm.kl",
                "the reference policy is the base with the adapter off, and full fine-tuning changes the base; set it "
                "to 0",
            )
        if self.algorithm.advantage == "gae":
            yield Problem(
                "algorithm.advantage",
                'the critic is a second adapter on the frozen base, so it needs learner.adapter = "lora"',
            )
