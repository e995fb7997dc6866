import math

import pytest
import torch
from torch import Tensor

from rlora.core.loss import (
    MAX_LOG_RATIO,
    importance,
    kl,
    ratio_of,
    sequence_log_ratio,
)
from rlora.core.objectives.cispo import clipped_weight
from rlora.core.objectives.clip import clipped
from rlora.core.objectives.critic import value_loss
from rlora.core.objectives.reinforce import reinforce

LENGTHS = torch.tensor([2, 1])


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log()


def test_surrogates_by_hand() -> None:
    ratio, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5, 9.0]), torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    assert reinforce(ratio, advantages).tolist() == [-1.5, 1.5, -0.5, 0.5, 9.0]
    assert clipped(ratio, advantages, 0.2, 0.3).tolist() == pytest.approx([-1.3, 1.5, -0.5, 0.8, 9.0])
    assert clipped(ratio, advantages, 0.2, 0.3, dual=3.0).tolist() == pytest.approx([-1.3, 1.5, -0.5, 0.8, 3.0])
    logprobs = torch.full((5,), -2.0)
    weighted = clipped_weight(ratio, logprobs, advantages, 0.2, 0.3)
    assert weighted.tolist() == pytest.approx([2.6, -2.6, 1.6, -1.6, -2.6])


def gradient(loss: object, start: Tensor) -> list[float]:
    """The gradient with respect to the current policy's logprobs, which equal those of the start policy."""
    assert callable(loss)
    logprobs = start.clone().requires_grad_()
    loss(logprobs).sum().backward()
    assert logprobs.grad is not None
    return logprobs.grad.tolist()


def test_on_policy_all_gradients_are_those_of_reinforce() -> None:
    start, advantages = logs(0.5, 0.1, 0.3), torch.tensor([1.0, 1.0, -2.0])
    plain = gradient(lambda x: -advantages * x, start)
    assert gradient(lambda x: reinforce(ratio_of(x - start), advantages), start) == pytest.approx(plain)
    assert gradient(lambda x: clipped((x - start).exp(), advantages, 0.2, 0.2, 3.0), start) == pytest.approx(plain)
    assert gradient(lambda x: clipped_weight((x - start).exp(), x, advantages, 0.2, 0.2), start) == pytest.approx(plain)
    by_episode = gradient(
        lambda x: clipped(sequence_log_ratio(x - start, LENGTHS).exp(), advantages, 3e-4, 4e-4), start
    )
    assert by_episode == pytest.approx(plain)  # both tokens of an episode have its advantage


def test_clipped_tokens_have_no_gradient_except_in_cispo() -> None:
    start, now = logs(0.1, 0.1), logs(0.4, 0.01)
    advantages = torch.tensor([1.0, -1.0])
    assert gradient(lambda x: clipped((x - start).exp(), advantages, 0.2, 0.2), now) == [0.0, 0.0]
    assert gradient(lambda x: clipped_weight((x - start).exp(), x, advantages, 0.2, 0.2), now) == pytest.approx(
        [-1.2, 0.8]
    )


def test_the_ratio_of_an_episode_is_the_geometric_mean_of_its_tokens() -> None:
    log_ratio = torch.tensor([1.0, 3.0, -1.0])
    assert sequence_log_ratio(log_ratio, LENGTHS).tolist() == [2.0, 2.0, -1.0]


def test_importance_by_hand() -> None:
    start, behaviour = logs(0.5, 0.5, 0.2).requires_grad_(), logs(0.5, 0.1, 0.4)
    assert importance(start, behaviour, LENGTHS, per_episode=False).tolist() == pytest.approx([1.0, 5.0, 0.5])
    assert importance(start, behaviour, LENGTHS, per_episode=True).tolist() == pytest.approx([5.0, 5.0, 0.5])
    assert not importance(start, behaviour, LENGTHS, per_episode=False).requires_grad


def test_kl_by_hand() -> None:
    p, q = logs(0.25, 0.2), logs(0.5, 0.1)
    d = [-math.log(2), math.log(2)]
    assert kl(p, q, "k1").tolist() == pytest.approx(d)
    assert kl(p, q, "k2").tolist() == pytest.approx([x * x / 2 for x in d])
    assert kl(p, q, "k3").tolist() == pytest.approx([2 - 1 - math.log(2), 0.5 - 1 + math.log(2)])


def test_k1_and_k3_are_unbiased_and_k3_never_negative() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    exact = (p * (p / q).log()).sum().item()
    for estimator in ("k1", "k3"):
        assert (p * kl(p.log(), q.log(), estimator)).sum().item() == pytest.approx(exact, rel=1e-5)  # type: ignore[arg-type]
    assert (kl(torch.randn(1000, dtype=torch.float64), torch.zeros(1000), "k3") >= 0).all()


