import math
from dataclasses import replace

import pytest
import torch
from conftest import lessons, stir
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from rlora.core import attention
from rlora.core.batch import Microbatch, idle, microbatches
from rlora.core.lora import Route, Spec
from rlora.core.policy import Policy
from rlora.records import OFF, Group, RloraError


def _longest(group: Group) -> int:
    return max(len(episode.completion_ids) for episode in group.episodes)


def naive_logprobs(policy: Policy, groups: list[Group], temperature: float) -> torch.Tensor:
    """Row by row, with no packing and no sharing."""
    rows = []
    for group in sorted(groups, key=_longest):
        for episode in group.episodes:
            if group.informative and episode.completion_ids:
                ids = torch.tensor([group.prompt.token_ids + episode.completion_ids])
                logprobs = (policy.base(ids).logits[0] / temperature).log_softmax(-1)
                start = len(group.prompt.token_ids)
                rows.append(logprobs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0])
    return torch.cat(rows)


def assert_plain(policy: Policy, batch: Microbatch, groups: list[Group], temperature: float) -> None:
    """Logprobs and gradients of the packed row are those of its episodes row by row."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    packed, plain = policy.logprobs(batch, temperature), naive_logprobs(policy, groups, temperature)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(plain))
    packed_gradient = torch.autograd.grad((packed * weights).sum(), parameters)
    plain_gradient = torch.autograd.grad((plain * weights).sum(), parameters)
    for ours, expected in zip(packed_gradient, plain_gradient, strict=True):
        torch.testing.assert_close(ours, expected, atol=5e-4, rtol=1e-4)


@pytest.fixture
def policy(tiny_base: PreTrainedModel) -> Policy:
    policy = Policy(tiny_base, [Spec(2)], seed=0)
    stir(policy.bank)
    return policy


@pytest.fixture
def batch(groups: list[Group]) -> Microbatch:
    (batch,) = microbatches(lessons(groups), 100, torch.float32, torch.device("cpu"))
    return batch


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_shared_prompts_give_the_plain_logprobs_and_gradients(
    policy: Policy, batch: Microbatch, groups: list[Group], temperature: float
) -> None:
    assert_plain(policy, batch, groups, temperature)


def test_activations_computed_again_give_the_same_gradients(tiny: str, groups: list[Group]) -> None:
    def gradients(checkpointing: bool) -> tuple[int, tuple[torch.Tensor, ...]]:
        """How many numbers the forward pass keeps, and the gradients."""
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        policy = Policy(base, [Spec(2), Spec(1)], 0, checkpointing)
        stir(policy.bank)
        owners = [0, 0, 1]  # two adapters in a row: each layer has to remember whose tokens it had
        (batch,) = microbatches(lessons(groups, owners), 100, torch.float32, torch.device("cpu"))
        kept: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprobs = policy.logprobs(batch)
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        return sum(kept), torch.autograd.grad(logprobs.sum(), parameters)

    (all_kept, expected), (few_kept, computed_again) = gradients(False), gradients(True)
    assert few_kept < all_kept / 2
    assert all(ours.equal(theirs) for ours, theirs in zip(computed_again, expected, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_adapted_head_gives_the_plain_logprobs_and_gradients(
    tiny_base: PreTrainedModel, batch: Microbatch, groups: list[Group], temperature: float
) -> None:
    policy = Policy(tiny_base, [Spec(2, head=True)], seed=0)
    stir(policy.bank)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert len(parameters) == 2 * (2 * 7 + 1)
    assert_plain(policy, batch, groups, temperature)


@pytest.mark.parametrize("head", [False, True])
def test_an_idle_row_reaches_every_layer_and_teaches_nothing(tiny_base: PreTrainedModel, head: bool) -> None:
    policy = Policy(tiny_base, [Spec(2, head=head)], seed=0)
    stir(policy.bank)
    logprobs = policy.logprobs(idle(torch.float32, torch.device("cpu")))
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_tied_head_is_refused(tiny_base: PreTrainedModel) -> None:
    tiny_base.get_output_embeddings().weight = tiny_base.get_input_embeddings().weight
    with pytest.raises(RloraError, match=r"learner\.head = true: the output head of LlamaForCausalLM is its embedding"):
        Policy(tiny_base, [Spec(head=True)], seed=0)


@pytest.mark.parametrize("head", [False, True])
def test_groups_of_several_adapters_share_a_row(tiny_base: PreTrainedModel, groups: list[Group], head: bool) -> None:
    policy = Policy(tiny_base, [Spec(1, head=head), Spec(3), Spec(2, 8.0, head=head)], seed=0)
    stir(policy.bank)
    owners = [2, 1, 0]
    (batch,) = microbatches(lessons(groups, owners), 100, torch.float32, torch.device("cpu"))
    together = policy.logprobs(batch)
    apart = []
    for index, group in enumerate(groups):
        for single in microbatches(
            lessons([group], owners[index : index + 1]), 100, torch.float32, torch.device("cpu")
        ):
            apart.append((_longest(group), policy.logprobs(single)))
    apart.sort(key=lambda each: each[0])
    torch.testing.assert_close(together, torch.cat([logprobs for _, logprobs in apart]), atol=1e-5, rtol=1e-5)
    reference = policy.logprobs(replace(batch, adapters=OFF))
    with policy.bank.serving(Route(OFF)):
        torch.testing.assert_close(reference, naive_logprobs(policy, groups, 1.0), atol=1e-5, rtol=1e-5)


def test_prompts_of_one_token_share_nothing_and_work(policy: Policy) -> None:
    from conftest import episode, group

    single = [group([5], episode([6, 7], 1.0), episode([8], 0.0))]
    (batch,) = microbatches(lessons(single), 100, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(policy.logprobs(batch), naive_logprobs(policy, single, 1.0), atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_gives_exactly_the_base_logits(tiny_base: PreTrainedModel) -> None:
    ids = torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = tiny_base(ids).logits
        policy = Policy(tiny_base, [Spec()], seed=0)
        assert policy.base(ids).logits.equal(before)
        stir(policy.bank)
        assert not policy.base(ids).logits.equal(before)
        with policy.bank.serving(Route(OFF)):
            assert policy.base(ids).logits.equal(before)


def test_a_base_that_caps_its_logits_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=1.0, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(RloraError, match="Gemma2ForCausalLM does more with its logits"):
        Policy(Gemma2ForCausalLM(config), [Spec()], 0)


def test_a_context_longer_than_the_attention_window_is_refused(batch: Microbatch) -> None:
    config = MistralConfig(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=7,
    )  # fmt: skip
    assert Policy(MistralForCausalLM(config), [Spec()], 0).logprobs(batch).isfinite().all()  # 5 + 2 tokens
    config.sliding_window = 6
    with pytest.raises(RloraError, match="attention sees 6 tokens, and a prompt and completion have 7"):
        Policy(MistralForCausalLM(config), [Spec()], 0).logprobs(batch)


@pytest.mark.parametrize("held", [2**20, 40, 1])
@pytest.mark.parametrize("biases", [1, 4])
def test_attention_computed_again_has_the_gradients_of_autograd(
    monkeypatch: pytest.MonkeyPatch, held: int, biases: int
) -> None:
    """Whole, some pairs of a sequence and a key's heads at a time, and a single row of one at a time."""
    monkeypatch.setattr(attention, "_SCORES", held)
    torch.manual_seed(0)
    B, H, K, T, S, D = 4, 6, 2, 5, 7, 3
    q, k, v = (torch.randn(B, heads, n, D).double().requires_grad_() for heads, n in ((H, T), (K, S), (K, S)))
    bias = torch.randn(biases, 1, T, S).double().masked_fill_(torch.ones(T, S).tril(2) == 0, -math.inf)
    seen = torch.randn(B, H, T, D).double()

    def gradients(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((out * seen).sum(), (q, k, v))

    plain = (q.view(B, K, H // K, T, D) @ k[:, :, None].mT * 0.7 + bias[:, :, None]).softmax(-1) @ v[:, :, None]
    expected = gradients(plain.view(B, H, T, D))
    found = gradients(attention._attention(q, k, v, bias, 0.7))
    for gradient, autograd in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, autograd, rtol=1e-10, atol=1e-10)


def test_large_keys_cost_no_digits_in_16_bits() -> None:
    """Some models' keys share a large part, which shifts all scores of a query and should change nothing."""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(2, 2, 16, 128).bfloat16() for _ in range(4))
    shifted = (k + 30 * torch.randn(128).bfloat16()).requires_grad_()
    bias = torch.zeros(1, 1, 16, 16).masked_fill_(torch.ones(16, 16).tril() == 0, -math.inf).bfloat16()
    (got,) = torch.autograd.grad((attention._attention(q, shifted, v, bias, 0.1) * d_out).sum(), shifted)
    exact = shifted.detach().double().requires_grad_()
    plain = (q.double() @ exact.mT * 0.1 + bias).softmax(-1) @ v.double()
    (expected,) = torch.autograd.grad((plain * d_out).sum(), exact)
    assert (got - expected).norm() < 0.02 * expected.norm()
