"""CISPO: a clipped importance weight, which leaves every token a gradient."""

from torch import Tensor

from rlora.core.batch import Microbatch
from rlora.core.loss import is_outside, ratio_of
from rlora.core.objectives.objective import Figures
from rlora.core.objectives.policy_gradient import PolicyGradient


class Cispo(PolicyGradient):
    """The objective of `algorithm.loss = "cispo"`, with the loss `clipped_weight`."""

    def surrogate(self, log_ratio: Tensor, logprobs: Tensor, batch: Microbatch) -> tuple[Tensor, Figures]:
        low, high = self.algorithm.clip_low, self.algorithm.clip_high
        ratio = ratio_of(log_ratio)
        losses = clipped_weight(ratio, logprobs, batch.tokens.advantages, low, high)
        return losses, {"clipped": is_outside(ratio, low, high)}


def clipped_weight(ratio: Tensor, logprobs: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return -sg(clip(r, 1 - low, 1 + high)) A log p (CISPO, MiniMax-M1, arXiv:2506.13585, eq. 4 and 5). (C,) -> (C,)

    sg stops the gradient of the weight. A token outside of the clip range therefore keeps a gradient; under PPO's clip
    such a token can have no gradient.
    """
    return -ratio.detach().clamp(1 - low, 1 + high) * advantages * logprobs
