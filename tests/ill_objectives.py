"""Objectives that make a run ill, for end_to_end/test_several.py."""

from typing import Any

import torch

from rlora.core.loss import ratio_of
from rlora.core.objectives.policy_gradient import PolicyGradient


class Broken(PolicyGradient):
    """Its loss is no number."""

    def surrogate(self, log_ratio: Any, logprobs: Any, batch: Any) -> Any:
        return log_ratio * float("nan"), {}


class Late(PolicyGradient):
    """It does nothing with the first 16 groups. From then on the policy is pulled to what it has sampled."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.skips_zeros, self.groups = False, 0

    def advantages(self, group: Any, samples: Any) -> Any:
        self.groups += 1
        return [torch.full_like(sample.tokens.weights, float(self.groups > 16)) for sample in samples]

    def surrogate(self, log_ratio: Any, logprobs: Any, batch: Any) -> Any:
        return -ratio_of(log_ratio) * batch.tokens.advantages, {}


class Sharper(PolicyGradient):
    """It lowers the policy's entropy, whatever the rewards are."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.entropies, self.skips_zeros = True, False

    def surrogate(self, log_ratio: Any, logprobs: Any, batch: Any) -> Any:
        return log_ratio, {}

    def loss(self, now: Any, batch: Any) -> Any:
        _, figures = super().loss(now, batch)
        return (now.entropies * batch.tokens.weights).sum(), figures
