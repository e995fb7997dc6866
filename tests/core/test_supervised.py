"""SFT and losses of pairs, by hand and through the learner."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Solo, episode, group

from rlora.config import validate
from rlora.core.batch import microbatches, sample_of
from rlora.core.objectives import READY
from rlora.core.objectives.objective import Objective
from rlora.core.objectives.orpo import Orpo
from rlora.core.policy import Outputs
from rlora.records import Group as Examples
from rlora.records import RloraError
from rlora.settings import AlgorithmConfig, Config

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")
PAIRS = [
    group([5, 6], episode([7, 8, 9], 1.0), episode([7, 10], 0.0)),
    group([11], episode([12], 1.0), episode([13, 14], 0.0)),
]


def settings(name: str, **changes: Any) -> AlgorithmConfig:
    values = {"model": "-", "env": "-", "reward": "", "algorithm": {"name": name} | changes}
    return validate(values).algorithm


def objective(name: str, **changes: Any) -> Objective:
    return READY[name](settings(name, **changes), 8)


def loss_of(
    objective: Objective, groups: Sequence[Examples], logprobs: Sequence[float], reference: Sequence[float] = ()
) -> tuple[float, dict[str, float]]:
    """The loss, and the sum of each figure, of one row; logprobs are in the order of the groups' tokens."""
    weight = objective.weights(groups)
    samples = [
        [sample_of(each.prompt.token_ids, e, weight=weight(e)) for e in each.episodes if objective.learns_from(e)]
        for each in groups
    ]
    credited = [
        [s.with_tokens(advantages=a) for s, a in zip(part, objective.advantages(each, part), strict=True)]
        for each, part in zip(groups, samples, strict=True)
    ]
    values = iter(logprobs)
    known = [[torch.tensor([next(values) for _ in s.targets]) for s in part] for part in credited]
    references = iter(reference)
    if reference:
        credited = [
            [s.with_tokens(reference_logprobs=torch.tensor([next(references) for _ in s.targets])) for s in part]
            for part in credited
        ]
    (row,) = microbatches(credited, 1000, torch.float32, CPU, objective.whole_groups)
    of = {id(s): t for part, tensors in zip(credited, known, strict=True) for s, t in zip(part, tensors, strict=True)}
    now = Outputs(torch.cat([of[id(sample)] for sample in row.samples]))
    loss, figures = objective.loss(now, row)
    return float(loss), {name: float(figure.sum()) for name, figure in figures.items()}


def test_sft_is_the_mean_over_tokens_weighted_by_example() -> None:
    examples = [group([5], episode([6, 7], 1.0)), group([5, 8], episode([9], 3.0))]
    loss, figures = loss_of(objective("sft"), examples, [-1.0, -2.0, -4.0])
    assert loss == pytest.approx((1 + 2 + 3 * 4) / 3)
    assert figures == {"nll": 7.0}


def test_sft_learns_from_the_policys_messages_only() -> None:
    several = replace(episode([6, 7, 8, 9], 1.0), sampled_mask=(True, False, False, True))
    assert loss_of(objective("sft"), [group([5], several)], [-1.0, -3.0])[0] == pytest.approx(2.0)


NOW, REFERENCE = [-1.0, -1.0, -2.0, -1.0, -4.0, -0.5, -1.0, -2.0], [-2.0, -1.0, -2.0, -2.0, -2.0, -1.0, -1.5, -2.5]
CHOSEN, REJECTED = [1.0, 0.5], [-1.0, 1.0]  # now - reference, summed over each completion


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_dpo_by_hand() -> None:
    loss, figures = loss_of(objective("dpo", kl=0.2), PAIRS, NOW, REFERENCE)
    margins = [0.2 * (chosen - rejected) for chosen, rejected in zip(CHOSEN, REJECTED, strict=True)]
    assert loss == pytest.approx(sum(softplus(-margin) for margin in margins) / 2)
    assert figures == {"accuracy": 1.0, "margin": pytest.approx(sum(margins)), "pairs": 2.0}


def test_ipo_by_hand() -> None:
    loss, _ = loss_of(objective("ipo", kl=0.2), PAIRS, NOW, REFERENCE)
    lengths = [(3, 2), (1, 2)]
    differences = [c / a - r / b for c, r, (a, b) in zip(CHOSEN, REJECTED, lengths, strict=True)]
    assert loss == pytest.approx(sum((x - 2.5) ** 2 for x in differences) / 2)


def test_orpo_by_hand() -> None:
    loss, _ = loss_of(objective("orpo", kl=0.2), PAIRS, NOW)
    means = [(-4 / 3, -5 / 2), (-0.5, -1.5)]
    odds = [[mean - math.log(1 - math.exp(mean)) for mean in pair] for pair in means]
    expected = [-pair[0] + 0.2 * softplus(-(a - b)) for pair, (a, b) in zip(means, odds, strict=True)]
    assert loss == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("name", ["sft", "dpo", "ipo", "orpo"])
