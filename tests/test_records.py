import pytest
import safetensors.torch
import torch
from conftest import episode, group

from rlora.records import BASE, OFF, Adapter, Version


def adapter(number: int = 3, config: bytes = b"{}", policy: str = "run", **tensors: torch.Tensor) -> Adapter:
    cloned = {name: tensor.clone() for name, tensor in tensors.items()}
    return Adapter(policy, number, config, safetensors.torch.save(cloned, metadata={"format": "pt"}))


def test_an_adapters_identity_is_policy_number_config_and_tensors() -> None:
    one = torch.arange(6.0)
    first = adapter(A=one.view(2, 3), B=one)
    different = [
        adapter(A=one.view(2, 3), B=one + 1e-7),  # the same number, trained again with different weights
        adapter(A=one.view(3, 2), B=one),
        adapter(A=one.view(torch.int32).view(2, 3), B=one),
        adapter(A=one, B=one.view(2, 3)),
        adapter(config=b"{ }", A=one.view(2, 3), B=one),
        adapter(4, A=one.view(2, 3), B=one),
        adapter(policy="other", A=one.view(2, 3), B=one),
    ]
    assert first.version == Version("run", 3, first.digest)
    assert first.name == str(first.version) == f"run-v3-{first.digest[:12]}"
    assert len({first.name, *(other.name for other in different)}) == 8
    assert len({first.version, *(other.version for other in different)}) == 8
    assert first.digest == adapter(B=one, A=one.view(2, 3)).digest == adapter(4, A=one.view(2, 3), B=one).digest


def test_the_base_is_a_version_of_no_policy() -> None:
    assert (BASE.version.number, BASE.version.policy) == (OFF, "base")
    assert BASE.version != Version("run", OFF, BASE.digest)


def test_adapter_counts_its_parameters() -> None:
    weights = safetensors.torch.save({"A": torch.zeros(1, 5), "B": torch.zeros(7, 1)}, metadata={"format": "pt"})
    assert Adapter("run", 0, b"{}", weights).parameters == 12


def test_group_with_rewards_needs_one_per_episode() -> None:
    pair = group([1], episode([2]), episode([3]))
    assert pair.with_rewards([0.0, 1.0]).rewards == [0.0, 1.0]
    assert pair.with_rewards([0.0, 1.0]).informative
    assert not pair.with_rewards([1.0, 1.0]).informative
    with pytest.raises(ValueError, match="shorter"):
        pair.with_rewards([1.0])
