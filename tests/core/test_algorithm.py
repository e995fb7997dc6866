"""Advantages, weights and losses per token, computed by hand."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations, product
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from conftest import episode, group, samples
from torch import Tensor

from rlora.config import validate
from rlora.core.advantage import centred, leave_one_out, standardised, whitened
from rlora.core.batch import Microbatch, Sample, microbatches, sample_of
from rlora.core.objectives import READY
from rlora.core.objectives.policy_gradient import PolicyGradient
from rlora.core.policy import Outputs
from rlora.core.update import _with_advantages, whiten
from rlora.records import Episode, Group
from rlora.settings import AlgorithmConfig

MAX_TOKENS = 8


def algorithm(name: str = "reinforce", **changes: Any) -> AlgorithmConfig:
    values = {"model": "-", "env": "-", "reward": "-", "sampling": {"max_tokens": MAX_TOKENS}}
    return validate(values | {"algorithm": {"name": name} | changes}).algorithm


def objective(name: str = "reinforce", **changes: Any) -> PolicyGradient:
    settings = algorithm(name, **changes)
    return READY[settings.loss](settings, MAX_TOKENS)


def credit(group: Group, samples: Sequence[Sample], objective: PolicyGradient) -> list[Sample]:
    advantages = objective.advantages(group, samples)
    return [_with_advantages(sample, tensor) for sample, tensor in zip(samples, advantages, strict=True)]


def token_losses(
    row: Microbatch, now: Tensor, entropies: Tensor | None, objective: PolicyGradient
) -> tuple[Tensor, Any]:
    """The loss of each token: the loss of a row in which all other tokens have weight 0."""
    losses = []
    for index in range(len(now)):
        weights = torch.zeros(len(now))
        weights[index] = 1.0
        weighted = replace(row, tokens=replace(row.tokens, weights=weights))
        loss, figures = objective.loss(Outputs(now, entropies), weighted)
        losses.append(loss)
    return torch.stack(losses), figures


def samples_of(group: Group, **values: Sequence[float]) -> list[Sample]:
    tensors = {name: torch.tensor(numbers) for name, numbers in values.items()}
    episodes = [episode for episode in group.episodes if episode.completion_ids]
    return [sample_of(group.prompt.token_ids, episode).with_tokens(**tensors) for episode in episodes]


def test_each_token_has_its_episodes_advantage_and_empty_episodes_count_for_the_mean() -> None:
    three = group([5], episode([6, 7], 1.0), episode([8], 0.0), episode([], 0.5))
    credited = credit(three, samples_of(three), objective())
    assert [sample.tokens.advantages.tolist() for sample in credited] == [[0.5, 0.5], [-0.5]]
    assert all(sample.tokens.returns is None for sample in credited)


def test_kl_in_the_reward_is_paid_by_the_episode_or_by_its_tokens() -> None:
    two = group([5], episode([6, 7], 1.0), episode([8, 9], 0.0))
    first, _ = samples_of(two, start_logprobs=[-1.0, -1.0], reference_logprobs=[-1.5, -3.0])
    _, second = samples_of(two, start_logprobs=[-1.0, -1.0], reference_logprobs=[-1.0, -1.0])
    settings = {"kl": 0.1, "kl_estimator": "k1"}
    by_episode = credit(two, [first, second], objective("rloo", **settings))
    assert by_episode[0].tokens.advantages.tolist() == pytest.approx([0.75, 0.75])  # 1 - 0.1 * 2.5
    by_token = credit(two, [first, second], objective("reinforce++", gamma=0.5, **settings))
    assert by_token[0].tokens.advantages.tolist() == pytest.approx([-0.05 + 0.5 * 0.8, 1 - 0.2])


@pytest.mark.parametrize(
    ("reason", "bootstrap", "last"), [("stop", True, 0.0), ("length", True, 0.7), ("length", False, 0.0)]
)
def test_gae_bootstraps_where_an_episode_was_cut_off(reason: str, bootstrap: bool, last: float) -> None:
    one = group([5], replace(episode([6, 7], 1.0), finish_reason=reason), episode([8], 0.0))
    sample = samples_of(one, values=[0.5, 0.25])[0]
    settings = objective("ppo", gamma=0.9, lam=0.5, truncated="bootstrap" if bootstrap else "learn")
    (credited,) = credit(one, [sample.with_tokens(end=torch.tensor([0.7]))], settings)
    second = 1 + 0.9 * last - 0.25
    first = 0.9 * 0.25 - 0.5 + 0.45 * second
    assert credited.tokens.advantages.tolist() == pytest.approx([first, second])
    assert credited.tokens.returns is not None
    assert credited.tokens.returns.tolist() == pytest.approx([first + 0.5, second + 0.25])


def test_an_overlong_completion_pays_more_and_more() -> None:
    settings = objective(overlong_tokens=4, overlong_penalty=0.5)
    returns = [settings.return_of(episode([6] * length, 1.0)) for length in (3, 4, 5, 8)]
    assert returns == [1.0, 1.0, 0.875, 0.5]


def cut_off(episode: Episode) -> Episode:
    return replace(episode, finish_reason="length")


def test_weights_by_hand() -> None:
    groups = [group([5], episode([6, 7, 8], 1.0), episode([9], 0.0)), group([5], cut_off(episode([6, 7], 1.0)))]

    def weights(**settings: Any) -> list[float]:
        weight = objective(**settings).weights(groups)
        return [weight(episode) for group in groups for episode in group.episodes]

    assert weights() == pytest.approx([1 / 6] * 3)
    assert weights(truncated="drop")[:2] == pytest.approx([1 / 4, 1 / 4])
    assert weights(average="episodes") == pytest.approx([1 / 9, 1 / 3, 1 / 6])
    assert weights(average="constant") == pytest.approx([1 / 24] * 3)


def test_tokens_of_a_tool_are_read_and_not_learned() -> None:
    called = replace(episode([6, 7, 8, 9], 1.0, [-1.0, 0.0, 0.0, -2.0]), sampled_mask=(True, False, False, True))
    two = group([5], called, episode([10, 11], 0.0))
    (row,) = microbatches(samples([two]), 100, torch.float32, torch.device("cpu"))
    assert row.input_ids.tolist() == [5, 6, 7, 8, 10]
    assert row.targets.tolist() == [6, 9, 10, 11]
    assert row.input_ids[row.predictors].tolist() == [5, 8, 5, 10]
    assert row.tokens.behaviour_logprobs.tolist() == [-1.0, -2.0, -1.0, -1.0]
    assert row.lengths.tolist() == [2, 2]
    with_end = [[sample.to_the_end() for sample in group] for group in samples([two])]
    (row,) = microbatches(with_end, 100, torch.float32, torch.device("cpu"))
    assert row.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert row.input_ids[row.predictors].tolist() == [5, 8, 9, 5, 10, 11]
    assert row.lengths.tolist() == [3, 3]
    assert objective().weights([two])(called) == 1 / 4


def test_a_tokens_loss_is_the_sum_of_its_terms() -> None:
    two = group([5], episode([6, 7], 1.0, [-2.0, -1.0]), episode([8], 0.0, [-4.0]))
    first, _ = samples_of(two, reference_logprobs=[-1.0, -1.0])
    _, second = samples_of(two, reference_logprobs=[-1.0])
    credited = credit(two, [first, second], objective())
    (row,) = microbatches([credited], 100, torch.float32, torch.device("cpu"))
    now, entropies = torch.tensor([-1.0, -1.5, -1.0]), torch.tensor([1.0, 2.0, 3.0])
    settings = objective(kl=0.1, kl_estimator="k2", entropy=0.01)
    losses, figures = token_losses(row, now, entropies, settings)
    # -A w + 0.1 (now - reference)^2 / 2 - 0.01 H, with w = min(exp(now - behaviour), 2)
    w = [2.0, torch.tensor(-0.5).exp().item(), 2.0]
    expected = [-0.5 * w[0] - 0.01, -0.5 * w[1] + 0.0125 - 0.02, 0.5 * w[2] - 0.03]
    assert losses.tolist() == pytest.approx(expected)
    assert figures["ratio_truncated"].tolist() == [True, False, True]
    assert figures["entropy"].tolist() == [1.0, 2.0, 3.0]
    assert token_losses(row, now, None, objective())[1]["entropy"].tolist() == [1.0, 1.5, 1.0]


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        ("token-truncate", [2.0, 0.5, 1.0]),
        ("token-mask", [0.0, 0.5, 1.0]),
        ("episode-truncate", [2.0, 2.0, 1.0]),
        ("episode-mask", [0.0, 0.0, 1.0]),
        ("none", [1.0, 1.0, 1.0]),
    ],
)
def test_the_importance_ratio_is_capped(correction: str, weights: list[float]) -> None:
    log_half = torch.tensor(0.5).log().item()
    two = group([5], episode([6, 7], 1.0, [-300.0, log_half + 0.1]), episode([8], 0.0, [-1.0]))
    (row,) = microbatches([samples_of(two)], 100, torch.float32, torch.device("cpu"))
    row = replace(row, tokens=replace(row.tokens, advantages=torch.ones(3)))
    now = torch.tensor([-1.0, 2 * log_half + 0.1, -1.0])  # ratios e^299, 1/2 and 1
    losses, figures = token_losses(row, now, None, objective(correction=correction))
    assert losses.tolist() == pytest.approx([-weight for weight in weights])
    assert figures["ratio_truncated"].tolist() == [True, correction.startswith("episode"), False]


NONE = {"correction": "none"}
ICEPOP = {"correction": "token-mask", "importance_floor": 0.5, "importance_cap": 5.0}


@pytest.mark.parametrize(
    ("settings", "weights", "outside"),
    [
        (ICEPOP, [0.0, 4.0, 0.0, 1.0], [True, False, True, False]),
        ({"correction": "episode-mask", "importance_floor": 0.5}, [1.6, 1.6, 0.0, 0.0], [False, False, True, True]),
        (NONE | {"geometric_mask": 0.3}, [1.0, 1.0, 0.0, 0.0], [False, True, True, True]),  # means 1.26 and 0.5
        (NONE | {"geometric_mask": 0.2}, [0.0, 0.0, 0.0, 0.0], [True, True, True, True]),
        (NONE | {"geometric_mask": 1.01}, [1.0, 1.0, 1.0, 1.0], [False, True, False, False]),
        ({"geometric_mask": 0.3}, [0.4, 2.0, 0.0, 0.0], [False, True, True, True]),  # beside each token's ratio
    ],
)
def test_ratios_outside_of_a_range_are_masked(
    settings: dict[str, Any], weights: list[float], outside: list[bool]
) -> None:
    two = group([5], episode([6, 7], 1.0, [-1.0, -2.0]), episode([8, 9], 0.0, [-1.0, -2.0]))
    (row,) = microbatches([samples_of(two)], 100, torch.float32, torch.device("cpu"))
    row = replace(row, tokens=replace(row.tokens, advantages=torch.ones(4)))
    now = (row.tokens.behaviour_logprobs + torch.tensor([0.4, 4.0, 0.25, 1.0]).log()).requires_grad_()
    losses, figures = token_losses(row, now, None, objective(**settings))
    assert losses.tolist() == pytest.approx([-weight for weight in weights])
    assert figures["ratio_truncated"].tolist() == outside
    losses.sum().backward()
    assert now.grad is not None
    assert (-now.grad).tolist() == pytest.approx(weights)


@pytest.mark.parametrize("settings", [ICEPOP, NONE | {"geometric_mask": 0.3}, {"correction": "episode-mask"}])
def test_a_token_whose_ratio_is_not_a_number_is_masked(settings: dict[str, Any]) -> None:
    two = group([5], episode([6], 1.0, [math.nan]), episode([8], 0.0, [-1.0]))
    (row,) = microbatches([samples_of(two)], 100, torch.float32, torch.device("cpu"))
    row = replace(row, tokens=replace(row.tokens, advantages=torch.ones(2)))
    losses, figures = token_losses(row, torch.tensor([-1.0, -1.0]), None, objective(**settings))
    assert losses.tolist() == [0.0, -1.0]
    assert figures["ratio_truncated"].tolist() == [True, False]


@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++"])
def test_on_policy_every_algorithm_has_the_gradient_of_its_advantages(name: str) -> None:
    two = group([5], episode([6, 7], 1.0, [-2.0, -1.0]), episode([8], 0.0, [-4.0]))
    credited = credit(two, samples_of(two), objective(name, kl=0))
    (row,) = microbatches([credited], 100, torch.float32, torch.device("cpu"))
    now = row.tokens.behaviour_logprobs.clone().requires_grad_()
    losses, _ = token_losses(row, now, None, objective(name, kl=0))
    losses.sum().backward()
    assert now.grad is not None
    assert (-now.grad).tolist() == pytest.approx(row.tokens.advantages.tolist())
    assert row.tokens.advantages.tolist()[0] > 0


CORRECTIONS = ["episode-truncate", "episode-mask", "none", "token-truncate", "token-mask"]
LOSSES = [(name, method) for name in ("reinforce", "grpo", "dapo", "cispo", "ppo") for method in CORRECTIONS]


@pytest.mark.parametrize(("name", "correction"), [*LOSSES, *(("gspo", method) for method in CORRECTIONS[:3])])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_finite_logprobs_have_finite_losses_gradients_and_figures(name: str, correction: str, estimator: str) -> None:
    """However far apart the current, start, behaviour and reference policies are."""
    far = [-1.0, -101.0, -1001.0]
    two = group([5], episode([6, 7, 8], 1.0, far), episode([9, 10, 11], 0.0, far[::-1]))
    logprobs = {"start_logprobs": far[1:] + far[:1], "reference_logprobs": far[::-1]}
    (row,) = microbatches([samples_of(two, **logprobs)], 100, torch.float32, torch.device("cpu"))
    settings = objective(name, kl=0.1, kl_estimator=estimator, correction=correction)
    for advantage in (1.0, -1.0, 0.0):
        credited = replace(row, tokens=replace(row.tokens, advantages=torch.full((6,), advantage)))
        for current in permutations(far):
            now = torch.tensor(current * 2, requires_grad=True)
            losses, figures = token_losses(credited, now, None, settings)
            losses.sum().backward()
            assert now.grad is not None
            assert now.grad.isfinite().all()
            assert losses.isfinite().all()
            assert all(figure.isfinite().all() for figure in figures.values())


def advantages(rewards: Sequence[float], **settings: Any) -> list[float]:
    scored = group([5], *(episode([6], reward) for reward in rewards))
    credited = credit(scored, samples_of(scored), objective(**settings))
    return [float(sample.tokens.advantages) for sample in credited]


@pytest.mark.parametrize(
    "rewards",
    [
        [20_000_000.0, 20_000_001.0],
        [10_000_000.0, 10_000_001.0],  # float32 holds both, but not their mean
        [-16_777_217.0, -16_777_216.0],
        [1e12, 1e12 + 1],
        [3.0, 3.0 + 1e-9],
        [0.0, 20_000_000.0, 20_000_001.0],
        [1.0, 1.0, 1.0 + 1e-12, 1.0],
    ],
)
def test_rewards_are_compared_in_the_64_bits_in_which_they_arrive(rewards: list[float]) -> None:
    mean = fmean(rewards)
    assert group([5], *(episode([6], reward) for reward in rewards)).informative
    centred = advantages(rewards, advantage="centred")
    assert centred == pytest.approx([reward - mean for reward in rewards], rel=1e-3)
    assert len(set(centred)) == len(set(rewards))
    count = len(rewards)
    left_out = [reward - (mean * count - reward) / (count - 1) for reward in rewards]
    assert advantages(rewards, advantage="leave-one-out") == pytest.approx(left_out, rel=1e-3, abs=1e-9 * abs(mean))
    std = stdev(rewards)
    standard = [(reward - mean) / (std + 1e-4) for reward in rewards]
    assert advantages(rewards, advantage="standardised") == pytest.approx(standard, rel=1e-3)


FLOAT32 = {"centred": centred, "standardised": standardised, "leave-one-out": leave_one_out}


@pytest.mark.parametrize("advantage", sorted(FLOAT32))
def test_ordinary_rewards_have_the_advantages_that_they_had_bit_for_bit(advantage: str) -> None:
    """Those in float32, with which old runs were recorded."""
    generator = random.Random(0)
    groups = [list(rewards) for count in range(2, 9) for rewards in product((0.0, 1.0), repeat=count)]
    groups += [list(rewards) for count in (3, 4) for rewards in product((-1.0, 0.0, 0.1, 0.5, 1.0, 2.0), repeat=count)]
    groups += [[round(generator.uniform(-1, 1), 3) for _ in range(8)] for _ in range(500)]
    for rewards in groups:
        expected = FLOAT32[advantage](torch.tensor(rewards)).tolist()
        assert advantages(rewards, advantage=advantage) == expected, rewards


def white(rewards: Sequence[Sequence[float]], **settings: Any) -> list[float]:
    """The whitened advantages of all tokens of a step; each group has these rewards."""
    groups = [group([5], *(episode([6, 7], reward) for reward in group_rewards)) for group_rewards in rewards]
    reinforce = objective("reinforce++", kl=0, **settings)
    credited = [credit(scored, samples_of(scored), reinforce) for scored in groups]
    whitened_samples, _ = whiten(credited, lambda sums: sums)
    tokens = [sample.tokens for group_samples in whitened_samples for sample in group_samples]
    assert all(item.advantages.dtype == torch.float32 for item in tokens)
    return torch.cat([item.advantages for item in tokens]).tolist()


@pytest.mark.parametrize("offset", [0.0, 1.0, 20_000_000.0, -20_000_000.0, 1e9, 1e14])
def test_a_whole_step_is_whitened_in_64_bits_too(offset: float) -> None:
    """The rewards of each group are equal, so only the difference between the groups counts."""
    assert white([[offset] * 2, [offset + 1] * 2]) == pytest.approx([-1.0] * 4 + [1.0] * 4, rel=1e-6)
    assert white([[offset + 0.1] * 2] * 2) == [0.0] * 8


def test_ordinary_rewards_are_whitened_as_they_were_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    for rewards in (torch.randint(2, (4, 4), generator=generator).float(), torch.randn(4, 4, generator=generator)):
        x = rewards.flatten().repeat_interleave(2)
        mean, square = x.double().sum() / len(x), x.double().square().sum() / len(x)
        expected = whitened(x, mean.float(), (square - mean.square()).clamp(min=0).float())
        assert white(rewards.tolist()) == expected.tolist()