def test_an_update_does_not_depend_on_the_rows(name: str, config: MakeConfig, tiny: str) -> None:
    """Small microbatches, which never split a pair, and one row for all give the same adapter."""
    examples = PAIRS if name != "sft" else [group([5, 6], episode([7, 8, 9], 1.0)), group([11], episode([12], 0.5))]
    adapters = []
    for tokens in (8, 1000):
        made = config(
            model=tiny, reward="", algorithm={"name": name}, learner={"lr": 0.01, "microbatch_tokens": tokens}
        )
        learner = Solo(made, tiny)
        for _ in range(3):
            _, stats = learner.update(examples)
        assert math.isfinite(stats.loss)
        adapters.append(learner.bank.factors)
    first, second = (
        torch.cat([pair.b.flatten() for factors in bank.values() for pair in factors.pairs.values()])
        for bank in adapters
    )
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["sft", "dpo", "ipo", "orpo"])
def test_updates_learn(name: str, config: MakeConfig, tiny: str) -> None:
    examples = PAIRS if name != "sft" else [group(list(p.prompt.token_ids), p.episodes[0]) for p in PAIRS]
    learner = Solo(config(model=tiny, reward="", algorithm={"name": name}, learner={"lr": 0.02}), tiny)
    stats = [learner.update(examples)[1] for _ in range(20)]
    assert stats[-1].loss < stats[0].loss
    if name != "sft":
        assert stats[-1].objective_metrics["accuracy"] == 1.0
        assert stats[-1].objective_metrics.keys() == {"accuracy", "margin"}
        if name != "orpo":  # at the start policy and reference are the same
            assert stats[0].objective_metrics == {"accuracy": 0.0, "margin": 0.0}
    else:
        assert stats[-1].objective_metrics["nll"] < 0.5 * stats[0].objective_metrics["nll"]


def test_the_odds_of_orpo_are_finite_for_completions_of_probability_1() -> None:
    objective = Orpo(validate({"model": "-", "env": "a:B", "algorithm": {"name": "orpo"}}).algorithm, 8)
    sums = torch.tensor([[0.0, -3.0], [-3.0, 0.0], [0.0, 0.0], [-1e-9, -1.0]], requires_grad=True)
    objective.of_pairs(sums[:, 0], sums[:, 1], torch.full((4, 2), 3)).sum().backward()
    assert sums.grad is not None
    assert torch.isfinite(sums.grad).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "a:b"}, r"reward = 'a:b': algorithm\.loss = 'sft' learns from given completions"),
        ({"max_staleness": 1}, r"max_staleness = 1: .*set max_staleness to 0"),
        ({"reward_args": {"strict": True}}, r"reward_args = .*remove reward_args"),
        ({"scoring": {"error": -1.0}}, r"scoring = .*remove the table \[scoring\]"),
        ({"sampling": {"temperature": 0.5}}, r"sampling\.temperature = 0\.5: "),
        ({"algorithm": {"name": "dpo", "kl": 0.0}}, r"algorithm\.kl = 0\.0: it is beta"),
        ({"algorithm": {"name": "sft", "entropy": 0.1}}, r"algorithm\.entropy = 0\.1: .*set algorithm\.entropy to 0"),
        *(
            ({"algorithm": {"name": "sft", name: value}}, rf"algorithm\.{name} = .*set algorithm\.{name} to ")
            for name, value in {
                "kl": 0.1,
                "target_kl": 0.1,
                "truncated": "drop",
                "average": "episodes",
                "geometric_mask": 0.1,
                "correction": "none",
                "advantage": "gae",
                "refills": 1,
                "clip_high": 0.3,
            }.items()
        ),
        ({"algorithm": {"name": "dpo", "target_kl": 0.1, "epochs": 2}}, r"algorithm\.target_kl = 0\.1: "),
        ({"evaluate": {"sets": {"a": {}}}}, r"evaluate\.sets = .*the env's held_out\(\) only; remove it"),
        (
            {"algorithm": {"name": "dpo"}, "learner": {"adapter": "none"}},
            r'set algorithm\.name to "orpo", or learner\.ad',
        ),
        ({"algorithm": {"name": "reinforce"}}, r"reward: not set, and it has no default"),
        ({"algorithm": {"name": "reinforce"}, "reward": "a:b", "engine": {"replicas": 0}}, r"engine\.replicas = 0: "),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    table = {"model": "-", "env": "a:B", "algorithm": {"name": "sft"}} | changes
    with pytest.raises(RloraError, match=message):
        validate(table)
    assert validate({"model": "-", "env": "a:B", "algorithm": {"name": "sft"}}).engines == 0
