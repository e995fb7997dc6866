import torch
from conftest import episode, group

from rlora.batch import microbatches
from rlora.records import Group

CPU = torch.device("cpu")


def test_one_microbatch_by_hand(groups: list[Group]) -> None:
    (batch,) = microbatches(groups, 100, CPU)
    assert batch.prompt_ids.tolist() == [[5, 6, 7, 0, 0], [20, 21, 22, 23, 24]]
    assert batch.prompt_lengths.tolist() == [3, 5]
    assert batch.prompt_of_row.tolist() == [0, 0, 1, 1]
    assert batch.completion_ids.tolist() == [[8, 9, 1], [10, 1, 0], [25, 1, 0], [26, 27, 28]]
    assert batch.mask.sum(dim=1).tolist() == [3, 2, 2, 3]
    assert batch.advantages.tolist() == [0.5] * 3 + [-0.5] * 2 + [0.0] * 2 + [-0.5] * 3  # the empty one had 1.0
    assert batch.behaviour_logprobs.tolist() == [-1.0] * 10


def test_groups_that_agree_are_left_out() -> None:
    agree = group([1], episode([2, 3], 1.0), episode([4], 1.0))
    assert list(microbatches([agree], 100, CPU)) == []


def test_microbatches_keep_to_the_budget_and_lose_nothing(groups: list[Group]) -> None:
    whole = sorted(
        token for batch in microbatches(groups, 100, CPU) for token in batch.completion_ids[batch.mask].tolist()
    )
    for budget in (1, 4, 6, 9):
        batches = list(microbatches(groups, budget, CPU))
        assert all(batch.completion_ids.numel() <= budget or len(batch.completion_ids) == 1 for batch in batches)
        assert sorted(token for batch in batches for token in batch.completion_ids[batch.mask].tolist()) == whole


def test_mask_goes_by_position_not_by_token() -> None:
    zero_is_sampled = group([1], episode([0, 0], 1.0), episode([2], 0.0))
    (batch,) = microbatches([zero_is_sampled], 100, CPU)
    assert batch.mask.tolist() == [[True, True], [True, False]]
