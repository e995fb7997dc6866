"""Updates with several minibatches, a critic and a reference policy, all on one base."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Solo, episode, group, samples, stir
from transformers import AutoModelForCausalLM

from rlora.core.advantage import generalised
from rlora.core.batch import Microbatch, microbatches, sample_of
from rlora.core.update import _make_samples
from rlora.records import Group
from rlora.settings import Config

MakeConfig = Callable[..., Config]


@pytest.fixture
def make(tiny: str, config: MakeConfig) -> Callable[..., Solo]:
    def learner(**algorithm: Any) -> Solo:
        settings = {"learner": {"rank": 2, "lr": 0.01}, "critic": {"lr": 1e-3}, "prompts_per_step": 4}
        return Solo(config(**settings, algorithm=algorithm), tiny)

    return learner


def flat_parameters(learner: Solo, critic: bool) -> torch.Tensor:
    parameters = learner.policies.parameters_of("run/critic" if critic else "run")
    return torch.cat([weight.detach().flatten() for weight in parameters.values()])


def passes_of(learner: Solo, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list to which each forward pass over the base appends its adapter's name."""
    passes: list[Any] = []
    hidden = learner.policies._hidden

    def recorded(row: Microbatch, name: str | None) -> torch.Tensor:
        passes.append(name)
        return hidden(row, name)

    monkeypatch.setattr(learner.policies, "_hidden", recorded)
    return passes


def test_the_critic_is_a_second_adapter_and_both_learn(make: Callable[..., Solo], groups: list[Group]) -> None:
    learner = make(name="ppo", minibatches=2)
    assert len(learner.bank.specs) == 2
    base_weights = AutoModelForCausalLM.from_pretrained(learner.base).state_dict()
    frozen = list(learner.policies.base.parameters())
    assert sum(weight.numel() for weight in frozen) <= sum(weight.numel() for weight in base_weights.values())
    before = [flat_parameters(learner, critic) for critic in (False, True)]
    first = learner.update(groups)[1]
    assert (first.minibatches, first.explained_variance) == (2, pytest.approx(0.0, abs=1e-6))  # V is 0 at the start
    after = [flat_parameters(learner, critic) for critic in (False, True)]
    assert all(not old.equal(new) for old, new in zip(before, after, strict=True))
    for _ in range(30):
        last = learner.update(groups)[1]
    assert last.explained_variance is not None
    assert last.explained_variance > 0.5
    assert last.value_loss is not None
    assert first.value_loss is not None
    assert last.value_loss < first.value_loss / 2


def test_the_critic_learns_alone_while_it_warms_up(tiny: str, config: MakeConfig, groups: list[Group]) -> None:
    warming = config(learner={"lr": 0.01}, algorithm={"name": "ppo", "minibatches": 1}, critic={"warmup": 1})
    learner = Solo(warming, tiny)
    fresh = learner.adapter().weights
    _, stats = learner.update(groups)
    assert stats.lr == 0.0
    assert learner.adapter().weights == fresh
    assert flat_parameters(learner, critic=True)[-1] != 0
    learner.update(groups)
    assert learner.adapter().weights != fresh


def test_values_are_the_critics_head_over_its_adapter(make: Callable[..., Solo]) -> None:
    learner = make(name="ppo")
    stir(learner.bank)
    head = learner.policies.value_heads["run/critic"]
    head.weight.data.normal_()
    cut_off = replace(episode([8, 9, 10]), finish_reason="length")
    sample = sample_of([5, 6], cut_off)
    values, with_end = (learner.learner.forward("run/critic", [[s]])[0][0] for s in (sample, sample.to_the_end()))
    with learner.bank.serving("run/critic"), torch.no_grad():
        hidden = learner.policies.body(torch.tensor([[5, 6, 8, 9, 10]])).last_hidden_state[0]
        torch.testing.assert_close(with_end, head(hidden)[1:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, with_end[:3], atol=1e-5, rtol=1e-5)


def test_advantages_are_gae_of_the_critics_values(make: Callable[..., Solo], groups: list[Group]) -> None:
    learner = make(name="ppo", minibatches=1, gamma=0.9, lam=0.8)
    for _ in range(3):
        learner.update(groups)
    samples, _ = _make_samples(learner.learner, learner.held, groups)
    flat = [sample for group_samples in samples for sample in group_samples]
    for sample in flat:
        assert sample.tokens.values is not None
        assert sample.tokens.returns is not None
        rewards = torch.zeros(len(sample.tokens.values))
        assert sample.episode is not None
        rewards[-1] = float(sample.episode.reward or 0.0)
        raw = generalised(rewards, sample.tokens.values, 0.0, 0.9, 0.8)
        torch.testing.assert_close(sample.tokens.returns, raw + sample.tokens.values)
    advantages = torch.cat([sample.tokens.advantages for sample in flat])
    assert advantages.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert advantages.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-3)


