"""What one policy is trained by, and what it starts from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlora.core.lora import Spec
from rlora.plugin import Pickled, pickled
from rlora.settings import AlgorithmConfig, Config, CriticConfig, LearnerConfig


@dataclass(frozen=True)
class Setup:
    """The settings of one policy. None of them is shared with the policies beside it."""

    learner: LearnerConfig = field(default_factory=LearnerConfig)  # those of the adapter, Adam and microbatches
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    seed: int = 0
    steps: int = 100  # over which the learning rate falls
    temperature: float = 1.0  # at which engines sample
    max_tokens: int = 256  # of a completion
    max_model_len: int = 2048  # of a prompt and its completion
    start: tuple[bytes, bytes] | None = None  # an adapter to start from, in PEFT's format; None: a fresh one
    given: Mapping[str, Pickled] = field(default_factory=dict, repr=False)  # what `algorithm.name` names

    @classmethod
    def of(cls, config: Config, start: tuple[bytes, bytes] | None = None) -> "Setup":
        sampling, algorithm = config.sampling, config.algorithm
        file, _, name = algorithm.name.rpartition(":")
        if file.endswith(".py"):  # whoever builds the objective may work elsewhere
            algorithm = replace(algorithm, name=f"{Path(file).absolute()}:{name}")
        return cls(
            config.learner, algorithm, config.critic, config.seed, config.steps, sampling.temperature,
            sampling.max_tokens, config.max_model_len, start, pickled("algorithm.name", [algorithm.name]),
        )  # fmt: skip

    @property
    def spec(self) -> Spec:
        """A fresh adapter."""
        learner = self.learner
        return Spec(learner.rank, learner.alpha, learner.rslora, learner.init, learner.targets, learner.head)

    @property
    def critic_spec(self) -> Spec | None:
        """The adapter of its critic; None where the algorithm has none."""
        return Spec(self.critic.rank, self.learner.alpha) if self.algorithm.advantage == "gae" else None
