"""Adapters over a base in 8 or 4 bits, compared with PEFT over the same base."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import Solo, adapted, stir
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlora.core.lora import LoRALinear, Spec
from rlora.core.peft_format import masters
from rlora.model.base import load_quantised
from rlora.records import Group, RloraError
from rlora.settings import Config

MakeConfig = Callable[..., Config]
FORMS = ["int8", "nf4"]
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes: the extra `quantise`"
)


def saved(path: Path, intermediate_size: int = 128) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=intermediate_size, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("form", FORMS)
def test_without_bitsandbytes_the_error_says_what_to_install(form: str, config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=rf"learner\.quantise = '{form}': bitsandbytes .*rlora\[quantise\]"):
        Solo(config(learner={"quantise": form}), saved(tmp_path))


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("form", FORMS)
def test_the_bank_gives_the_logits_and_gradients_of_peft(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    model, peft_base = (load_quantised(path, torch.float32, form) for _ in range(2))  # type: ignore[arg-type]
    ids = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        base_logits = model(ids).logits
    assert 1e-4 < (base_logits - full).norm() / full.norm() < 0.3  # quantised, but still the same model
    bank = adapted(model, Spec(2, 8.0))
    stir(bank)
    assert all(isinstance(model.get_submodule(matrix.module_name), LoRALinear) for matrix in bank.factors)
    modules = [matrix.key for matrix in bank.pairs_of("run")]
    peft = get_peft_model(peft_base, LoraConfig(r=2, lora_alpha=8.0, target_modules=modules))
    peft_parameters = {name.replace(".default", ""): p for name, p in peft.named_parameters() if "lora_" in name}
    parameters = masters(bank, "run")
    assert peft_parameters.keys() == parameters.keys()
    for key, parameter in peft_parameters.items():
        parameter.data = parameters[key].data.clone()
    logits, expected = model(ids).logits, peft(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (logits - base_logits).norm() > 0.1 * base_logits.norm()
    for tensor in (logits, expected):
        tensor.log_softmax(-1)[..., 5].sum().backward()
    for key, parameter in peft_parameters.items():
        torch.testing.assert_close(parameters[key].grad, parameter.grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), bank.serving(None):
        assert model(ids).logits.equal(base_logits)


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_trains_every_matrix(
    form: str, dtype: str, config: MakeConfig, groups: list[Group], tmp_path: Path
) -> None:
    learner = Solo(config(dtype=dtype, learner={"quantise": form, "checkpointing": True}), saved(tmp_path))
    before = [parameter.detach().clone() for parameter in learner.held.optimizer.masters.values()]
    for _ in range(2):  # A has a gradient once B is not 0
        adapter, stats = learner.update(groups)
    assert (adapter.number, stats.tokens) == (2, 8)
    assert not stats.skipped_in_a_row
    after = learner.held.optimizer.masters.values()
    assert all(not new.equal(old) for new, old in zip(after, before, strict=True))


@NEEDS_BITSANDBYTES
@pytest.mark.skipif(torch.cuda.is_available(), reason="a fault of the CPU kernel")
def test_widths_that_are_read_back_wrongly_are_refused(config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=r"down_proj has 96 input features.*multiple of 64"):
        Solo(config(learner={"quantise": "nf4"}), saved(tmp_path, intermediate_size=96))
