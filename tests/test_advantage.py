import torch

from rlora.advantage import group_centred


def test_group_centred_by_hand() -> None:
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0, 0.0, 0.0, 0.0]])
    assert group_centred(rewards_PG).equal(expected)
