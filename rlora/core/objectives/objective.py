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

    rlora calls `MyObjective(algorithm, max_tokens)` with the run's `[algorithm]` and the maximum number of tokens per
    completion. A subclass must define `advantages` and `loss`; a subclass of `PolicyGradient` only `surrogate`.
    """

    needs: frozenset[Need] = frozenset()
    needs_first: frozenset[Need] = frozenset()  # needs that `advantages` reads; if empty, it runs before all passes
    whole_groups: bool = False  # keep all samples of a group in one microbatch
    entropies: bool = False  # the loss reads `Outputs.entropies`
    whitens: bool = False  # scale advantages to mean 0 and variance 1 over all tokens of the update
    skips_zeros: bool = False  # do not compute samples whose advantages are all 0, since they have no gradient

    def __init__(self, algorithm: AlgorithmConfig, max_tokens: int) -> None:
        """Store the settings that the objective needs; by default none."""

    def learns_from(self, episode: Episode) -> bool:
        """Return whether the loss uses an episode. Other episodes still count in the statistics of their group."""
        return episode.sampled_tokens > 0

    def advantages(self, group: Group, samples: Sequence[Sample]) -> list[Tensor]:
        """Return the advantages of the group's samples: one (C,) tensor per sample, one value per target."""
        ...

    def weights(self, groups: Sequence[Group]) -> Callable[[Episode], float]:
        """Return a function from an episode to the weight of each token of the episode. `groups` is the minibatch. By
        default the weight is 1 / the number of tokens that the minibatch learns from."""
        episodes = [episode for group in groups for episode in group.episodes]
        total = sum(episode.sampled_tokens for episode in episodes if self.learns_from(episode))
        return lambda episode: 1 / total

    def loss(self, now: Outputs, batch: Microbatch) -> tuple[Tensor, Figures]:
        """Return a microbatch's part of the minibatch's loss, a scalar, and figures to log, (C,) each, by name.

        The gradients of the microbatches are summed, so the loss must be a weighted sum over tokens and not a mean:
        multiply each token's loss by `batch.tokens.weights`, which come from `weights`.
        """
        ...
