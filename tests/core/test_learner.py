import json
import socket
import weakref
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from conftest import Solo, episode, group, tiny_model
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from rlora.core.learner import Learner
from rlora.core.optimizer import scheduled_lr
from rlora.core.peft_format import masters
from rlora.core.setup import Setup
from rlora.model.base import auto_lr
from rlora.records import Group, RloraError
from rlora.run.health import check_updates
from rlora.settings import Config
from rlora.store import write_adapter

MakeConfig = Callable[..., Config]


@pytest.fixture
def learner(tiny: str, config: MakeConfig) -> Solo:
    return Solo(config(learner={"rank": 2, "lr": 0.01, "max_bad_updates": 2}), tiny)


def on_policy(learner: Solo, groups: list[Group]) -> list[Group]:
    """The groups, with the learner's own logprobs as behaviour logprobs."""

    def measured(prompt: tuple[int, ...], completion: tuple[int, ...]) -> tuple[float, ...]:
        ids = torch.tensor([prompt + completion])
        with learner.bank.serving(learner.name):
            logprobs = learner.policies.base(ids).logits[0].log_softmax(-1)
        return tuple(logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].tolist())

    with torch.no_grad():
        return [
            replace(g, episodes=tuple(
                replace(e, behaviour_logprobs=measured(g.prompt.token_ids, e.completion_ids)) for e in g.episodes
            )) for g in groups
        ]  # fmt: skip


def test_an_update_returns_advantages_and_logprobs_per_token(learner: Solo, groups: list[Group]) -> None:
    measured = on_policy(learner, groups)
    stats = learner.update(measured)[1]
    advantages = {(0, 0): 0.5, (0, 1): -0.5, (2, 1): -0.5}  # episodes with tokens and an advantage
    assert stats.trained.keys() == advantages.keys()
    for (g, e), trained in stats.trained.items():
        played = measured[g].episodes[e]
        assert array("f", trained.advantages).tolist() == [advantages[g, e]] * len(played.completion_ids)
        assert array("f", trained.logprobs).tolist() == pytest.approx(played.behaviour_logprobs, abs=1e-5)
    assert {"passes", "gradient", "adam"} == stats.parts.keys()
    assert sum(stats.parts.values()) <= stats.seconds


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_logprobs_are_those_before_the_first_minibatch(
    epochs: int, tiny: str, config: MakeConfig, groups: list[Group]
) -> None:
    algorithm = {"name": "dapo", "minibatches": 3, "epochs": epochs}
    learner = Solo(config(learner={"rank": 2, "lr": 0.5}, algorithm=algorithm), tiny)
    measured = on_policy(learner, groups)
    for (g, e), trained in learner.update(measured)[1].trained.items():
        expected = measured[g].episodes[e].behaviour_logprobs
        assert array("f", trained.logprobs).tolist() == pytest.approx(expected, abs=1e-5)


def test_on_policy_the_loss_is_the_plain_policy_gradient(learner: Solo, groups: list[Group]) -> None:
    measured = on_policy(learner, groups)
    by_hand = 0.0
    for g, advantages in zip(measured, ([0.5, -0.5], [0.0, 0.0], [0.0, -0.5, 0.5]), strict=True):
        for e, advantage in zip(g.episodes, advantages, strict=True):
            by_hand -= advantage * len(e.completion_ids)  # the ratio is 1
    tokens = 3 + 2 + 4 + 1 + 2 + 3  # the group with equal rewards counts too
    adapter, stats = learner.update(measured)
    assert stats.loss == pytest.approx(by_hand / tokens, rel=1e-4)
    assert stats.tokens == 3 + 2 + 3  # tokens with an advantage
    assert stats.kl_behaviour == pytest.approx(0.0, abs=1e-6)
    assert stats.ratio_truncated == 0.0
    assert not stats.skipped_in_a_row
    assert adapter.number == 1


def test_a_linear_schedule_falls_to_zero(config: MakeConfig) -> None:
    falling = config(learner={"lr": 0.08, "lr_schedule": "linear"}).learner
    assert [scheduled_lr(falling, 0.08, step, 4) for step in range(5)] == pytest.approx([0.08, 0.06, 0.04, 0.02, 0.0])
    assert scheduled_lr(config().learner, 0.08, 3, 4) == 0.08
    cosine = config(learner={"lr_schedule": "cosine", "lr_floor": 0.1}).learner
    assert [scheduled_lr(cosine, 1.0, step, 4) for step in (0, 2, 4)] == pytest.approx([1.0, 0.55, 0.1])