def test_the_gradient_of_k2_is_that_of_the_kl() -> None:
    logits, q = torch.tensor([0.3, -0.2, 0.5], requires_grad=True), torch.tensor([0.5, 0.3, 0.2])
    p = logits.softmax(0)
    (exact,) = torch.autograd.grad((p * (p / q).log()).sum(), logits, retain_graph=True)
    sampled = (p.detach() * kl(p.log(), q.log(), "k2")).sum()  # the mean over tokens of p
    (estimated,) = torch.autograd.grad(sampled, logits)
    torch.testing.assert_close(estimated, exact)


def test_value_loss_by_hand() -> None:
    values, previous, returns = (
        torch.tensor([2.0, 0.1, -1.0]),
        torch.tensor([0.0, 0.0, 0.0]),
        torch.tensor([1.0, 1.0, -1.0]),
    )
    assert value_loss(values, previous, returns, 0.0).tolist() == pytest.approx([0.5, 0.405, 0.0])
    # Clipped to 0.5, 0.1 and -0.5; the larger error counts.
    assert value_loss(values, previous, returns, 0.5).tolist() == pytest.approx([0.5, 0.405, 0.125])


FAR_AWAY = [sign * size for size in (21.0, 89.0, 100.0, 150.0, 1000.0, 1e5) for sign in (1.0, -1.0)]
ORDINARY = torch.cat(
    [torch.linspace(-MAX_LOG_RATIO, MAX_LOG_RATIO, 4001), torch.randn(4000, generator=torch.Generator().manual_seed(0))]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_far_token_has_a_finite_ratio_and_a_gradient_of_the_right_sign(dtype: torch.dtype) -> None:
    far = torch.tensor(FAR_AWAY, dtype=dtype)
    for advantage in (1.0, -1.0):
        slope = torch.tensor(gradient(lambda x, a=advantage: reinforce(ratio_of(x), torch.full_like(x, a)), far))
        assert ratio_of(far).isfinite().all()
        assert slope.isfinite().all()
        assert (slope[far > 0] * advantage < 0).all()  # REINFORCE raises log p where A > 0
        assert (slope[far < 0].abs() < 1e-8).all()  # a ratio of 0
    kls = {estimator: torch.tensor(gradient(lambda x, e=estimator: kl(x, 0 * x, e), far)) for estimator in ("k2", "k3")}
    for slope in kls.values():
        assert slope.isfinite().all()
        assert (slope.sign() == far.float().sign()).all()  # towards the other policy
    assert kl(far, 0 * far, "k3").isfinite().all()


def test_a_far_token_that_is_clipped_has_no_gradient() -> None:
    far, ones = torch.tensor([100.0, 1000.0, -100.0, -1000.0]), torch.ones(4)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert gradient(lambda x: clipped(ratio_of(x), advantages, 0.2, 0.2), far) == [0.0] * 4
    dual = gradient(lambda x: clipped(ratio_of(x), -ones, 0.2, 0.2, dual=3.0), far[:2].repeat(2))
    assert dual == [0.0] * 4
    weighted = gradient(lambda x: clipped_weight(ratio_of(x - x.detach() + far), x, ones, 1.0, 4.0), -ones)
    assert weighted == pytest.approx([-5.0, -5.0, 0.0, 0.0])
    episodes = gradient(
        lambda x: clipped(ratio_of(sequence_log_ratio(x, LENGTHS)), torch.ones(3), 3e-4, 4e-4),
        torch.tensor([300.0, 0.0, 0.0]),
    )
    assert episodes == [0.0, 0.0, -1.0]  # the other episode is learned from


def test_a_far_value_has_a_finite_gradient() -> None:
    values, previous, returns = torch.tensor([1e6, -1e6]), torch.zeros(2), torch.tensor([-1e6, 1e6])
    assert gradient(lambda x: value_loss(x, previous, returns, 0.2), values) == [2e6, -2e6]
    assert gradient(lambda x: value_loss(x, previous, -returns, 0.2), values) == [
        0.0,
        0.0,
    ]  # the clipped error is larger


def test_the_importance_ratio_is_finite() -> None:
    start, behaviour = torch.tensor([-1.0, -1000.0, -1.0]), torch.tensor([-1000.0, -1.0, -1.0])
    for per_episode in (False, True):
        assert importance(start, behaviour, LENGTHS, per_episode).isfinite().all()
    assert importance(start, behaviour, LENGTHS, per_episode=False)[1] == 0
    assert kl(behaviour, start, "k3").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_ratios_keep_every_bit(dtype: torch.dtype) -> None:
    """Values and gradients stay the same bit for bit, so that old runs replay."""
    ordinary = ORDINARY.to(dtype)
    pairs = [
        (lambda x: x.exp(), ratio_of),
        (lambda x: (-x).expm1() + x, lambda x: kl(x, torch.zeros_like(x), "k3")),
        (
            lambda x: clipped(x.exp(), torch.ones_like(x), 0.2, 0.2),
            lambda x: clipped(ratio_of(x), torch.ones_like(x), 0.2, 0.2),
        ),
    ]
    for plain, bounded in pairs:
        assert torch.equal(plain(ordinary), bounded(ordinary))
        assert gradient(plain, ordinary) == gradient(bounded, ordinary)
