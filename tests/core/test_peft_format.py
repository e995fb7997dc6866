import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import TINY_CONFIGS, adapted, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model

from rlora.core.lora import Bank, Spec
from rlora.core.peft_format import decode, encode, fill, masters
from rlora.records import Adapter, RloraError
from rlora.run.start import checked_start, read, without_base_weights
from rlora.settings import LearnerConfig
from rlora.store import write_adapter

IDS = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))


def saved(bank: Bank, directory: Path) -> str:
    for master in masters(bank, "run").values():
        master.data.normal_(std=0.1)
    return str(write_adapter(Adapter("run", 1, *encode(bank, "run", "base")), directory / "adapter"))


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT asks modules, not parameters
@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
@pytest.mark.parametrize("spec", [Spec(), Spec(8, 16.0, rslora=True, targets="mlp")], ids=["rank1", "rslora8"])
def test_peft_loads_what_we_save(name: str, spec: Spec, tmp_path: Path) -> None:
    model = tiny_model(name)
    path = saved(adapted(model, spec), tmp_path)
    peft = PeftModel.from_pretrained(tiny_model(name), path)
    with torch.no_grad():
        base_logits, logits = tiny_model(name)(IDS).logits, model(IDS).logits
        assert not torch.allclose(base_logits, logits, atol=1e-2)
        torch.testing.assert_close(peft(IDS).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"}),
        (
            "llama",
            {
                "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {"v_proj": 5, "layers.1.self_attn.q_proj": 1}, "alpha_pattern": {"q_proj": 32},
            },
        ),
        ("llama", {"r": 2, "target_modules": ["model.layers.0.mlp.up_proj", "lm_head"]}),
        ("qwen3_moe", {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
        ("qwen3_moe", {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}),
        (
            "mixtral",
            {"r": 3, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        ),
    ],
)  # fmt: skip
def test_what_peft_saves_loads_here(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    peft = get_peft_model(tiny_model(name), LoraConfig(**config))
    for parameter_name, parameter in peft.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")  # it copies the base's head
        peft.save_pretrained(tmp_path / "peft")
    spec, tensors = decode(*read(tmp_path / "peft"))
    model = tiny_model(name)
    bank = adapted(model, spec)
    fill(bank, "run", tensors)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, peft(IDS).logits, atol=1e-4, rtol=1e-4)
    decoded_spec, decoded = decode(*encode(bank, "run", "base"))
    assert decoded.keys() == tensors.keys()
    assert all(decoded[key].equal(tensors[key]) for key in tensors)
    copy = adapted(tiny_model(name), decoded_spec)
    fill(copy, "run", decoded)
    scales, expected = ([pair.scale for pair in b.pairs_of("run").values()] for b in (copy, bank))
    assert scales == expected


def test_an_adapter_of_some_layers_names_only_those(tmp_path: Path) -> None:
    names = {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    config, _ = encode(adapted(tiny_model("llama"), Spec(targets=frozenset(names))), "run", "base")
    assert json.loads(config)["target_modules"] == ["down_proj", "model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"use_dora": True}, "use_dora = True can't be loaded"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' also changed the base"),
        ({"r": 9}, "r has rank 9; use an adapter of rank 1 to 8"),
        ({"rank_pattern": {"q_proj": 16}}, "q_proj has rank 16"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    config, weights = encode(adapted(tiny_model("llama"), Spec()), "run", "base")
    with pytest.raises(RloraError, match=re.escape(message)):
        decode(json.dumps(json.loads(config) | change).encode(), weights)


def test_tensors_that_do_not_fit_are_refused_and_change_nothing() -> None:
    bank = adapted(tiny_model("llama"), Spec())
    before = encode(bank, "run", "base")
    config, weights = encode(adapted(tiny_model("llama"), Spec(2)), "run", "base")
    with pytest.raises(RloraError, match=r"lora_A\.weight: found \[2, \d+\], expected \[1, \d+\]"):
        fill(bank, "run", decode(config, weights)[1])
    with pytest.raises(RloraError, match="found no tensor, expected"):
        fill(bank, "run", {})
    assert encode(bank, "run", "base") == before
    odd = safetensors.torch.save({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(1)})
    with pytest.raises(RloraError, match="neither A nor B of a weight matrix: it is LoRA over embeddings"):
        decode(config, odd)
    with pytest.raises(RloraError, match="its files are corrupt"):
        decode(config, weights[:100])


def saved_by_peft(
    path: Path, tied: bool = False, embeddings: bool | str = "auto", size: int = 0, **settings: Any
) -> Any:
    """Let PEFT save an adapter over q_proj to `path`. Returns its model, so that it can be changed and saved again."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    if size:
        model.resize_token_embeddings(size, mean_resizing=False)
    peft = get_peft_model(model, LoraConfig(r=1, lora_alpha=32, target_modules=["q_proj"], **settings))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        peft.save_pretrained(path, save_embedding_layers=embeddings)
    return peft


def start(path: Path, tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    base = tiny_model("llama", tie_word_embeddings=tied).to(dtype)
    files = checked_start(LearnerConfig(start_from=str(path)), lambda: base)
    assert files is not None
    return decode(*files)[1]


BOTH = ["lm_head", "embed_tokens"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{"embeddings": True}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": BOTH}, {}]
)
def test_embeddings_that_equal_the_bases_are_accepted(
    tied: bool, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
) -> None:
    """However they were saved, and whatever dtype the base is loaded in."""
    saved_by_peft(tmp_path, tied, **settings)
    tensors = start(tmp_path, tied, dtype)
    assert len(tensors) == 4
    assert all(".lora_" in name for name in tensors)
    config, weights = without_base_weights(*read(tmp_path), lambda: tiny_model("llama", tie_word_embeddings=tied))
    assert not json.loads(config)["modules_to_save"]
    assert safetensors.torch.load(weights).keys() == tensors.keys()


def test_a_model_is_loaded_only_where_there_is_something_to_compare(tmp_path: Path) -> None:
    saved_by_peft(tmp_path)
    files = read(tmp_path)
    assert without_base_weights(*files, lambda: pytest.fail("loaded")) == files


@pytest.mark.parametrize("settings", [{"embeddings": True}, {"modules_to_save": BOTH}])
def test_trained_embeddings_are_refused_as_such(settings: dict[str, Any], tmp_path: Path) -> None:
    peft = saved_by_peft(tmp_path, **settings)
    with torch.no_grad():
        peft.get_output_embeddings().weight[3, 5] += 0.25
    peft.save_pretrained(tmp_path, save_embedding_layers=settings.get("embeddings", "auto"))
    with pytest.raises(
        RloraError, match=r"lm_head\.weight is embeddings .* differs by up to 0\.25 .* was trained"
    ) as raised:
        start(tmp_path)
    assert str(raised.value).startswith(f"learner.start_from = '{tmp_path}'")
    assert "merge_and_unload" in str(raised.value)


def test_resized_embeddings_are_refused_as_such(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, embeddings=True, size=101)
    with pytest.raises(
        RloraError, match=r"is embeddings .* shape \[101, 64\] differs from .* \[97, 64\], so it was resized"
    ):
        start(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["norm"]}, "norm.weight is a weight of the model (modules_to_save)"),
        ({"use_dora": True}, "use_dora = True can't be loaded"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices = "),
    ],
)
def test_what_else_was_trained_beside_an_adapter_is_named(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    peft = saved_by_peft(tmp_path, **settings)
    for name, parameter in peft.named_parameters():
        if "norm" in name:
            parameter.data += 1.0
    peft.save_pretrained(tmp_path)
    with pytest.raises(RloraError, match=re.escape(message)):
        start(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("layers.0.self_attn.q_proj.lora_magnitude_vector", "a magnitude vector of DoRA"),
        ("embed_tokens.lora_embedding_A", "LoRA over embeddings"),
        ("embed_tokens.token_adapter.trainable_tokens_delta", "trained embeddings of single tokens"),
        ("layers.0.self_attn.q_proj.lora_B.bias", "a bias of B"),
        ("layers.0.self_attn.q_proj.base_layer.bias", "a bias of the model"),
        ("embed_tokens.weight", "embeddings "),
        ("layers.0.extra.weight", "a weight of the model"),
    ],
)
def test_the_error_names_the_kind_of_a_tensor_that_is_neither_a_nor_b(name: str, kind: str) -> None:
    config, _ = encode(adapted(tiny_model("llama"), Spec()), "run", "base")
    weights = safetensors.torch.save({f"base_model.model.model.{name}": torch.zeros(2)})
    with pytest.raises(RloraError, match=f"neither A nor B of a weight matrix: it is {kind}"):
        decode(config, weights)
