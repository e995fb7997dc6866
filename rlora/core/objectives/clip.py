"""The clipped surrogate of PPO, GRPO, Dr.GRPO, DAPO and REINFORCE++."""

import torch
from torch import Tensor

from rlora.core.batch import Microbatch
from rlora.core.loss import is_outside, ratio_of
from rlora.core.objectives.objective import Figures
from rlora.core.objectives.policy_gradient import PolicyGradient


class Clip(PolicyGradient):
    """The objective of `algorithm.loss = "clip"`, with the loss `clipped`."""

    def surrogate(self, log_ratio: Tensor, logprobs: Tensor, batch: Microbatch) -> tuple[Tensor, Figures]:
        low, high, dual = self.algorithm.clip_low, self.algorithm.clip_high, self.algorithm.dual_clip
        ratio = ratio_of(log_ratio)
        return clipped(ratio, batch.tokens.advantages, low, high, dual), {"clipped": is_outside(ratio, low, high)}


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float = 0.0) -> Tensor:
    """Return -min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv:1707.06347, eq. 7; DAPO's clip-higher,
    arXiv:2503.14476, eq. 10). (C,) -> (C,)

    With `dual` > 1 the loss is at most -dual A if A < 0 (dual-clip PPO, arXiv:1912.09729, eq. 5).
    """
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual * advantages), objective)
    return -objective
