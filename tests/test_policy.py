import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from rlora.batch import Microbatch, microbatches
from rlora.policy import Policy
from rlora.records import Group, RloraError


def naive_logprobs(policy: Policy, groups: list[Group], temperature: float) -> torch.Tensor:
    """Row by row, with no packing and no sharing."""
    rows = []
    for group in sorted(groups, key=lambda g: max(len(e.completion_ids) for e in g.episodes)):
        for episode in group.episodes:
            if group.informative and episode.completion_ids:
                ids = torch.tensor([group.prompt.token_ids + episode.completion_ids])
                logprobs = (policy.base(ids).logits[0] / temperature).log_softmax(-1)
                start = len(group.prompt.token_ids)
                rows.append(logprobs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0])
    return torch.cat(rows)


@pytest.fixture
def policy(tiny_base: PreTrainedModel) -> Policy:
    policy = Policy(tiny_base, rank=2, alpha=32.0, seed=0)
    for layer in policy.layers.values():
        layer.lora_B.data.normal_(std=0.1)
    return policy


@pytest.fixture
def batch(groups: list[Group]) -> Microbatch:
    (batch,) = microbatches(groups, 100, torch.float32, torch.device("cpu"))
    return batch


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_shared_prompts_give_the_plain_logprobs_and_gradients(
    policy: Policy, batch: Microbatch, groups: list[Group], temperature: float
) -> None:
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    packed, plain = policy.logprobs(batch, temperature), naive_logprobs(policy, groups, temperature)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(plain))
    packed_gradient = torch.autograd.grad((packed * weights).sum(), parameters)
    plain_gradient = torch.autograd.grad((plain * weights).sum(), parameters)
    for ours, expected in zip(packed_gradient, plain_gradient, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_prompts_of_one_token_share_nothing_and_work(policy: Policy) -> None:
    from conftest import episode, group

    single = [group([5], episode([6, 7], 1.0), episode([8], 0.0))]
    (batch,) = microbatches(single, 100, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(policy.logprobs(batch), naive_logprobs(policy, single, 1.0), atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_gives_exactly_the_base_logits(tiny_base: PreTrainedModel) -> None:
    ids = torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = tiny_base(ids).logits
        policy = Policy(tiny_base, rank=1, alpha=32.0, seed=0)
        assert policy.base(ids).logits.equal(before)
        for layer in policy.layers.values():
            layer.lora_B.data.normal_(std=0.1)
        assert not policy.base(ids).logits.equal(before)
        with policy.adapter_off():
            assert policy.base(ids).logits.equal(before)


def test_a_base_that_caps_its_logits_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=1.0, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(RloraError, match="Gemma2ForCausalLM does more with its logits"):
        Policy(Gemma2ForCausalLM(config), 1, 32.0, 0)


def test_a_context_longer_than_the_attention_window_is_refused(batch: Microbatch) -> None:
    config = MistralConfig(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=7,
    )  # fmt: skip
    assert Policy(MistralForCausalLM(config), 1, 32.0, 0).logprobs(batch).isfinite().all()  # 5 + 2 tokens
    config.sliding_window = 6
    with pytest.raises(RloraError, match="attention sees 6 tokens, and a prompt and completion have 7"):
        Policy(MistralForCausalLM(config), 1, 32.0, 0).logprobs(batch)