def test_kl_to_the_reference_takes_one_more_pass_and_no_second_model(
    make: Callable[..., Solo], groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(name="grpo", kl=0.05)
    passes = passes_of(learner, monkeypatch)
    assert learner.update(groups)[1].kl_reference == pytest.approx(0.0, abs=1e-6)  # B = 0
    assert passes == [None, "run", "run"]  # the last pass is the canary's
    assert (learner.update(groups)[1].kl_reference or 0.0) > 0


def test_a_strong_kl_keeps_the_policy_at_the_base(make: Callable[..., Solo], groups: list[Group]) -> None:
    def moved(kl: float) -> float:
        learner = make(name="grpo", kl=kl)
        for _ in range(15):
            stats = learner.update(groups)[1]
        if not kl:
            state, algorithm = learner.state(), replace(learner.config.algorithm, kl=1e-9)
            learner.config = replace(learner.config, algorithm=algorithm)
            learner.resume(state)
            stats = learner.update(groups)[1]
        return stats.kl_reference or 0.0

    assert moved(5.0) < moved(0.0) / 5


def test_each_minibatch_is_a_step_until_the_policy_has_moved_too_far(
    make: Callable[..., Solo], groups: list[Group]
) -> None:
    by_group = make(name="grpo", epochs=2, minibatches=3)
    assert by_group.update(groups)[1].minibatches == 4  # one of the three groups has equal rewards
    stats = make(name="grpo", epochs=4, loss="clip").update(groups)[1]
    assert stats.minibatches == 4
    assert stats.kl_update is not None
    assert stats.kl_update > 0
    assert stats.clipped is not None
    assert stats.clipped > 0
    stopped = make(name="grpo", epochs=4, target_kl=1e-6).update(groups)[1]
    assert stopped.minibatches == 1  # which starts from the unchanged policy


def test_one_epoch_of_one_minibatch_precomputes_nothing(
    make: Callable[..., Solo], groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(name="grpo")
    passes = passes_of(learner, monkeypatch)
    learner.update(groups)
    assert passes == ["run", "run"]  # the second pass is the canary's


def test_each_pass_is_under_one_adapter(
    make: Callable[..., Solo], groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make(name="ppo", minibatches=2, kl=0.1)
    passes = passes_of(learner, monkeypatch)
    learner.update(groups)
    precomputed = [None, "run", "run/critic"]  # per minibatch
    assert passes == [*precomputed, *precomputed, *["run", "run/critic"] * 2, "run"]


def test_entropy_bonus_flattens(make: Callable[..., Solo], groups: list[Group]) -> None:
    flat = [group(list(g.prompt.token_ids), *(replace(e, reward=0.0) for e in g.episodes)) for g in groups]

    def entropy(learner: Solo) -> float:
        (row,) = microbatches(samples(groups), 100, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            entropies = learner.policies.outputs(row, "run", entropies=True).entropies
            assert entropies is not None
            return float(entropies.mean())

    learner = make(entropy=1.0)
    before = entropy(learner)
    for _ in range(5):
        learner.update(flat)
    assert entropy(learner) > before + 0.1


def test_a_run_with_a_critic_resumes_bit_for_bit(make: Callable[..., Solo], groups: list[Group]) -> None:
    learner, other = make(name="ppo"), make(name="ppo")
    learner.update(groups)
    other.resume(learner.state())
    assert other.update(groups)[0] == learner.update(groups)[0]


def test_a_minibatch_without_samples_is_skipped(make: Callable[..., Solo], groups: list[Group]) -> None:
    """All of its completions were cut off and are dropped."""
    cut_off = [
        replace(g, episodes=tuple(replace(e, finish_reason="length") for e in g.episodes)) if number else g
        for number, g in enumerate(groups)
    ]
    stats = make(name="ppo", minibatches=3, truncated="drop").update(cut_off)[1]
    assert (stats.minibatches, stats.skipped_in_a_row) == (1, 0)
    assert stats.value_loss is not None
    empty = make(name="ppo", minibatches=3, truncated="drop").update(cut_off[1:])[1]
    assert (empty.minibatches, empty.tokens, empty.value_loss) == (0, 0, None)


def test_a_critic_that_can_not_step_counts_as_a_skipped_update(make: Callable[..., Solo], groups: list[Group]) -> None:
    learner = make(name="ppo", minibatches=1)
    learner.policies.value_heads["run/critic"].bias.data.fill_(float("nan"))
    for number in (1, 2):
        stats = learner.update(groups)[1]
        assert (stats.minibatches, stats.skipped_in_a_row) == (0, number)


def test_no_gradient_is_left_behind(make: Callable[..., Solo], groups: list[Group]) -> None:
    learner = make(name="ppo", epochs=4, target_kl=1e-6, minibatches=1)
    assert learner.update(groups)[1].minibatches < 4
    for name in ("run", "run/critic"):
        assert all(master.grad is None for master in learner.learner.states[name].optimizer.masters.values())
    broken = [group([5, 6], episode([7], 1.0, [float("nan")]), episode([8], 0.0))]
    learner.update(broken)
    assert all(master.grad is None for master in learner.held.optimizer.masters.values())
