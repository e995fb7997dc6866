"""A policy learns bit for bit the same, whether it is trained alone or beside other policies."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import episode, group

from rlora.core.learner import Learner
from rlora.core.setup import Setup
from rlora.records import Group, RloraError, UpdateStats
from rlora.settings import Config

UPDATES = 10
NOISY = """
import torch
from rlora.core.objectives.reinforce import Reinforce

class Noisy(Reinforce):
    def loss(self, now, batch):  # draws random numbers, as a loss with dropout would
        loss, figures = super().loss(now, batch)
        return loss * (1 + 0.1 * torch.rand(())), figures
"""
POLICIES: dict[str, dict[str, Any]] = {
    "a": {"learner": {"rank": 1}},
    "b": {"learner": {"rank": 2, "targets": "mlp"}, "algorithm": {"name": "grpo", "kl": 0.05}, "seed": 1},
    "c": {"learner": {"rank": 8, "targets": "attention"}, "algorithm": {"name": "cispo", "minibatches": 4}, "seed": 2},
    "d": {"learner": {"rank": 2}, "algorithm": {"name": "ppo", "minibatches": 2}, "critic": {"rank": 8}, "seed": 3},
    "e": {"learner": {"rank": 8, "lr_schedule": "linear", "init": "orthonormal"}, "steps": 12, "seed": 4},
    "f": {"learner": {"rank": 1, "targets": "mlp"}, "algorithm": {"name": "dapo", "entropy": 0.01}, "seed": 5},
    "g": {"learner": {"rank": 1, "rslora": True}, "algorithm": {"name": "noisy.py:Noisy"}, "seed": 6},
    "h": {"algorithm": {"name": "ppo", "kl": 0.1, "truncated": "bootstrap"}, "critic": {"warmup": 2}, "seed": 7},
}


@pytest.fixture(scope="module")
def setups(config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Setup]]:
    def setup(settings: dict[str, Any]) -> Setup:
        learner = {"lr": 0.01, "microbatch_tokens": 24} | settings.get("learner", {})
        return Setup.of(config(**settings | {"learner": learner}))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plugin"))
        Path("noisy.py").write_text(NOISY)
        yield {name: setup(settings) for name, settings in POLICIES.items()}


def recorded(name: str, number: int) -> list[Group]:
    """The episodes of a policy's update `number`, the same in each call."""
    draw = random.Random(f"{name} {number}")

    def sampled(reward: float) -> Any:
        tokens = [draw.randrange(2, 97) for _ in range(draw.randint(1, 6))]
        completed = episode(tokens, reward, [-4 * draw.random() for _ in tokens])
        return replace(completed, finish_reason=draw.choice(["stop", "length"]))

    def prompt() -> list[int]:
        return [draw.randrange(2, 97) for _ in range(3)]

    return [group(prompt(), *(sampled(float(k % 2)) for k in range(4))) for _ in range(4)]


def bits(learner: Learner, name: str) -> dict[str, bytes]:
    """The bytes of everything that the next update depends on: masters, moments, random state, counts."""
    state = safetensors.torch.load(learner.state(name))
    return {key: tensor.flatten().view(torch.uint8).numpy().tobytes() for key, tensor in sorted(state.items())}


@pytest.fixture(scope="module")
def alone(tiny: str, config: Callable[..., Config], setups: dict[str, Setup]) -> dict[str, list[dict[str, bytes]]]:
    """The bits of each policy after each of its updates, in a learner that has only this policy."""
    history: dict[str, list[dict[str, bytes]]] = {}
    for name, setup in setups.items():
        learner = Learner(config(), tiny)
        learner.open(name, setup)
        history[name] = []
        for number in range(UPDATES):
            learner.update(name, recorded(name, number))
            history[name].append(bits(learner, name))
    return history


def turns(seed: int) -> Iterator[str]:
    """Each policy UPDATES times, in a mixed order."""
    order = [name for name in POLICIES for _ in range(UPDATES)]
    random.Random(seed).shuffle(order)
    yield from order


@pytest.fixture
def together(tiny: str, config: Callable[..., Config], setups: dict[str, Setup]) -> Learner:
    learner = Learner(config(), tiny)
    for name, setup in setups.items():
        learner.open(name, setup)
    return learner


def run(learner: Learner, alone: dict[str, list[dict[str, bytes]]], between: Callable[[str], None]) -> None:
    for name in turns(seed=0):
        number = learner.states[name].number
        learner.update(name, recorded(name, number))
        assert bits(learner, name) == alone[name][number], (name, number)
        between(name)
    for name, history in alone.items():
        assert bits(learner, name) == history[-1]
        assert history[-1] != history[0]


def test_eight_policies_learn_what_each_would_alone(
    together: Learner, alone: dict[str, list[dict[str, bytes]]]
) -> None:
    run(together, alone, lambda name: None)


def test_a_policy_that_was_closed_goes_on_as_if_it_had_stayed(
    together: Learner, alone: dict[str, list[dict[str, bytes]]], setups: dict[str, Setup]
) -> None:
    def reopen(name: str) -> None:
        """Close the policy that was just updated, and open it again from its state."""
        state = together.state(name)
        together.close(name)
        assert name not in together.states
        together.open(name, setups[name], state)

    run(together, alone, reopen)


def test_a_policy_whose_gradients_are_not_finite_harms_no_other(
    together: Learner, alone: dict[str, list[dict[str, bytes]]], config: Callable[..., Config]
) -> None:
    ill = Setup.of(config(learner={"lr": 0.01, "rank": 4}, algorithm={"name": "ppo"}))
    together.open("ill", ill)
    nan = [group([5, 6], episode([7], 1.0, [float("nan")]), episode([8], 0.0)) for _ in range(4)]
    skipped: list[UpdateStats] = []

    def interfere(_: str) -> None:
        skipped.append(together.update("ill", nan)[1])

    fresh = together.adapter("ill").weights
    run(together, alone, interfere)
    assert skipped[-1].skipped_in_a_row == len(skipped)
    assert together.adapter("ill").weights == fresh


def test_opening_says_what_does_not_fit_and_leaves_the_others(together: Learner, setups: dict[str, Setup]) -> None:
    before = {name: bits(together, name) for name in POLICIES}
    with pytest.raises(RloraError, match="policy a: a policy of this name is already open; close the open"):
        together.open("a", setups["a"])
    with pytest.raises(RloraError, match="a different model or rank"):
        together.open("new", setups["a"], together.state("b"))
    with pytest.raises(RloraError, match="a different model or rank"):  # it has a critic
        together.open("new", setups["a"], together.state("d"))
    with pytest.raises(RloraError, match="policy new/critic: names that end in /critic are reserved"):
        together.open("new/critic", setups["a"])
    assert set(together.states) == {*POLICIES, "d/critic", "h/critic"}
    assert {name: bits(together, name) for name in POLICIES} == before
