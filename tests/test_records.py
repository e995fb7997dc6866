import pytest
import safetensors.torch
import torch
from conftest import episode, group

from rlora.records import Adapter


def test_adapter_identity_holds_run_version_and_bytes() -> None:
    one, other = Adapter("run", 3, b"{}", b"a"), Adapter("run", 3, b"{}", b"b")
    assert one.name.startswith("run-v3-")
    assert one.name != other.name  # the same version, trained again to other bytes


def test_adapter_counts_its_parameters() -> None:
    weights = safetensors.torch.save({"A": torch.zeros(1, 5), "B": torch.zeros(7, 1)}, metadata={"format": "pt"})
    assert Adapter("run", 0, b"{}", weights).parameters == 12


def test_group_with_rewards_needs_one_each() -> None:
    pair = group([1], episode([2]), episode([3]))
    assert pair.with_rewards([0.0, 1.0]).rewards == [0.0, 1.0]
    assert pair.with_rewards([0.0, 1.0]).informative
    assert not pair.with_rewards([1.0, 1.0]).informative
    with pytest.raises(ValueError, match="shorter"):
        pair.with_rewards([1.0])
