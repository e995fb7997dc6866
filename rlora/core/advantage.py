"""Advantages from returns, in the dtype of the returns. Pure torch."""

from torch import Tensor

LARGEST_IN_FLOAT32 = 16.0  # rewards up to this size have a float32 error of 1e-6, far below the epsilon of `whitened`


def centred(returns_G: Tensor) -> Tensor:
    """Return A_i = R_i - mean(R) over the G episodes of a prompt (Dr.GRPO, arXiv:2503.20783, section 3.2). (G,) -> (G,)

    Unlike GRPO, this does not divide by the standard deviation of the group. The division would give more weight to
    prompts that are almost always or almost never solved.
    """
    return _zero_if_equal(returns_G, returns_G - returns_G.mean())


def standardised(returns_G: Tensor) -> Tensor:
    """Return A_i = (R_i - mean(R)) / (std(R) + 1e-4) (GRPO, arXiv:2402.03300, section 4.1.2). (G,) -> (G,)

    std has Bessel's correction. The term 1e-4 avoids a division by zero.
    """
    return _zero_if_equal(returns_G, (returns_G - returns_G.mean()) / (returns_G.std() + 1e-4))


def leave_one_out(returns_G: Tensor) -> Tensor:
    """Return A_i = R_i - mean of the other returns = G / (G - 1) (R_i - mean(R)) (RLOO, arXiv:2402.14740, eq. 8).
    (G,) -> (G,)"""
    return centred(returns_G) * (len(returns_G) / (len(returns_G) - 1))


def whitened(advantages: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return (A - mean) / sqrt(variance + 1e-8), with `mean` and `variance` over all tokens of a step (REINFORCE++,
    arXiv:2501.03262; PPO's usual normalisation). (C,), () and () -> (C,)"""
    return (advantages - mean) * (variance + 1e-8).rsqrt()


def generalised(rewards_T: Tensor, values_T: Tensor, bootstrap: float, gamma: float, lam: float) -> Tensor:
    """Compute GAE (arXiv:1506.02438, eq. 11, 16): A_t = d_t + gamma lambda A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t.

    rewards and values (T,) -> (T,). V_t is the value before token t; `lam` is lambda. `bootstrap` is the value after
    the last token: 0 if the episode terminated, the critic's value if the completion was cut off.
    """
    advantages: list[float] = []
    following, advantage = bootstrap, 0.0
    for reward, value in zip(reversed(rewards_T.tolist()), reversed(values_T.tolist()), strict=True):
        advantage = reward + gamma * following - value + gamma * lam * advantage
        advantages.append(advantage)
        following = value
    return rewards_T.new_tensor(advantages[::-1])


def _zero_if_equal(returns_G: Tensor, advantages_G: Tensor) -> Tensor:
    """Return the advantages, or exactly 0 if all returns are equal: rounding can make the computed mean differ."""
    return advantages_G * (returns_G.max() > returns_G.min())
