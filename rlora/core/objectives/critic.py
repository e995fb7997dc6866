"""The critic's loss."""

import torch
from torch import Tensor

from rlora.core.batch import Microbatch
from rlora.core.objectives.objective import Figures, Loss


def values_loss(clip: float) -> Loss:
    """The loss of a microbatch's values, (C,), against the returns that its tokens know."""

    def loss(values: Tensor, batch: Microbatch) -> tuple[Tensor, Figures]:
        before, returns = batch.tokens.values, batch.tokens.returns
        assert before is not None
        assert returns is not None
        losses = value_loss(values, before, returns, clip)
        return (losses * batch.tokens.weights).sum(), {"value_loss": losses}

    return loss


def value_loss(values: Tensor, before: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (clip(V, V_before - clip, V_before + clip) - R)^2) / 2 (PPO's own code; "What Matters In
    On-Policy RL", arXiv:2006.05990, appendix B.2). (C,) -> (C,); a `clip` of 0 clips nothing."""
    error = (values - returns).square()
    if clip:
        near = torch.minimum(torch.maximum(values, before - clip), before + clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2
