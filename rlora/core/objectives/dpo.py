"""Direct preference optimisation."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlora.core.objectives.objective import Need
from rlora.core.objectives.preference import Preference


class Dpo(Preference):
    """Direct preference optimisation (arXiv:2305.18290, eq. 7): -log sigmoid(beta (chosen - rejected)). `algorithm.kl`
    is beta."""

    needs = frozenset({Need.REFERENCE})

    def of_pairs(self, chosen: Tensor, rejected: Tensor, lengths: Tensor) -> Tensor:
        return -logsigmoid(self.beta * (chosen - rejected))