def test_auto_lr_is_the_fitted_rule(tiny: str, config: MakeConfig) -> None:
    base = LlamaConfig(hidden_size=576)
    assert auto_lr(config().learner, base) == pytest.approx(5e-4 * (2000 / 576) ** 0.781)
    assert auto_lr(config().learner, Qwen3Config(hidden_size=576)) == pytest.approx(5e-4 * (2000 / 576) ** 0.0775)
    assert auto_lr(config(learner={"adapter": "none"}).learner, base) == pytest.approx(5e-5 * (2000 / 576) ** 0.781)
    learner = Solo(config(learner={"lr": "auto"}), tiny)
    assert learner.held.lr == auto_lr(config().learner, learner.policies.base.config)


def test_an_update_takes_the_scheduled_learning_rate(tiny: str, config: MakeConfig, groups: list[Group]) -> None:
    learner = Solo(config(steps=2, learner={"lr": 0.08, "lr_schedule": "linear"}), tiny)
    up = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    before = masters(learner.bank, "run")[up].detach().clone()
    moved = []
    for _ in range(2):
        _, stats = learner.update(groups)
        after = masters(learner.bank, "run")[up].detach().clone()
        moved.append(float((after - before).abs().median()))
        before = after
        assert stats.lr == scheduled_lr(learner.config.learner, 0.08, learner.version - 1, 2)
    assert moved[0] == pytest.approx(0.08, rel=1e-3)  # Adam's first step is the learning rate itself
    assert moved[1] < 0.05


def test_an_update_raises_what_was_rewarded(learner: Solo, groups: list[Group]) -> None:
    before = on_policy(learner, groups)[0].episodes
    for _ in range(5):
        learner.update(on_policy(learner, groups))
    after = on_policy(learner, groups)[0].episodes
    assert sum(after[0].behaviour_logprobs) > sum(before[0].behaviour_logprobs)  # reward 1
    assert sum(after[1].behaviour_logprobs) < sum(before[1].behaviour_logprobs)  # reward 0


def test_microbatches_do_not_change_the_update(tiny: str, config: MakeConfig, groups: list[Group]) -> None:
    updates = []
    for budget in (4, 1000):
        learner = Solo(config(learner={"microbatch_tokens": budget}), tiny)
        updates.append(learner.update(on_policy(learner, groups))[1])
    assert updates[0].loss == pytest.approx(updates[1].loss, rel=1e-4)
    assert updates[0].grad_norm == pytest.approx(updates[1].grad_norm, rel=1e-4)


def first_moments(learner: Learner) -> torch.Tensor:
    """Adam's first moments of the policy and its critic: after one minibatch, the gradient times 1 - beta_1."""
    optimizers = [state.optimizer for state in learner.states.values()]
    moments = [
        optimizer.adam.state[master]["exp_avg"].flatten()
        for optimizer in optimizers
        for master in optimizer.masters.values()
    ]
    return torch.cat(moments)


