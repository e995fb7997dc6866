"""Each health rule holds for metrics made for it, and for none of a healthy run."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest

from rlora.records import RloraError
from rlora.run.health import RULES, Health
from rlora.settings import Config, HealthRule

STEPS = 5


def healthy(step: int, **changes: Any) -> dict[str, Any]:
    """Metrics of a step of a run that learns."""
    rise = 1 - math.exp(-step / 10)
    return {
        "step": step,
        "reward/mean": 0.3 + 0.6 * rise,
        "reward/max": 1.0,
        "reward/min": 0.0,
        "reward/informative_groups": 0.6,
        "status/correct": 0.3 + 0.6 * rise,
        "status/timeout": 0.0,
        "status/error": 0.0,
        "completion/truncated": 0.1,
        "kl/behaviour": 0.002 + 0.001 * (step % 3),
        "entropy": 1.5 - 1.2 * rise,
        "update/skipped": False,
    } | {name.replace("__", "/"): value for name, value in changes.items()}


def remedies(config: Config, lines: list[dict[str, Any]]) -> dict[str, str]:
    """Rules that hold after the last line, with their remedies."""
    health, result = Health(config), dict[str, str]()
    for line in lines:
        result = health.update(line)
    return result


EQUAL_REWARDS = {"reward__informative_groups": 0.0}
CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "floor": lambda step: healthy(step, reward__max=0.0, reward__mean=0.0, status__correct=0.0, **EQUAL_REWARDS),
    "solved": lambda step: healthy(step, reward__min=1.0, reward__mean=1.0, status__correct=1.0, **EQUAL_REWARDS),
    "truncated": lambda step: healthy(step, completion__truncated=1.0, status__correct=0.4),
    "failing_rewards": lambda step: healthy(step, status__timeout=0.1, status__error=0.05),
    "dead_part": lambda step: healthy(step, reward__right=0.4, reward__form=0.0),
    "engine_learner_apart": lambda step: healthy(step, kl__behaviour=0.002 if step < 20 else 0.09),
    "entropy_collapsed": lambda step: healthy(step, entropy=1.5 if step < 10 else 0.05, status__correct=0.1),
    "overfitting": lambda step: healthy(
        step,
        **(
            {"accuracy__held_out": 0.8 - step / 40, "accuracy__held_out__low": 0.7 - step / 40} if step % 8 == 0 else {}
        ),
    ),
    "no_signal": lambda step: healthy(step, **EQUAL_REWARDS),
    "masked": lambda step: healthy(step, ratio__truncated=0.95),
    "skipped": lambda step: healthy(step, update__skipped=True, kl__behaviour=None, entropy=None),
}


@pytest.fixture
def settings(config: Callable[..., Config]) -> Config:
    return config(reward=["a:right", "a:form"], algorithm={"geometric_mask": 0.01})


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(RULES) == set(get_args(HealthRule))


@pytest.mark.parametrize("name", CASES)
def test_a_rule_holds_for_its_case_only(name: str, settings: Config) -> None:
    result = remedies(settings, [CASES[name](step) for step in range(40)])
    assert set(result) == {name}
    assert len(result[name]) > 40  # a text
    lines = [healthy(step) for step in range(40)]
    if name not in ("overfitting", "skipped", "failing_rewards"):  # these use means, or fewer steps
        assert not remedies(settings, [*lines, *(CASES[name](20 + step) for step in range(STEPS - 1))])


def test_no_rule_holds_for_a_healthy_run(settings: Config) -> None:
    health = Health(settings)
    for step in range(100):
        line = healthy(step, reward__right=0.5, reward__form=0.1)
        if step % 8 == 0:
            line |= {"accuracy/held_out": 0.5 + step / 300, "accuracy/held_out/low": 0.4 + step / 300}
        assert health.update(line) == {}
    assert health.fired == {}


def test_completions_that_are_cut_off_after_a_correct_answer_are_healthy(settings: Config) -> None:
    """As in launch/arithmetic.toml, where the policy learns to begin with the sum."""
    lines = [healthy(step, completion__truncated=1.0, status__correct=0.9) for step in range(STEPS)]
    assert remedies(settings, lines) == {}


def test_negative_rewards_have_a_floor_too(settings: Config) -> None:
    """The floor is the lowest reward of the run so far."""
    lines = [
        healthy(step, reward__max=-1.0, reward__min=-1.0, status__correct=0.0, **EQUAL_REWARDS) for step in range(STEPS)
    ]
    assert set(remedies(settings, lines)) == {"floor"}
    higher = [
        healthy(step, reward__max=0.5, reward__min=0.5, status__correct=0.0, **EQUAL_REWARDS) for step in range(STEPS)
    ]
    assert remedies(settings, [healthy(0, reward__min=-1.0), *higher]) == {}


def test_lines_of_an_older_release_are_read(settings: Config) -> None:
    old = [{name: value for name, value in healthy(step).items() if name != "reward/min"} for step in range(10)]
    assert Health(settings, old).update(healthy(10)) == {}


def test_a_resumed_run_keeps_the_rules_that_held(settings: Config) -> None:
    lines = [CASES["truncated"](step) | ({"health/truncated": 4} if step >= 4 else {}) for step in range(6)]
    health = Health(settings, lines)
    assert health.holding == health.fired == {"truncated": 4}
    health.update(CASES["truncated"](6))
    assert health.holding == {"truncated": 4}
    health.update(healthy(7))
    assert (health.holding, health.fired) == ({}, {"truncated": 4})


def test_a_rule_may_stop_the_run(config: Callable[..., Config]) -> None:
    health = Health(config(health={"stop": ["solved", "floor"]}))
    health.check_stop({"truncated": "raise it"})
    with pytest.raises(RloraError, match=r"health\.stop = \['solved', 'floor'\]: the run stops.*\nfloor: easier"):
        health.check_stop({"truncated": "raise it", "floor": "easier"})
    with pytest.raises(RloraError, match=r"health\.stop.* = 'flor': it should be 'floor', "):
        config(health={"stop": ["flor"]})
