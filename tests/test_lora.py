import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from rlora.lora import LoRALinear, add_lora
from rlora.records import RloraError


def test_forward_is_the_paper_equation() -> None:
    base = nn.Linear(3, 2)
    layer = LoRALinear(base, rank=2, alpha=6.0, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 3)
    assert layer(x).equal(base(x))  # B = 0
    layer.lora_B.data.normal_()
    merged = base.weight + (6.0 / 2) * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ merged.T + base.bias)
    layer.enabled = False
    assert layer(x).equal(base(x))


def test_a_is_uniform_within_its_bound_and_follows_the_seed() -> None:
    first, again, other = (
        LoRALinear(nn.Linear(400, 8), 4, 32.0, torch.Generator().manual_seed(seed)).lora_A for seed in (1, 1, 2)
    )
    assert first.equal(again)
    assert not first.equal(other)
    bound = 1 / 400**0.5
    assert first.abs().max() <= bound
    assert first.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_forward_rounds_as_the_engine_does_and_gradients_reach_the_masters() -> None:
    layer = LoRALinear(nn.Linear(4, 3).bfloat16(), 1, 3.0, torch.Generator().manual_seed(0))
    layer.lora_B.data.normal_()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    served_a, served_b = layer.lora_A.bfloat16(), layer.lora_B.bfloat16() * 3.0  # vLLM folds the scale into B, in bf16
    delta = (x @ served_a.T).float() @ served_b.T.float()  # added to the base's output before that is rounded again
    assert layer(x).equal((layer.base(x).float() + delta).bfloat16())
    layer(x).sum().backward()
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.dtype == torch.float32


def test_every_linear_layer_but_the_head_is_adapted(tiny_base: PreTrainedModel) -> None:
    layers = add_lora(tiny_base, rank=1, alpha=32.0, seed=0)
    leaves = {name.rpartition(".")[2] for name in layers}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(layers) == 2 * 7
    trainable = [name for name, parameter in tiny_base.named_parameters() if parameter.requires_grad]
    assert {name.rpartition(".")[2] for name in trainable} == {"lora_A", "lora_B"}


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(RloraError, match=r"no torch\.nn\.Linear layer"):
        add_lora(nn.Sequential(nn.Embedding(3, 2)), 1, 32.0, 0)
