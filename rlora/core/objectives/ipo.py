"""Identity preference optimisation."""

from torch import Tensor

from rlora.core.objectives.objective import Need
from rlora.core.objectives.preference import Preference


class Ipo(Preference):
    """Identity preference optimisation (arXiv:2310.12036, eq. 17): (chosen - rejected - 1 / (2 beta))^2, with means
    over the tokens in place of sums, as in TRL. `algorithm.kl` is beta."""

    needs = frozenset({Need.REFERENCE})

    def of_pairs(self, chosen: Tensor, rejected: Tensor, lengths: Tensor) -> Tensor:
        return (chosen / lengths[:, 0] - rejected / lengths[:, 1] - 1 / (2 * self.beta)).square()
