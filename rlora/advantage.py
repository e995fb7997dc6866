"""Rewards -> advantages. Pure torch."""

from torch import Tensor


def group_centred(rewards_PG: Tensor) -> Tensor:
    """A_i = r_i - mean(r) over the G episodes of a prompt (Dr.GRPO, arXiv:2503.20783, section 3.2). (P, G) -> (P, G)

    GRPO's division by the group's standard deviation is left out: it weighs up the prompts that are almost always
    or almost never solved.
    """
    return rewards_PG - rewards_PG.mean(dim=-1, keepdim=True)
