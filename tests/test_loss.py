import math

import pytest
import torch

from rlora.loss import kl_k3, truncated_importance_loss


def test_truncated_importance_loss_by_hand() -> None:
    p_learner, p_behaviour = torch.tensor([0.5, 0.5, 0.2]), torch.tensor([0.5, 0.1, 0.4])
    advantages = torch.tensor([1.0, 2.0, -1.0])
    losses = truncated_importance_loss(p_learner.log(), p_behaviour.log(), advantages, cap=2.0)
    # ratios 1, 5 (truncated to 2) and 0.5
    expected = [-1 * 1 * math.log(0.5), -2 * 2 * math.log(0.5), 0.5 * math.log(0.2)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_gradient_is_the_truncated_ratio_times_the_advantage() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True)
    behaviour = torch.tensor([-1.0, -4.0, -2.0])
    truncated_importance_loss(logprobs, behaviour, torch.tensor([0.5, 1.0, -1.0]), cap=2.0).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.5, -2.0, math.exp(-1)], rel=1e-6)


def test_k3_by_hand_and_never_negative() -> None:
    learner, behaviour = torch.tensor([0.5, 0.1]).log(), torch.tensor([0.25, 0.2]).log()
    assert kl_k3(learner, behaviour).tolist() == pytest.approx([2 - 1 - math.log(2), 0.5 - 1 - math.log(0.5)], rel=1e-5)
    noise = torch.randn(1000)
    assert (kl_k3(noise, torch.zeros(1000)) >= 0).all()
    # unbiased: the mean over the behaviour policy is the KL
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    assert (p * kl_k3(q.log(), p.log())).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
