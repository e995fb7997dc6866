import math

import pytest
import torch
from conftest import episode, group, samples, stir
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from rlora.core import attention
from rlora.core.batch import Microbatch, Sample, empty_batch, microbatches, sample_of
from rlora.core.lora import Spec
from rlora.core.loss import Tokens
from rlora.core.policy import Policies
from rlora.records import Group, RloraError


def _longest(group: Group) -> int:
    return max(len(episode.completion_ids) for episode in group.episodes)


def with_adapter(base: PreTrainedModel, spec: Spec, checkpointing: bool = False) -> Policies:
    """A base with the adapter "run", whose B is random."""
    policies = Policies(base, checkpointing)
    policies.add("run", spec, seed=0)
    stir(policies.bank)
    return policies


def logits_of(policies: Policies, ids: torch.Tensor, name: str | None = "run") -> torch.Tensor:
    with policies.bank.serving(name):
        logits: torch.Tensor = policies.base(ids).logits
    return logits


def naive_logprobs(policy: Policies, groups: list[Group], temperature: float) -> torch.Tensor:
    """Logprobs episode by episode, without packing and shared prompts."""
    rows = []
    for scored in sorted(groups, key=_longest):
        prompt = scored.prompt.token_ids
        for completion in [completed.completion_ids for completed in scored.episodes]:
            if scored.informative and completion:
                ids = torch.tensor([prompt + completion])
                logprobs = (logits_of(policy, ids)[0] / temperature).log_softmax(-1)
                start = len(prompt)
                rows.append(logprobs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0])
    return torch.cat(rows)


def assert_plain(policy: Policies, batch: Microbatch, groups: list[Group], temperature: float) -> None:
    """The packed row has the logprobs and gradients of its episodes one by one."""
    parameters = list(policy.parameters_of("run").values())
    packed, plain = policy.logprobs(batch, "run", temperature), naive_logprobs(policy, groups, temperature)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(plain))
    packed_gradient = torch.autograd.grad((packed * weights).sum(), parameters)
    plain_gradient = torch.autograd.grad((plain * weights).sum(), parameters)
    for actual, expected in zip(packed_gradient, plain_gradient, strict=True):
        torch.testing.assert_close(actual, expected, atol=5e-4, rtol=1e-4)


@pytest.fixture
def policy(tiny_base: PreTrainedModel) -> Policies:
    return with_adapter(tiny_base, Spec(2))


@pytest.fixture
def batch(groups: list[Group]) -> Microbatch:
    (batch,) = microbatches(samples(groups), 100, torch.float32, torch.device("cpu"))
    return batch


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_shared_prompts_give_the_plain_logprobs_and_gradients(
    policy: Policies, batch: Microbatch, groups: list[Group], temperature: float
) -> None:
    assert_plain(policy, batch, groups, temperature)


