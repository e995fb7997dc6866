import pytest
import torch
from conftest import adapted, tiny_model

from rlora.core.lora import Spec
from rlora.core.peft_format import encode, masters
from rlora.records import Adapter, RloraError
from rlora.run.merge import merge

IDS = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))


def trained(name: str, spec: Spec, std: float) -> tuple[Adapter, torch.Tensor]:
    """An adapter whose B has entries of about `std`, and the logits of its policy."""
    model = tiny_model(name)
    bank = adapted(model, spec)
    for key, master in masters(bank, "run").items():
        if "lora_B" in key:
            master.data.normal_(std=std)
    with torch.no_grad():
        return Adapter("run", 1, *encode(bank, "run", "base")), model(IDS).logits


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "qwen3_moe"])
def test_a_merge_in_fp32_equals_the_policy(name: str) -> None:
    adapter, logits = trained(name, Spec(4, rslora=True), 0.1)
    base = tiny_model(name)
    assert merge(base, adapter, torch.float32) < 1e-3
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("std", "least", "most"), [(1e-5, 0.5, 1.5), (10.0, 0.0, 0.01)])
def test_a_merge_in_bf16_reports_how_much_of_a_small_update_is_lost(std: float, least: float, most: float) -> None:
    adapter, _ = trained("llama", Spec(), std)
    assert least <= merge(tiny_model("llama").bfloat16().float(), adapter, torch.bfloat16) <= most


def test_an_adapter_of_a_different_model_is_refused() -> None:
    adapter, _ = trained("llama", Spec(), 0.1)
    with pytest.raises(RloraError, match="its matrices do not match Phi3ForCausalLM"):
        merge(tiny_model("phi3"), adapter, torch.float32)
    with pytest.raises(RloraError, match="load it in float32"):
        merge(tiny_model("llama").bfloat16(), adapter, torch.float32)
