"""The protocol of an objective: an algorithm as the learner sees it."""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

from rlora.core.batch import Microbatch, Sample
from rlora.core.policy import Outputs
from rlora.records import Episode, Group
from rlora.settings import AlgorithmConfig

Figures = Mapping[str, Tensor]  # (C,) each; the means over an update's tokens are logged
Loss = Callable[[Any, Microbatch], tuple[Tensor, Figures]]  # a scalar from `Outputs`, or from a critic's values (C,)


class Need(Enum):
    """A forward pass that an update makes before its first minibatch."""

    START = "start_logprobs"  # of the policy itself
    REFERENCE = "reference_logprobs"  # of the base
    VALUES = "values"  # of the critic


class Objective(Protocol):
    """An algorithm: the advantage of each token, and the loss.

    It is built as `MyObjective(algorithm, max_tokens)`: the run's `[algorithm]`, and the most tokens per completion.
    A subclass must define `advantages` and `loss`; a subclass of `PolicyGradient` only `surrogate`.
    """

    needs: frozenset[Need] = frozenset()
    needs_first: frozenset[Need] = frozenset()  # needs that `advantages` reads; if empty, it runs before any pass
    whole_groups: bool = False  # keep all samples of a group in one microbatch
    entropies: bool = False  # the loss reads `Outputs.entropies`
    whitens: bool = False  # scale advantages to mean 0 and variance 1 over all tokens of the update
    skips_zeros: bool = False  # do not compute samples whose advantages are all 0, since they have no gradient

    def __init__(self, algorithm: AlgorithmConfig, max_tokens: int) -> None:
        """Keep the settings that the objective needs; by default none."""

    def learns_from(self, episode: Episode) -> bool:
        """Whether an episode becomes a sample. Either way it counts in its group."""
        return episode.sampled_tokens > 0

    def advantages(self, group: Group, samples: Sequence[Sample]) -> list[Tensor]:
        """Advantages of the group's samples: (C,) each."""
        ...

    def weights(self, groups: Sequence[Group]) -> Callable[[Episode], float]:
        """The weight of each token of an episode: by default 1 / the tokens that the minibatch learns from."""
        episodes = [episode for group in groups for episode in group.episodes]
        total = sum(episode.sampled_tokens for episode in episodes if self.learns_from(episode))
        return lambda episode: 1 / total

    def loss(self, now: Outputs, batch: Microbatch) -> tuple[Tensor, Figures]:
        """A microbatch's part of the minibatch's loss, which is a sum and never a mean, and figures per token."""
        ...
