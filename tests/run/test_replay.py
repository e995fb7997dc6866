import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ORIGIN, Solo, tiny_model, write_provenance
from upath import UPath

from rlora.core.learner import Learner
from rlora.core.setup import Setup
from rlora.records import Cursor, Group, RloraError
from rlora.run import episodes
from rlora.run.checkpoint import Bundle, bundle_path
from rlora.run.replay import pairs, replay, updates
from rlora.settings import Config
from rlora.store import write_directory

Run = tuple[Config, list[Bundle]]
ALGORITHMS = ["reinforce", "grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "ppo"]


@pytest.fixture
def run(tiny: str, config: Callable[..., Config], groups: list[Group]) -> Callable[..., Run]:
    """The bundles of three steps by one learner, without a break."""

    def make(algorithm: str, **settings: object) -> Run:
        steps = {"epochs": 2, "minibatches": 2} | ({"kl": 0.1} if algorithm == "grpo" else {})
        own = config(algorithm={"name": algorithm} | steps, learner={"lr": 0.01, "rank": 2} | settings)
        learner = Solo(own, tiny)
        bundles = [Bundle(ORIGIN, learner.adapter(), learner.state(), Cursor(), own)]
        for order in (groups, groups[::-1], groups):
            adapter, _ = learner.update(order)
            before, update = bundles[-1].adapter.digest, episodes.encode(order)
            bundles.append(Bundle(ORIGIN, adapter, learner.state(), Cursor(), own, update, before))
        return own, bundles

    return make


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_update_comes_out_bit_for_bit_in_another_process_s_learner(
    algorithm: str, run: Callable[..., Run], tiny: str
) -> None:
    """In any order: an update depends on its bundle and on nothing that the learner did before."""
    config, bundles = run(algorithm)
    learner, setup = Learner(config, tiny), Setup.of(config)
    for step in (2, 0, 1):
        replayed = replay(learner, setup, bundles[step], bundles[step + 1])
        assert (replayed.step, replayed.exact, replayed.exact_state, replayed.off) == (step, True, True, 0.0)
        assert replayed.moved > 1e-3


def test_what_a_user_s_loss_draws_is_drawn_again(run: Callable[..., Run], tiny: str, tmp_path: Path) -> None:
    """A loss of the user's own that throws dice: Python's, NumPy's and torch's."""
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
        assert 0 < replayed.stats.others["dice"] < 3


def test_another_loss_is_told_by_how_much_it_differs(run: Callable[..., Run], tiny: str) -> None:
    config, bundles = run("grpo")
    other = Setup.of(replace(config, algorithm=replace(config.algorithm, kl=1.0)))
    replayed = replay(Learner(config, tiny), other, bundles[1], bundles[2])
    assert not replayed.exact
    assert 0 < replayed.off < 10 * replayed.moved


def test_a_forged_update_is_found(run: Callable[..., Run], tiny: str, groups: list[Group]) -> None:
    config, bundles = run("reinforce")
    learner, setup = Learner(config, tiny), Setup.of(config)
    forged = [groups[0].with_rewards([0.0, 1.0]), *groups[1:]]
    assert not replay(learner, setup, bundles[0], replace(bundles[1], update=episodes.encode(forged))).exact
    assert replay(learner, setup, bundles[0], bundles[1]).exact
    with pytest.raises(RloraError, match=r"step 0: the bundle of version 1 keeps no episodes \(config: checkpoint"):
        replay(learner, setup, bundles[0], replace(bundles[1], update=None))


def test_bundles_of_two_histories_are_told_apart(run: Callable[..., Run], tiny: str) -> None:
    config, bundles = run("reinforce")
    learner, setup = Learner(config, tiny), Setup.of(config)
    with pytest.raises(RloraError, match=r"step 1: version 2 was not made from the version 1 that is there"):
        replay(learner, setup, bundles[1], replace(bundles[2], parent="0123456789abcdef"))


def test_a_state_of_another_base_is_refused(
    run: Callable[..., Run], config: Callable[..., Config], tiny: str, tmp_path: object
) -> None:
    _, bundles = run("reinforce")
    base = tiny_model("llama", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                      head_dim=8, initializer_range=0.25)  # fmt: skip
    base.save_pretrained(str(tmp_path))
    before = (other := Solo(config(learner={"rank": 2}), str(tmp_path))).adapter()
    with pytest.raises(RloraError, match=r"model = .*: the saved adapter was trained over another base: .* nats apart"):
        other.resume(bundles[2].state)
    assert other.resume() == before


def test_which_steps_can_be_replayed() -> None:
    assert updates([0, 1, 2, 5, 6, 9], None) == [0, 1, 5]
    assert updates([0, 1, 2], 1) == [1]
    with pytest.raises(RloraError, match=r"--step 2: .* versions 2 and 3, and both are there for the steps \[0, 1\]"):
        updates([0, 1, 2], 2)


def test_steps_whose_bundles_are_not_whole_are_passed_over(
    tmp_path: Path, bundle: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    run = UPath(tmp_path)
    write_provenance(tmp_path)
    for version in range(1, 6):
        write_directory(bundle_path(run, version), bundle(version).files)
    (bundle_path(run, 2) / "state.safetensors").write_bytes(b"cut")
    shutil.rmtree(bundle_path(run, 5))  # retired meanwhile
    found = [(before.version, after.version) for before, after in pairs(run, [1, 2, 3, 4])]
    assert found == [(3, 4)]
    said = capsys.readouterr().err
    assert said.count("is passed over: ") == 3
    assert "step 2 is passed over: " in said
    with pytest.raises(RloraError, match=r"state\.safetensors: it is damaged"):
        list(pairs(run, [2]))
