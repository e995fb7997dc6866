"""What an algorithm is to the learner."""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

from rlora.core.batch import Microbatch, Sample
from rlora.core.policy import Outputs
from rlora.records import Episode, Group
from rlora.settings import AlgorithmConfig

Figures = Mapping[str, Tensor]  # (C,) each; their means over the tokens of an update are logged
Loss = Callable[[Any, Microbatch], tuple[Tensor, Figures]]  # one number of `Outputs`, or of a critic's values (C,)


class Need(Enum):
    """A forward pass that an update makes before its first minibatch."""

    START = "start_logprobs"  # of the policy itself
    REFERENCE = "reference_logprobs"  # of the base
    VALUES = "values"  # of the critic


class Objective(Protocol):
    """An algorithm: which advantage each token has, and the loss that is made of it.

    Built as `MyObjective(algorithm, max_tokens)`, from the run's `[algorithm]` and the most tokens of a completion. A
    class that inherits from this one needs `advantages` and `loss`; a subclass of `PolicyGradient`, `surrogate` alone.
    """

    needs: frozenset[Need] = frozenset()
    needs_first: frozenset[Need] = frozenset()  # those that `advantages` reads; without any, it is called before a pass
    whole_groups: bool = False  # a group's samples are always in one microbatch
    entropies: bool = False  # the loss reads `Outputs.entropies`
    whitens: bool = False  # advantages are brought to mean 0 and variance 1 over all tokens of the update
    skips_zeros: bool = False  # a sample whose advantages are all 0 has no gradient, and is not computed

    def __init__(self, algorithm: AlgorithmConfig, max_tokens: int) -> None:
        """Keep what is needed of the settings; by default nothing is."""

    def learns_from(self, episode: Episode) -> bool:
        """Whether an episode becomes a sample; it counts for its group all the same."""
        return episode.sampled_tokens > 0

    def advantages(self, group: Group, samples: Sequence[Sample]) -> list[Tensor]:
        """(C,) each, of the samples that were made of the group's episodes."""
        ...

    def weights(self, groups: Sequence[Group]) -> Callable[[Episode], float]:
        """The weight of each token of an episode of a minibatch: 1 over all tokens that are learned from."""
        episodes = [episode for group in groups for episode in group.episodes]
        total = sum(episode.sampled_tokens for episode in episodes if self.learns_from(episode))
        return lambda episode: 1 / total

    def loss(self, now: Outputs, batch: Microbatch) -> tuple[Tensor, Figures]:
        """A microbatch's part of the minibatch's loss, a sum and never a mean, and figures of its tokens."""
        ...
