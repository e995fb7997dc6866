"""Returns -> advantages, in the dtype of the returns. Pure torch."""

from torch import Tensor

SMALL = 16.0  # up to here float32 keeps 1e-6 of a reward, far below the addend of `whitened`


def centred(returns_G: Tensor) -> Tensor:
    """A_i = R_i - mean(R) over the G episodes of a prompt (Dr.GRPO, arXiv:2503.20783, section 3.2). (G,) -> (G,)

    GRPO's division by the group's standard deviation is left out: it weighs up the prompts that are almost always
    or almost never solved.
    """
    return _unless_alike(returns_G, returns_G - returns_G.mean())


def standardised(returns_G: Tensor) -> Tensor:
    """A_i = (R_i - mean(R)) / (std(R) + 1e-4) (GRPO, arXiv:2402.03300, section 4.1.2). (G,) -> (G,)

    With Bessel's correction and TRL's and verl's addend of about 1e-4 or less.
    """
    return _unless_alike(returns_G, (returns_G - returns_G.mean()) / (returns_G.std() + 1e-4))


def leave_one_out(returns_G: Tensor) -> Tensor:
    """A_i = R_i - mean of the others' (RLOO, arXiv:2402.14740, eq. 8). It is G / (G - 1) (R_i - mean). (G,) -> (G,)"""
    return centred(returns_G) * (len(returns_G) / (len(returns_G) - 1))


def whitened(advantages: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(A - mean) / std, of a whole step (REINFORCE++, arXiv:2501.03262; PPO's usual normalisation)."""
    return (advantages - mean) * (variance + 1e-8).rsqrt()


def generalised(rewards_T: Tensor, values_T: Tensor, bootstrap: float, gamma: float, lam: float) -> Tensor:
    """GAE (arXiv:1506.02438, eq. 11 and 16): A_t = d_t + gamma lambda A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t.

    rewards and values (T,) -> (T,). V_t is the value before token t. `bootstrap` is that after the last one: 0 where
    the episode terminated, the critic's own where it was cut off.
    """
    advantages: list[float] = []
    following, advantage = bootstrap, 0.0
    for reward, value in zip(reversed(rewards_T.tolist()), reversed(values_T.tolist()), strict=True):
        advantage = reward + gamma * following - value + gamma * lam * advantage
        advantages.append(advantage)
        following = value
    return rewards_T.new_tensor(advantages[::-1])


def _unless_alike(returns_G: Tensor, advantages_G: Tensor) -> Tensor:
    """Exactly 0 where all returns are the same: a mean may be off by a rounding."""
    return advantages_G * (returns_G.max() > returns_G.min())