def test_recomputed_activations_give_the_same_gradients(tiny: str, groups: list[Group]) -> None:
    def gradients(checkpointing: bool) -> tuple[int, tuple[torch.Tensor, ...]]:
        """The number of values that the forward pass keeps, and the gradients."""
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        policy = with_adapter(base, Spec(2), checkpointing)
        (batch,) = microbatches(samples(groups), 100, torch.float32, torch.device("cpu"))
        kept: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logprobs = policy.logprobs(batch, "run")
        parameters = list(policy.parameters_of("run").values())  # the adapter is no longer served here
        return sum(kept), torch.autograd.grad(logprobs.sum(), parameters)

    (all_kept, expected), (few_kept, recomputed) = gradients(False), gradients(True)
    assert few_kept < all_kept / 2
    assert all(a.equal(b) for a, b in zip(recomputed, expected, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_adapted_head_gives_the_plain_logprobs_and_gradients(
    tiny_base: PreTrainedModel, batch: Microbatch, groups: list[Group], temperature: float
) -> None:
    policy = with_adapter(tiny_base, Spec(2, head=True))
    parameters = list(policy.parameters_of("run").values())
    assert len(parameters) == 2 * (2 * 7 + 1)
    assert_plain(policy, batch, groups, temperature)


@pytest.mark.parametrize("head", [False, True])
def test_an_empty_row_reaches_every_layer_and_has_zero_gradients(tiny_base: PreTrainedModel, head: bool) -> None:
    policy = with_adapter(tiny_base, Spec(2, head=head))
    logprobs = policy.logprobs(empty_batch(torch.float32, torch.device("cpu")), "run")
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    gradients = [parameter.grad for parameter in policy.parameters_of("run").values()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_tied_head_is_refused(tiny_base: PreTrainedModel) -> None:
    tiny_base.get_output_embeddings().weight = tiny_base.get_input_embeddings().weight
    with pytest.raises(RloraError, match=r"learner\.head = true: the output head of LlamaForCausalLM is tied to its"):
        with_adapter(tiny_base, Spec(head=True))


def test_targets_are_free(policy: Policies) -> None:
    """Any index, in prompt or completion, may predict any token, and several tokens."""
    prompt, completion = (5, 6, 7), (8, 9, 10)
    predictors, targets = (0, 1, 1, 3, 5), (20, 30, 31, 40, 50)
    zeros = torch.zeros(5)
    free = Sample(prompt, completion, predictors, targets, Tokens(zeros, zeros, zeros))
    ordinary = sample_of(prompt, episode([8, 1]))
    (row,) = microbatches([[free, ordinary]], 100, torch.float32, torch.device("cpu"))
    logprobs = policy.logprobs(row, "run")
    expected = logits_of(policy, torch.tensor([[*prompt, *completion]]))[0].log_softmax(-1)[predictors, targets]
    torch.testing.assert_close(logprobs[:5], expected, atol=1e-5, rtol=1e-5)
    alone = logits_of(policy, torch.tensor([[*prompt, 8]]))[0].log_softmax(-1)[[2, 3], [8, 1]]
    torch.testing.assert_close(logprobs[5:], alone, atol=1e-5, rtol=1e-5)


def test_without_an_adapter_it_is_the_reference_policy(
    policy: Policies, batch: Microbatch, groups: list[Group]
) -> None:
    reference = policy.logprobs(batch, None)
    policy.bank.remove("run")
    torch.testing.assert_close(reference, naive_logprobs(policy, groups, 1.0), atol=1e-5, rtol=1e-5)


def test_prompts_of_one_token_share_nothing_and_work(policy: Policies) -> None:
    single = [group([5], episode([6, 7], 1.0), episode([8], 0.0))]
    (batch,) = microbatches(samples(single), 100, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(policy.logprobs(batch, "run"), naive_logprobs(policy, single, 1.0), atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_gives_exactly_the_base_logits(tiny_base: PreTrainedModel) -> None:
    ids = torch.randint(97, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = tiny_base(ids).logits
        policy = Policies(tiny_base)
        policy.add("run", Spec(), seed=0)
        assert logits_of(policy, ids).equal(before)
        stir(policy.bank)
        assert not logits_of(policy, ids).equal(before)
        assert logits_of(policy, ids, None).equal(before)


def test_a_base_that_caps_its_logits_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=1.0, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(RloraError, match="Gemma2ForCausalLM changes its logits after the output head"):
        Policies(Gemma2ForCausalLM(config))


def test_a_context_longer_than_the_attention_window_is_refused(batch: Microbatch) -> None:
    config = MistralConfig(
        vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=7,
    )  # fmt: skip
    assert Policies(MistralForCausalLM(config)).logprobs(batch, None).isfinite().all()  # 5 + 2 tokens
    config.sliding_window = 6
    with pytest.raises(RloraError, match="window has 6 tokens, but a prompt with its completion can have 7"):
        Policies(MistralForCausalLM(config)).logprobs(batch, None)


@pytest.mark.parametrize("scores", [2**20, 40, 1])
@pytest.mark.parametrize("biases", [1, 4])
def test_recomputed_attention_has_the_gradients_of_autograd(
    monkeypatch: pytest.MonkeyPatch, scores: int, biases: int
) -> None:
    """Everything at once, some pairs of sequence and key head at a time, and one row of one pair at a time."""
    monkeypatch.setattr(attention, "_SCORES", scores)
    torch.manual_seed(0)
    B, H, K, T, S, D = 4, 6, 2, 5, 7, 3
    q, k, v = (torch.randn(B, heads, n, D).double().requires_grad_() for heads, n in ((H, T), (K, S), (K, S)))
    bias = torch.randn(biases, 1, T, S).double().masked_fill_(torch.ones(T, S).tril(2) == 0, -math.inf)
    d_out = torch.randn(B, H, T, D).double()

    def gradients(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((out * d_out).sum(), (q, k, v))

    plain = (q.view(B, K, H // K, T, D) @ k[:, :, None].mT * 0.7 + bias[:, :, None]).softmax(-1) @ v[:, :, None]
    expected = gradients(plain.view(B, H, T, D))
    actual = gradients(attention._attention(q, k, v, bias, 0.7))
    for gradient, autograd in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, autograd, rtol=1e-10, atol=1e-10)


def test_large_keys_cost_no_digits_in_16_bits() -> None:
    """In some models all keys share a large component, which shifts the scores of a query and must change nothing."""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(2, 2, 16, 128).bfloat16() for _ in range(4))
    shifted = (k + 30 * torch.randn(128).bfloat16()).requires_grad_()
    bias = torch.zeros(1, 1, 16, 16).masked_fill_(torch.ones(16, 16).tril() == 0, -math.inf).bfloat16()
    (gradient,) = torch.autograd.grad((attention._attention(q, shifted, v, bias, 0.1) * d_out).sum(), shifted)
    exact = shifted.detach().double().requires_grad_()
    plain = (q.double() @ exact.mT * 0.1 + bias).softmax(-1) @ v.double()
    (expected,) = torch.autograd.grad((plain * d_out).sum(), exact)
    assert (gradient - expected).norm() < 0.02 * expected.norm()
