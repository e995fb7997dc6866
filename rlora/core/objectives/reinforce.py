"""REINFORCE with importance weights: the objective of "LoRA Without Regret", and RLOO's."""

from torch import Tensor

from rlora.core.batch import Microbatch
from rlora.core.loss import ratio_of
from rlora.core.objectives.objective import Figures
from rlora.core.objectives.policy_gradient import PolicyGradient


class Reinforce(PolicyGradient):
    """The objective of `algorithm.loss = "reinforce"`, with the loss `reinforce`."""

    def surrogate(self, log_ratio: Tensor, logprobs: Tensor, batch: Microbatch) -> tuple[Tensor, Figures]:
        return reinforce(ratio_of(log_ratio), batch.tokens.advantages), {}


def reinforce(ratio: Tensor, advantages: Tensor) -> Tensor:
    """Return -r A, whose gradient is -r A grad log p: REINFORCE with importance weights. (C,) -> (C,)

    This is the objective of "LoRA Without Regret" (Thinking Machines, 2025). On policy (r = 1), the surrogates of
    `clip`, `gspo` and `cispo` have the same gradient.
    """
    return -ratio * advantages