def _run_rank(rank: int, address: str, config: Config, base: str, groups: list[Group], out: str) -> None:
    """Run one of two learners, and save the results of its update and the size of the layers that it holds."""
    torch.set_num_threads(1)
    learner = Learner(config, base)
    layers = learner.policies.body.layers
    loaded = [weakref.ref(weight) for weight in layers.parameters()]
    learner.join(address, rank, 2)
    learner.open("run", Setup.of(config))
    adapter, stats = learner.update("run", groups)
    moments = first_moments(learner)
    frozen = list(layers.parameters())
    size = sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in frozen)
    alive = sum(weight() is not None for weight in loaded)
    torch.save((moments, adapter, replace(stats, seconds=0), size, alive), f"{out}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("algorithm", "settings", "taken"),
    [
        ({}, {}, slice(None)),
        ({}, {"shard": True, "microbatch_tokens": 9}, slice(None)),  # one rank runs more passes
        ({}, {"shard": True, "checkpointing": True}, slice(1)),  # one rank has no groups
        ({"name": "ppo", "minibatches": 2, "kl": 0.1}, {}, slice(None)),
        ({"name": "ppo", "minibatches": 2, "kl": 0.1}, {"shard": True, "checkpointing": True}, slice(None)),
        ({"name": "ppo", "minibatches": 2}, {"shard": True}, slice(1)),
        ({"name": "gspo", "minibatches": 3, "target_kl": 1e-9}, {"shard": True}, slice(None)),
    ],
)
def test_two_learners_take_the_step_of_one(
    tiny: str, config: MakeConfig, groups: list[Group], tmp_path: Path, algorithm: dict[str, object],
    settings: dict[str, object], taken: slice,
) -> None:  # fmt: skip
    groups = groups[taken]
    alone = Solo(config(learner={"rank": 2, "lr": 0.01}, algorithm=algorithm), tiny)
    full_size = sum(weight.numel() for weight in alone.policies.body.layers.parameters())
    _, stats = alone.update(groups)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    shared_config = config(learner={"rank": 2, "lr": 0.01, "replicas": 2} | settings, algorithm=algorithm)
    torch.multiprocessing.spawn(_run_rank, (address, shared_config, tiny, groups, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(2)]
    assert results[0][1] == results[1][1]  # the same adapter, bit for bit
    gradient, _, shared, *_ = results[0]
    expected = first_moments(alone.learner)
    tolerance = 1e-5 if stats.minibatches == 1 else 1e-3  # Adam's first step is the sign even of tiny gradients
    assert (gradient.double() - expected.double()).norm() <= tolerance * expected.double().norm()
    assert (shared.tokens, shared.minibatches) == (stats.tokens, stats.minibatches)
    for name in ("loss", "grad_norm", "kl_behaviour", "kl_update", "kl_reference", "value_loss", "explained_variance"):
        actual, figure = getattr(shared, name), getattr(stats, name)
        assert actual == (figure if figure is None else pytest.approx(figure, rel=tolerance, abs=1e-6)), name
    sizes, alive = zip(*(result[3:] for result in results), strict=True)
    if shared_config.learner.shard:
        assert sizes == (full_size / 2, full_size / 2)
        assert alive == (0, 0)  # the full weights are freed
    else:
        assert sizes == (full_size, full_size)


def test_groups_that_agree_cost_no_forward_pass(learner: Solo, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a forward pass")

    monkeypatch.setattr(learner.policies, "_hidden", forbidden)
    before = learner.adapter().weights
    adapter, stats = learner.update([group([1, 2], episode([3], 1.0), episode([4], 1.0))])
    assert (adapter.number, stats.tokens, stats.kl_behaviour) == (1, 0, None)
    assert adapter.weights == before


def test_a_non_finite_loss_changes_nothing_and_two_in_a_row_stop(learner: Solo, groups: list[Group]) -> None:
    learner.update(on_policy(learner, groups))
    before, state = learner.adapter(), learner.state()
    broken = [group([5, 6], episode([7], 1.0, [float("nan")]), episode([8], 0.0))]
    adapter, stats = learner.update(broken)
    assert stats.skipped_in_a_row == 1
    assert adapter.number == before.number + 1
    assert adapter.weights == before.weights
    assert len(learner.state()) == len(state)
    learner.update(on_policy(learner, groups))  # a finite update resets the count
    check_updates(learner.config, learner.update(broken)[1])
    with pytest.raises(RloraError, match=r"2 updates in a row had a non-finite loss.*learner\.lr"):
        check_updates(learner.config, learner.update(broken)[1])


def test_resuming_continues_bit_for_bit(tiny: str, config: MakeConfig, learner: Solo, groups: list[Group]) -> None:
    learner.update(groups)
    state = learner.state()
    straight, _ = learner.update(groups)
    other = Solo(learner.config, tiny)
    assert other.resume(state).number == 1
    resumed, _ = other.update(groups)
    assert resumed == straight
    with pytest.raises(RloraError, match="a different model or rank"):
        Solo(config(learner={"rank": 3}), tiny).resume(state)


def test_peft_loads_the_adapter_and_gives_the_same_logits(
    tiny: str, learner: Solo, groups: list[Group], tmp_path: Path
) -> None:
    adapter, _ = learner.update(groups)
    path = write_adapter(adapter, tmp_path / "1")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), str(path))
    ids = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with learner.bank.serving(learner.name):
            logits = learner.policies.base(ids).logits
        torch.testing.assert_close(peft(ids).logits, logits, atol=1e-5, rtol=1e-5)
        with learner.bank.serving(None):
            assert not torch.allclose(learner.policies.base(ids).logits, logits, atol=1e-3)
    assert json.loads(adapter.config)["r"] == 2


