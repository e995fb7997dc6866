"""A base in 8 or 4 bit under the bank, with PEFT over the same base as the oracle."""

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
NEEDS_IT = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes: the extra `quantise`")


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


@NEEDS_IT
@pytest.mark.parametrize("form", FORMS)
def test_the_bank_gives_the_logits_and_gradients_of_peft(form: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    ours, theirs = (load_quantised(path, torch.float32, form) for _ in range(2))  # type: ignore[arg-type]
    ids = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        of_base = ours(ids).logits
    assert 1e-4 < (of_base - full).norm() / full.norm() < 0.3  # quantised, and still the model
    bank = adapted(ours, Spec(2, 8.0))
    stir(bank)
    assert all(isinstance(ours.get_submodule(matrix.place), LoRALinear) for matrix in bank.factors)
    peft = get_peft_model(theirs, LoraConfig(r=2, lora_alpha=8.0, target_modules=[m.key for m in bank.over("run")]))
    of_peft = {name.replace(".default", ""): p for name, p in peft.named_parameters() if "lora_" in name}
    ours_by_name = masters(bank, "run")
    assert of_peft.keys() == ours_by_name.keys()
    for key, parameter in of_peft.items():
        parameter.data = ours_by_name[key].data.clone()
    logits, expected = ours(ids).logits, peft(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (logits - of_base).norm() > 0.1 * of_base.norm()
    for each in (logits, expected):
        each.log_softmax(-1)[..., 5].sum().backward()
    for key, parameter in of_peft.items():
        torch.testing.assert_close(ours_by_name[key].grad, parameter.grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), bank.serving(None):
        assert ours(ids).logits.equal(of_base)


@NEEDS_IT
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
    assert all(not now.equal(then) for now, then in zip(learner.held.optimizer.masters.values(), before, strict=True))


@NEEDS_IT
@pytest.mark.skipif(torch.cuda.is_available(), reason="a fault of the CPU kernel")
def test_widths_that_are_read_back_wrongly_are_refused(config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=r"down_proj has 96 input features.*multiple of 64"):
        Solo(config(learner={"quantise": "nf4"}), saved(tmp_path, intermediate_size=96))
