"""The critic's loss."""

import torch
from torch import Tensor

from rlora.core.batch import Microbatch
from rlora.core.objectives.objective import Figures, Loss


def values_loss(clip: float) -> Loss:
    """Return the loss of a critic: a function of the values (C,) of a microbatch, and of the microbatch, whose tokens
    contain the returns. `clip` is as in `value_loss`."""

    def loss(values: Tensor, batch: Microbatch) -> tuple[Tensor, Figures]:
        previous, returns = batch.tokens.values, batch.tokens.returns
        assert previous is not None
        assert returns is not None
        losses = value_loss(values, previous, returns, clip)
        return (losses * batch.tokens.weights).sum(), {"value_loss": losses}

    return loss


def value_loss(values: Tensor, previous: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2 (PPO's reference code; "What Matters In
    On-Policy RL", arXiv:2006.05990, appendix B.2). `previous` is V_old; `clip` 0 disables clipping. (C,) -> (C,)"""
    error = (values - returns).square()
    if clip:
        clipped = torch.minimum(torch.maximum(values, previous - clip), previous + clip)
        error = torch.maximum(error, (clipped - returns).square())
    return error / 2
