import pytest
import torch

from rlora.core import logprobs as head
from rlora.core.logprobs import logprobs_and_entropies, token_logprobs
from rlora.records import Kept


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("biased", [False, True])
def test_chunks_give_the_plain_logprobs_and_gradients(
    monkeypatch: pytest.MonkeyPatch, temperature: float, biased: bool
) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(10, 6, requires_grad=True), torch.randn(50, 6), torch.randint(50, (10,))
    bias = torch.randn(50) if biased else None
    monkeypatch.setattr(head, "LOGITS", {"cpu": 150})  # three tokens at a time, and one at the end
    actual = token_logprobs(hidden, weight, bias, targets, temperature)
    plain = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)[range(10), targets]
    torch.testing.assert_close(actual, plain)
    weights = torch.randn(10)
    (gradient,) = torch.autograd.grad((actual * weights).sum(), hidden)
    (expected,) = torch.autograd.grad((plain * weights).sum(), hidden)
    torch.testing.assert_close(gradient, expected)


def test_gradients_hold_against_finite_differences() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight, targets = torch.randn(7, 3, dtype=torch.float64), torch.randint(7, (4,))
    logprobs = token_logprobs(hidden, weight, None, targets, 0.9).double()
    step = 1e-3  # logprobs are fp32
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    for i in range(4):
        for j in range(3):
            moved = hidden.detach().clone()
            moved[i, j] += step
            change = token_logprobs(moved, weight, None, targets, 0.9).double() - logprobs
            assert change.sum().item() / step == pytest.approx(gradient[i, j].item(), abs=2e-3)


def test_a_sure_token_keeps_its_gradient_in_16_bits() -> None:
    """At p = 0.999 W[target] and p W agree in nearly all digits, and their difference is the gradient."""
    torch.manual_seed(0)
    weight = torch.randn(300, 64).bfloat16()
    targets = torch.arange(20)
    hidden = (weight[targets] * 0.25).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    plain = torch.nn.functional.linear(exact, weight.double()).log_softmax(-1)[range(20), targets]
    assert plain.exp().median() > 0.998
    (expected,) = torch.autograd.grad(plain.sum(), exact)
    (gradient,) = torch.autograd.grad(token_logprobs(hidden, weight, None, targets).sum(), hidden)
    error = (gradient - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 0.05


def test_entropies_and_their_gradients_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(10, 6, requires_grad=True), torch.randn(50, 6), torch.randint(50, (10,))
    monkeypatch.setattr(head, "LOGITS", {"cpu": 150})
    logprobs, entropies = logprobs_and_entropies(hidden, weight, None, None, targets, 0.7)
    torch.testing.assert_close(logprobs, token_logprobs(hidden, weight, None, targets, 0.7))
    plain = torch.distributions.Categorical(logits=torch.nn.functional.linear(hidden, weight) / 0.7).entropy()
    torch.testing.assert_close(entropies, plain)
    gradient, expected = (torch.autograd.grad(x.sum(), hidden, retain_graph=True)[0] for x in (entropies, plain))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("entropies", [False, True])
def test_probabilities_over_a_part_of_the_vocabulary(entropies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, in chunks of two targets; a target without kept tokens has the whole vocabulary."""
    monkeypatch.setitem(head.LOGITS, "cpu", 2 * 11)
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 6, requires_grad=True), torch.randn(11, 6)
    targets, kept = torch.tensor([3, 0, 10, 5, 5]), [[3, 4], [], [10], [1, 5, 9], []]
    ids = torch.tensor([token for part in kept for token in part], dtype=torch.int32).numpy().tobytes()
    support = head.support_of([Kept(ids, tuple(map(len, kept)))], torch.device("cpu"))
    mask = torch.tensor([[not part or token in part for token in range(11)] for part in kept])
    expected = (hidden @ weight.T / 0.7).masked_fill(~mask, -torch.inf).log_softmax(1)
    wanted = expected.gather(1, targets[:, None])[:, 0]
    if entropies:
        found, entropy = logprobs_and_entropies(hidden, weight, None, None, targets, 0.7, support)
        by_hand = -(expected.exp() * expected.masked_fill(~mask, 0)).sum(1)
        torch.testing.assert_close(entropy, by_hand)
    else:
        found = token_logprobs(hidden, weight, None, targets, 0.7, support)
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found.sum(), hidden, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), hidden)[0])
    assert found[2] == 0  # the only token
