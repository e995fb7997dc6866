"""REINFORCE with importance weights: the objective of "LoRA Without Regret", and RLOO's."""

from torch import Tensor

from rlora.core.batch import Microbatch
from rlora.core.loss import ratio_of
from rlora.core.objectives.objective import Figures
from rlora.core.objectives.policy_gradient import PolicyGradient


class Reinforce(PolicyGradient):
    def surrogate(self, log_ratio: Tensor, logprobs: Tensor, batch: Microbatch) -> tuple[Tensor, Figures]:
        return reinforce(ratio_of(log_ratio), batch.tokens.advantages), {}


def reinforce(ratio: Tensor, advantages: Tensor) -> Tensor:
    """-r A, whose gradient is -r A grad log p: REINFORCE with importance weights. (C,) -> (C,)

    The objective of "LoRA Without Regret" (Thinking Machines, 2025). On policy, the other surrogates have its gradient.
    """
    return -ratio * advantages
