"""GSPO: all tokens of an episode share one ratio."""

from torch import Tensor

from rlora.core.batch import Microbatch
from rlora.core.loss import sequence_log_ratio
from rlora.core.objectives.clip import Clip
from rlora.core.objectives.objective import Figures


class Gspo(Clip):
    """The objective of `algorithm.loss = "gspo"`: the loss `clipped` of s = exp(mean of log r over the episode) (GSPO,
    arXiv:2507.18071, eq. 5 and 7)."""

    def surrogate(self, log_ratio: Tensor, logprobs: Tensor, batch: Microbatch) -> tuple[Tensor, Figures]:
        return super().surrogate(sequence_log_ratio(log_ratio, batch.lengths), logprobs, batch)
