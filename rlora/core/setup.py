"""Settings and starting point of one policy's training."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlora.core.lora import Spec
from rlora.plugin import Pickled, pickled
from rlora.settings import AlgorithmConfig, Config, CriticConfig, LearnerConfig


@dataclass(frozen=True)
class Setup:
    """The settings of one policy. Other policies of the learner may have different settings."""

    learner: LearnerConfig = field(default_factory=LearnerConfig)  # settings of the adapter, Adam and microbatches
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    seed: int = 0
    steps: int = 100  # length of the learning rate schedule
    temperature: float = 1.0  # of the engines' sampling
    max_tokens: int = 256  # per completion
    max_model_len: int = 2048  # per prompt with its completion
    start: tuple[bytes, bytes] | None = None  # config and weights of an adapter in PEFT's format; None: a fresh one
    plugins: Mapping[str, Pickled] = field(default_factory=dict, repr=False)  # the objective of `algorithm.name`

    @classmethod
    def of(cls, config: Config, start: tuple[bytes, bytes] | None = None) -> "Setup":
        """Return the setup of a run's config. Raises RloraError if a plug-in can't be sent to other processes."""
        sampling, algorithm = config.sampling, config.algorithm
        file, _, name = algorithm.name.rpartition(":")
        if file.endswith(".py"):  # the process that loads it may have a different working directory
            algorithm = replace(algorithm, name=f"{Path(file).absolute()}:{name}")
        return cls(
            config.learner, algorithm, config.critic, config.seed, config.steps, sampling.temperature,
            sampling.max_tokens, config.max_model_len, start, pickled("algorithm.name", [algorithm.name]),
        )  # fmt: skip

    @property
    def spec(self) -> Spec:
        """The spec of a new adapter."""
        learner = self.learner
        return Spec(learner.rank, learner.alpha, learner.rslora, learner.init, learner.targets, learner.head)

    @property
    def critic_spec(self) -> Spec | None:
        """The spec of the critic's adapter; None if the algorithm has no critic."""
        return Spec(self.critic.rank, self.learner.alpha) if self.algorithm.advantage == "gae" else None
