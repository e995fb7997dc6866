"""Odds ratio preference optimisation."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlora.core.objectives.preference import Preference

_LARGEST = -1e-6  # mean logprob, in nats: the odds of a completion with probability 1 are infinite


class Orpo(Preference):
    """Odds ratio preference optimisation (arXiv:2403.07691, eq. 6 and 7): -log p per token of the chosen completion, -
    beta log sigmoid(log odds(chosen) - log odds(rejected)), with odds of the mean logprobs. Without a reference policy;
    `algorithm.kl` is beta, lambda in the paper."""

    def of_pairs(self, chosen: Tensor, rejected: Tensor, lengths: Tensor) -> Tensor:
        means = torch.stack([chosen, rejected], 1) / lengths
        bounded = means.clamp(max=_LARGEST)
        log_odds = bounded - torch.log1p(-bounded.exp())
        return -means[:, 0] - self.beta * logsigmoid(log_odds[:, 0] - log_odds[:, 1])
