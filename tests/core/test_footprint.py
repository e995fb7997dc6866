"""Memory counted on the meta device, compared with the memory that a real pass holds."""

from collections.abc import Callable

import pytest
import torch
from conftest import TINY_CONFIGS, tiny_model
from transformers import AutoConfig, PreTrainedConfig, Qwen3Config

from rlora.cards import GIB
from rlora.core.flash import check_heads
from rlora.core.footprint import (
    FRAGMENTED,
    Rows,
    cpu_rows,
    fitting_rows,
    footprint,
    forward_backward,
    largest_row,
    rows_for,
)
from rlora.core.lora import Spec
from rlora.core.policy import Policies
from rlora.device import Live
from rlora.records import RloraError
from rlora.settings import Config

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")
QWEN3_8B = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def large() -> PreTrainedConfig:
    return Qwen3Config(**QWEN3_8B)


def test_what_is_held_is_counted_once() -> None:
    outside = torch.zeros(1000)
    with Live() as live:
        x = torch.zeros(100)
        view = x[:10].view(2, 5)
        outside.add_(1.0).view(10, 100)
        assert live.now == 400
        y = x + 1
        del x
        assert live.now == 800  # the view keeps it alive
        del view, y
        assert (live.now, live.peak) == (0, 800)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_memory_as_much_is_counted_as_with(config: MakeConfig, kind: str, checkpointing: bool) -> None:
    """The same pass over real tensors, with the same counter."""
    settings = config(sampling={"max_tokens": 8, "max_prompt_tokens": 12}, group_size=3, learner={"rank": 2})
    base = AutoConfig.for_model(kind, **TINY_CONFIGS[kind])
    counted = footprint(settings, base, Rows(60, checkpointing), on_gpu=False)
    policies = Policies(tiny_model(kind), checkpointing)
    policies.add("run", Spec(2), seed=0)
    row = largest_row(settings, 60, CPU, on_gpu=False)
    assert len(row.input_ids) == 12 + 3 * 7 + 12 + 7  # a group, and a part of a second one; last tokens are not read
    with Live() as live:
        forward_backward(policies, "run", row)
    weights = policies.parameters_of("run").values()
    assert counted.adapter == 16 * sum(weight.numel() for weight in weights)
    activations = live.peak - sum(4 * weight.numel() for weight in weights)
    assert counted.per_row == pytest.approx(activations, rel=0.1)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_layers_are_counted_from_three(
    config: MakeConfig, kind: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoConfig.for_model(kind, **TINY_CONFIGS[kind] | {"num_hidden_layers": 7})
    counted = footprint(config(), base, Rows(60, checkpointing), on_gpu=True)
    monkeypatch.setattr("rlora.core.footprint._are_equal", lambda _: False)  # counts all seven
    assert footprint(config(), base, Rows(60, checkpointing), on_gpu=True) == counted


def test_the_tokens_that_top_k_kept_are_counted(config: MakeConfig) -> None:
    """Two int64 for each, and the mask of a chunk of logits while it is made."""
    base = AutoConfig.for_model("qwen3", **TINY_CONFIGS["qwen3"])
    settings = [
        config(sampling={"max_tokens": 8, "max_prompt_tokens": 12, "top_k": top_k}, group_size=3) for top_k in (0, 20)
    ]
    plain, kept = (footprint(each, base, Rows(60, False), on_gpu=True) for each in settings)
    targets = 3 * 8 + 8
    mask = targets * base.vocab_size
    assert 0 <= kept.activations - plain.activations - 16 * 20 * targets <= mask
    policies = Policies(tiny_model("qwen3"))
    policies.add("run", Spec(), seed=0)
    row = largest_row(settings[1], 60, CPU, on_gpu=False)
    assert row.support is not None
    assert len(row.support.ids) == 20 * targets
    forward_backward(policies, "run", row)


def test_experts_are_counted_as_if_few_were_met(config: MakeConfig) -> None:
    settings = config(sampling={"max_tokens": 8, "max_prompt_tokens": 12})
    base = AutoConfig.for_model("qwen3_moe", **TINY_CONFIGS["qwen3_moe"])
    counted = footprint(settings, base, Rows(60, False), on_gpu=False)
    policies = Policies(tiny_model("qwen3_moe"))
    policies.add("run", Spec(), seed=0)
    with Live() as live:
        forward_backward(policies, "run", largest_row(settings, 60, CPU, on_gpu=False))
    assert counted.per_row == pytest.approx(live.peak, rel=0.25)


def test_the_budget_of_8b(config: MakeConfig, large: PreTrainedConfig) -> None:
    """Compared with arithmetic by hand: 15.3 GiB for the base, 0.05 for the adapter, and 15 for rows of 2,048 tokens
    under masks with copied keys; varlen kernels need less."""
    settings = config(dtype="bfloat16", sampling={"max_tokens": 256, "max_prompt_tokens": 384})
    counted = footprint(settings, large, Rows(2048, False), on_gpu=True)
    assert counted.base / GIB == pytest.approx(15.3, rel=0.01)
    assert counted.adapter / GIB == pytest.approx(0.05, rel=0.25)
    assert 10 < counted.activations / GIB < 15
    checkpointed = footprint(settings, large, Rows(2048, True), on_gpu=True)
    assert checkpointed.activations < counted.activations / 4


def test_rows_on_a_cpu_are_as_they_were(config: MakeConfig) -> None:
    assert rows_for(config(), "", CPU) == Rows(2048, False)
    assert cpu_rows(config(learner={"microbatch_tokens": 64, "checkpointing": True})) == Rows(64, True)


def test_rows_on_a_gpu_are_the_largest_that_fit(config: MakeConfig) -> None:
    base = Qwen3Config(**QWEN3_8B | {"num_hidden_layers": 4})
    lengths = {"max_tokens": 1024, "max_prompt_tokens": 1024}

    def rows(budget: float, **learner: object) -> Rows:
        settings = config(dtype="bfloat16", sampling=lengths, learner=learner)
        return fitting_rows(settings, base, int(budget), "half of a card")

    def needed(tokens: int, checkpointing: bool) -> float:
        settings = config(dtype="bfloat16", sampling=lengths)
        memory = footprint(settings, base, Rows(tokens, checkpointing), on_gpu=True)
        return memory.fixed + FRAGMENTED * memory.per_row

    assert rows(1.01 * needed(8192, False)) == Rows(8192, False)
    assert rows(1.01 * needed(4096, False)) == Rows(4096, False)
    assert rows(1.01 * needed(16384, True), checkpointing=True) == Rows(16384, True)
    assert needed(2048, True) < 0.99 * needed(2048, False)
    assert rows(0.99 * needed(2048, False)).checkpointing
    assert rows(1.01 * needed(8192, True), checkpointing=True, microbatch_tokens=4096) == Rows(4096, True)
    too_little = 0.99 * needed(2048, True)
    assert rows(too_little, checkpointing=True, microbatch_tokens=8192) == Rows(8192, True)  # the user chose both
    with pytest.raises(RloraError, match=r"the learner needs \d\.\d GiB .*, half of a card.*rows of about \d+"):
        rows(too_little)
    with pytest.raises(RloraError, match=r"use a smaller model, a larger GPU, learner\.quantise"):
        rows(1 * GIB)


def test_more_is_held_of_a_base_that_is_trained(config: MakeConfig) -> None:
    base = AutoConfig.for_model("llama", **TINY_CONFIGS["llama"])
    settings = config(
        learner={"adapter": "none"}, dtype="bfloat16", sampling={"max_tokens": 8, "max_prompt_tokens": 12}
    )
    counted = footprint(settings, base, Rows(60, False), on_gpu=False)
    assert counted.adapter == pytest.approx(8 * counted.base, rel=0.01)  # 16 bytes per weight of 2 bytes


@pytest.mark.parametrize(("quantise", "least", "most"), [("int8", 0.5, 0.75), ("nf4", 0.28, 0.6)])
def test_a_base_in_few_bits_is_smaller(
    config: MakeConfig, large: PreTrainedConfig, quantise: str, least: float, most: float
) -> None:
    settings = config(dtype="bfloat16", sampling={"max_tokens": 8, "max_prompt_tokens": 12})
    full = footprint(settings, large, Rows(20, False), on_gpu=True).base
    small = config(
        dtype="bfloat16", learner={"quantise": quantise}, sampling={"max_tokens": 8, "max_prompt_tokens": 12}
    )
    assert least < footprint(small, large, Rows(20, False), on_gpu=True).base / full < most


def test_heads_that_no_kernel_takes_are_refused(large: PreTrainedConfig) -> None:
    check_heads(large)
    for size in (20, 264):
        with pytest.raises(RloraError, match=f"heads have {size} dimensions"):
            check_heads(Qwen3Config(**QWEN3_8B | {"head_dim": size}))