def test_a_run_may_start_from_a_saved_adapter(
    tiny: str, config: MakeConfig, learner: Solo, groups: list[Group], tmp_path: Path
) -> None:
    trained, _ = learner.update(groups)
    path = str(write_adapter(trained, tmp_path / "1"))
    started = Solo(config(learner={"rank": 2, "start_from": path}), tiny).adapter()
    assert (started.number, started.weights) == (0, trained.weights)
    with pytest.raises(RloraError, match=r"its rank is 2, learner\.rank is 1; set learner\.rank to 2"):
        Solo(config(learner={"start_from": path}), tiny)
    with pytest.raises(RloraError, match=r"learner\.head = True: the adapter in learner\.start_from determines"):
        Solo(config(learner={"rank": 2, "head": True, "start_from": path}), tiny)
    with pytest.raises(RloraError, match="there is no adapter in PEFT's format"):
        Solo(config(learner={"start_from": str(tmp_path)}), tiny)


def test_the_demo_adapter_has_the_known_size(demo: str, config: MakeConfig) -> None:
    adapter = Solo(config(dtype="bfloat16"), demo).adapter()
    assert adapter.parameters == 305_280


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_have_the_gradients_of_plain_autograd(
    config: MakeConfig, groups: list[Group], tmp_path: Path, tied: bool
) -> None:
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path)
    learner = Solo(config(learner={"adapter": "none", "max_grad_norm": 1e9}), str(tmp_path))
    plain = tiny_model("llama", tie_word_embeddings=tied)
    measured = on_policy(learner, groups)
    loss = torch.zeros(())
    for g, advantages in zip(measured, ([0.5, -0.5], [0.0, 0.0], [0.0, -0.5, 0.5]), strict=True):
        for e, advantage in zip(g.episodes, advantages, strict=True):
            ids = torch.tensor([g.prompt.token_ids + e.completion_ids])
            logprobs = plain(ids).logits[0, len(g.prompt.token_ids) - 1 : -1].log_softmax(-1)
            loss = loss - advantage * logprobs.gather(1, torch.tensor(e.completion_ids)[:, None]).sum() / 15
    loss.backward()
    adapter, _ = learner.update(measured)
    assert adapter.parameters == plain.num_parameters()
    moments = learner.held.optimizer.adam.state
    for name, weight in plain.named_parameters():
        gradient = moments[learner.held.optimizer.masters[name]]["exp_avg"] / 0.1  # 1 - beta_1
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)


def test_16_bit_weights_are_rounded_from_masters_that_keep_small_steps(
    config: MakeConfig, groups: list[Group], tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    settings = config(dtype="bfloat16", learner={"adapter": "none", "lr": 1e-5, "microbatch_tokens": 1})
    learner = Solo(settings, str(tmp_path))
    started = [weight.detach().clone() for weight in learner.held.optimizer.weights.values()]
    learner.update(groups)
    state = learner.state()
    optimizer = learner.held.optimizer
    for (name, weight), before in zip(optimizer.weights.items(), started, strict=True):
        master = optimizer.masters[name]
        assert weight.dtype == torch.bfloat16
        assert weight.equal(master.to(torch.bfloat16))
        assert weight.grad is None  # it was accumulated in fp32
        moved = (master - before.float()).abs()
        assert 0 < moved.max() <= 1.01e-5
        assert weight.ndim > 1 or weight.equal(before)  # norm weights are 1, and 16 bits round such a step away
    straight, _ = learner.update(groups)
    other = Solo(settings, str(tmp_path))
    other.resume(state)
    assert other.update(groups)[0] == straight
    with pytest.raises(RloraError, match="a previous policy trained all weights"):
        other.resume()
    path = write_adapter(straight, tmp_path / "1")
    loaded = AutoModelForCausalLM.from_pretrained(str(path))
    for name, weight in learner.policies.base.named_parameters():
        assert loaded.get_parameter(name).equal(weight)
