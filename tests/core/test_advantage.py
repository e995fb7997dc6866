import math

import pytest
import torch
from torch import Tensor

from rlora.core.advantage import centred, generalised, leave_one_out, standardised, whitened

RETURNS = torch.tensor([1.0, 0.0, 0.0, 0.0])


def test_a_groups_advantages_by_hand() -> None:
    assert centred(RETURNS).tolist() == [0.75, -0.25, -0.25, -0.25]
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    assert standardised(RETURNS).tolist() == pytest.approx([a / (std + 1e-4) for a in (0.75, -0.25, -0.25, -0.25)])
    assert leave_one_out(RETURNS).tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


@pytest.mark.parametrize("advantages", [centred, standardised, leave_one_out])
def test_equal_returns_give_exactly_0(advantages: object) -> None:
    assert callable(advantages)
    assert advantages(torch.full((3,), 0.1)).tolist() == [0.0, 0.0, 0.0]


def test_leave_one_out_is_each_less_the_mean_of_the_others() -> None:
    returns = torch.randn(7, generator=torch.Generator().manual_seed(0))
    by_hand = [float(returns[i] - returns[torch.arange(7) != i].mean()) for i in range(7)]
    assert leave_one_out(returns).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_whitened_has_mean_0_and_variance_1() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 2
    white = whitened(values, values.mean(), values.var())
    assert (white.mean().item(), white.var().item()) == pytest.approx((0.0, 1.0), abs=1e-5)


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.25, 0.75])
    # d = [0.9 * 0.25 - 0.5, 0.9 * 0.75 - 0.25, 1 - 0.75], gamma lambda = 0.45
    d = [-0.275, 0.425, 0.25]
    a_2 = d[2]
    a_1 = d[1] + 0.45 * a_2
    a_0 = d[0] + 0.45 * a_1
    assert generalised(rewards, values, 0.0, 0.9, 0.5).tolist() == pytest.approx([a_0, a_1, a_2])


def test_gae_with_lambda_1_is_the_return_less_the_value_and_with_0_the_td_error() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(6, generator=generator), torch.randn(6, generator=generator)

    def discounted(bootstrap: float, gamma: float) -> Tensor:
        following, returns = bootstrap, []
        for reward in reversed(rewards.tolist()):
            following = reward + gamma * following
            returns.append(following)
        return torch.tensor(returns[::-1])

    for bootstrap in (0.0, 0.7):  # terminated, and cut off
        advantages = generalised(rewards, values, bootstrap, 0.9, 1.0)
        torch.testing.assert_close(advantages, discounted(bootstrap, 0.9) - values)
        following = torch.cat([values[1:], torch.tensor([bootstrap])])
        torch.testing.assert_close(
            generalised(rewards, values, bootstrap, 0.9, 0.0), rewards + 0.9 * following - values
        )
