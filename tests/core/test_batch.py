import math

import pytest
import torch
from conftest import episode, group, samples

from rlora.core.batch import Microbatch, microbatches
from rlora.records import Group


def pack(groups: list[Group], budget: int = 100) -> list[Microbatch]:
    return list(microbatches(samples(groups), budget, torch.float32, torch.device("cpu")))


def test_one_microbatch_by_hand(groups: list[Group]) -> None:
    (batch,) = pack(groups)
    # Each prompt, then its completions without their last token. The group with equal rewards is left out.
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 20, 21, 22, 23, 24, 25, 26, 27]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4, 5, 5, 6]
    assert batch.targets.tolist() == [8, 9, 1, 10, 1, 25, 1, 26, 27, 28]
    assert batch.input_ids[batch.predictors].tolist() == [7, 8, 9, 7, 10, 24, 25, 24, 26, 27]
    assert (
        batch.tokens.advantages.tolist() == [0.5] * 3 + [-0.5] * 2 + [0.0] * 2 + [-0.5] * 3
    )  # the empty episode has reward 1.0
    assert batch.tokens.behaviour_logprobs.tolist() == [-1.0] * 10
    assert batch.layout.shape == (2, 5, 2, 2)
    assert batch.layout.pad_index.tolist() == [0, 1, 2, 0, 0, 6, 7, 8, 9, 10, 3, 4, 5, 0, 11, 0, 12, 13]
    assert batch.layout.padding.tolist() == [3, 4, 13, 15]
    assert batch.layout.pad_index[batch.layout.unpad_index].tolist() == list(range(14))
    x = -math.inf  # a token sees its prompt (3 of 5 slots, and 5 of 5) and its completion up to itself
    assert batch.layout.causal[0, 0, :2, :3].tolist() == [[0, x, x], [0, 0, x]]
    assert batch.layout.bias[::2, 0].tolist() == [
        [[0, 0, 0, x, x, 0, x], [0, 0, 0, x, x, 0, 0]],
        [[0, 0, 0, 0, 0, 0, x], [0, 0, 0, 0, 0, 0, 0]],
    ]


def test_groups_that_agree_are_left_out() -> None:
    assert pack([group([1], episode([2, 3], 1.0), episode([4], 1.0))]) == []


@pytest.mark.parametrize("budget", [1, 4, 8, 11])
def test_microbatches_keep_to_the_budget_and_lose_nothing(groups: list[Group], budget: int) -> None:
    targets = sorted(token for batch in pack(groups) for token in batch.targets.tolist())
    batches = pack(groups, budget)
    assert len(batches) > 1
    assert all(
        len(batch.input_ids) <= budget or (batch.layout.shape[0], batch.layout.shape[2]) == (1, 1) for batch in batches
    )
    assert sorted(token for batch in batches for token in batch.targets.tolist()) == targets


def test_tokens_go_by_position_not_by_value() -> None:
    (batch,) = pack([group([1], episode([0, 0], 1.0), episode([2], 0.0))])
    assert batch.targets.tolist() == [0, 0, 2]
    assert batch.input_ids.tolist() == [1, 0]
