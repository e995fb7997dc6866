import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ORIGIN, Solo, tiny_model, write_provenance
from upath import UPath

from rlora.core.learner import Learner
from rlora.core.setup import Setup
from rlora.records import Group, RloraError
from rlora.rollout.cursor import Cursor
from rlora.run import episodes
from rlora.run.checkpoint import Bundle, bundle_path
from rlora.run.replay import pairs, replay, updates
from rlora.settings import Config
from rlora.store import write_directory

Run = tuple[Config, list[Bundle]]
ALGORITHMS = ["reinforce", "grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "ppo"]


@pytest.fixture
def run(tiny: str, config: Callable[..., Config], groups: list[Group]) -> Callable[..., Run]:
    """The bundles of three steps by one learner, without a resume."""

    def make(algorithm: str, **settings: object) -> Run:
        steps = {"epochs": 2, "minibatches": 2} | ({"kl": 0.1} if algorithm == "grpo" else {})
        run_config = config(algorithm={"name": algorithm} | steps, learner={"lr": 0.01, "rank": 2} | settings)
        learner = Solo(run_config, tiny)
        bundles = [Bundle(ORIGIN, learner.adapter(), learner.state(), Cursor(), run_config)]
        for order in (groups, groups[::-1], groups):
            adapter, _ = learner.update(order)
            parent, update = bundles[-1].adapter.digest, episodes.encode(order)
            bundles.append(Bundle(ORIGIN, adapter, learner.state(), Cursor(), run_config, update, parent))
        return run_config, bundles

    return make


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_update_is_reproduced_bit_for_bit_by_a_new_learner(
    algorithm: str, run: Callable[..., Run], tiny: str
) -> None:
    """In any order: an update depends on its bundle only, not on earlier updates of the learner."""
    config, bundles = run(algorithm)
    learner, setup = Learner(config, tiny), Setup.of(config)
    for step in (2, 0, 1):
        replayed = replay(learner, setup, bundles[step], bundles[step + 1])
        assert (replayed.step, replayed.exact, replayed.exact_state, replayed.max_difference) == (step, True, True, 0.0)
        assert replayed.max_change > 1e-3


def test_random_numbers_of_a_custom_loss_are_reproduced(run: Callable[..., Run], tiny: str, tmp_path: Path) -> None:
    """A custom loss that uses the random generators of Python, NumPy and torch."""
    (tmp_path / "dicey.py").write_text(
        "import random\nimport numpy\nimport torch\nfrom rlora.core.objectives.reinforce import Reinforce\n\n"
        "class Dicey(Reinforce):\n"
        "    def surrogate(self, log_ratio, logprobs, batch):\n"
        "        losses, figures = super().surrogate(log_ratio, logprobs, batch)\n"
        "        dice = random.random() + numpy.random.random() + torch.rand_like(losses)\n"
        "        return losses * dice, {**figures, 'dice': dice}\n"
    )
    config, bundles = run(f"{tmp_path}/dicey.py:Dicey")
    learner, setup = Learner(config, tiny), Setup.of(config)
    for _ in range(2):
        replayed = replay(learner, setup, bundles[1], bundles[2])
        assert (replayed.exact, replayed.exact_state) == (True, True)
        assert 0 < replayed.stats.objective_metrics["dice"] < 3


def test_a_different_loss_reports_the_difference(run: Callable[..., Run], tiny: str) -> None:
    config, bundles = run("grpo")
    other = Setup.of(replace(config, algorithm=replace(config.algorithm, kl=1.0)))
    replayed = replay(Learner(config, tiny), other, bundles[1], bundles[2])
    assert not replayed.exact
    assert 0 < replayed.max_difference < 10 * replayed.max_change


def test_a_forged_update_is_detected(run: Callable[..., Run], tiny: str, groups: list[Group]) -> None:
    config, bundles = run("reinforce")
    learner, setup = Learner(config, tiny), Setup.of(config)
    forged = [groups[0].with_rewards([0.0, 1.0]), *groups[1:]]
    assert not replay(learner, setup, bundles[0], replace(bundles[1], update=episodes.encode(forged))).exact
    assert replay(learner, setup, bundles[0], bundles[1]).exact
    with pytest.raises(RloraError, match=r"step 0: the bundle of version 1 has no episodes, because of"):
        replay(learner, setup, bundles[0], replace(bundles[1], update=None))


def test_bundles_of_two_histories_are_detected(run: Callable[..., Run], tiny: str) -> None:
    config, bundles = run("reinforce")
    learner, setup = Learner(config, tiny), Setup.of(config)
    with pytest.raises(
        RloraError, match=r"step 1: version 2 was made from 0123456789ab, not from the bundle of version 1"
    ):
        replay(learner, setup, bundles[1], replace(bundles[2], parent="0123456789abcdef"))


def test_a_state_of_a_different_base_is_refused(
    run: Callable[..., Run], config: Callable[..., Config], tiny: str, tmp_path: object
) -> None:
    _, bundles = run("reinforce")
    base = tiny_model("llama", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                      head_dim=8, initializer_range=0.25)  # fmt: skip
    base.save_pretrained(str(tmp_path))
    fresh = (other := Solo(config(learner={"rank": 2}), str(tmp_path))).adapter()
    with pytest.raises(
        RloraError, match=r"model = .*: the saved adapter was trained on a different base: .* nats apart"
    ):
        other.resume(bundles[2].state)
    assert other.resume() == fresh


def test_which_steps_can_be_replayed() -> None:
    assert updates([0, 1, 2, 5, 6, 9], None) == [0, 1, 5]
    assert updates([0, 1, 2], 1) == [1]
    with pytest.raises(RloraError, match=r"--step 2: .* versions 2 and 3; use one of .* kept: \[0, 1\]"):
        updates([0, 1, 2], 2)


def test_steps_with_damaged_or_missing_bundles_are_skipped(
    tmp_path: Path, bundle: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    run = UPath(tmp_path)
    write_provenance(tmp_path)
    for version in range(1, 6):
        write_directory(bundle_path(run, version), bundle(version).files)
    (bundle_path(run, 2) / "state.safetensors").write_bytes(b"cut")
    shutil.rmtree(bundle_path(run, 5))  # removed meanwhile
    assert [(start.version, end.version) for start, end in pairs(run, [1, 2, 3, 4])] == [(3, 4)]
    warning = capsys.readouterr().err
    assert warning.count("is skipped: ") == 3
    assert "step 2 is skipped: " in warning
    with pytest.raises(RloraError, match=r"state\.safetensors: damaged"):
        list(pairs(run, [2]))
