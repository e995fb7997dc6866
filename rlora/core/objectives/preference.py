"""Base class of the losses of pairs: a completion that is chosen, and one that is rejected."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlora.core.batch import Microbatch, Sample
from rlora.core.loss import episode_sums
from rlora.core.objectives.objective import Figures, Objective
from rlora.core.policy import Outputs
from rlora.records import Episode, Group
from rlora.settings import AlgorithmConfig


class Preference(Objective):
    """Losses of pairs. The first episode of a group is chosen, the second is rejected. The loss of a pair depends on
    their logprobs, summed over the tokens; the loss of an update is the mean over the pairs."""

    whole_groups = True

    def __init__(self, algorithm: AlgorithmConfig, max_tokens: int) -> None:
        self.beta = algorithm.kl

    def advantages(self, group: Group, samples: Sequence[Sample]) -> list[Tensor]:
        """Return 1 for the tokens of the chosen completion and -1 for those of the rejected one: (C,)."""
        return [torch.full_like(sample.tokens.weights, sign) for sample, sign in zip(samples, (1.0, -1.0), strict=True)]

    def weights(self, groups: Sequence[Group]) -> Callable[[Episode], float]:
        """Return a function from an episode to the weight of its pair: 1 / the pairs of the minibatch."""
        return lambda episode: 1 / len(groups)

    def of_pairs(self, chosen: Tensor, rejected: Tensor, lengths: Tensor) -> Tensor:
        """Return the loss of each pair, (P,), from the summed logprobs relative to the reference policy, (P,) each.
        `lengths` (P, 2) are the numbers of tokens of the chosen and the rejected completion."""
        raise NotImplementedError

    def loss(self, now: Outputs, batch: Microbatch) -> tuple[Tensor, Figures]:
        """Return the weighted sum of the pairs' losses. The figures are means per pair: `accuracy`, the share of pairs
        whose chosen completion has the larger implicit reward, and `margin`, the difference of these rewards."""
        reference = batch.tokens.reference_logprobs
        log_ratio = now.logprobs if reference is None else now.logprobs - reference
        chosen, rejected = episode_sums(log_ratio, batch.lengths).view(-1, 2).unbind(1)
        losses = self.of_pairs(chosen, rejected, batch.lengths.view(-1, 2))
        first = (batch.lengths.cumsum(0) - batch.lengths)[::2]  # index of the first token of each pair
        margin = (chosen - rejected).detach()
        figures = {"accuracy": margin > 0, "margin": self.beta * margin, "pairs": torch.ones_like(margin)}
        zeros = torch.zeros_like(batch.tokens.weights)
        spread = {name: zeros.index_copy(0, first, values.to(zeros.dtype)) for name, values in figures.items()}
        return (losses * batch.tokens.weights[first]).sum(), spread
