"""User-defined objectives load by name, and errors name their file and line."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import Solo, group

from rlora.config import validate
from rlora.core.batch import Sample, sample_of
from rlora.core.learner import Learner
from rlora.core.objectives import objective_of
from rlora.core.optimizer import Adam
from rlora.core.setup import Setup
from rlora.records import Group, RloraError
from rlora.settings import Config

MakeConfig = Callable[..., Config]

# Defines every member of the protocol, without a base class.
FULL = """
import torch

class BestOfGroup:
    \"\"\"Supervised learning on the best episode of each group.\"\"\"

    needs = needs_first = frozenset()
    whole_groups = entropies = whitens = False
    skips_zeros = True

    def __init__(self, algorithm, max_tokens):
        pass

    def learns_from(self, episode):
        return episode.sampled_tokens > 0

    def advantages(self, group, samples):
        best = max(group.rewards)
        return [torch.full_like(s.tokens.weights, float(s.episode.reward == best)) for s in samples]

    def weights(self, groups):
        total = sum(episode.sampled_tokens for group in groups for episode in group.episodes)
        return lambda episode: 1 / total

    def loss(self, now, batch):
        learned = batch.tokens.advantages
        return -(learned * now.logprobs * batch.tokens.weights).sum(), {"share_learned": learned, "loss": learned * 7}
"""
# Inherits the protocol's defaults: supervised learning on rewarded episodes.
DEFAULTS = """
import torch
from rlora import Objective

class Rewarded(Objective):
    def advantages(self, group, samples):
        return [torch.full_like(s.tokens.weights, s.episode.reward) for s in samples]

    def loss(self, now, batch):
        return -(batch.tokens.advantages * now.logprobs * batch.tokens.weights).sum(), {}
"""
# Replaces only the surrogate of the built-in policy gradient.
SURROGATE = """
from rlora.core.loss import ratio_of
from rlora.core.objectives.policy_gradient import PolicyGradient

class Squared(PolicyGradient):
    def surrogate(self, log_ratio, logprobs, batch):
        return -ratio_of(log_ratio) * batch.tokens.advantages + 0.1 * log_ratio.square(), {}
"""


def solo(config: MakeConfig, base: str, file: Path, text: str, **settings: object) -> Solo:
    file.write_text(text)
    name = text.partition("class ")[2].partition(":")[0].partition("(")[0]
    return Solo(config(learner={"lr": 0.01}, algorithm={"name": f"{file}:{name}"} | settings), base)


def logprob(learner: Solo, groups: list[Group], number: int) -> float:
    """The logprob of an episode of the first group."""
    sample = sample_of(groups[0].prompt.token_ids, groups[0].episodes[number])
    return float(learner.learner.forward("run", [[sample]])[0][0].sum())


@pytest.mark.parametrize("text", [FULL, DEFAULTS, SURROGATE])
def test_an_objective_of_fewer_than_50_lines_plugs_in(
    text: str, tiny: str, config: MakeConfig, groups: list[Group], tmp_path: Path
) -> None:
    assert len(text.splitlines()) < 50
    learner = solo(config, tiny, tmp_path / "mine.py", text)
    before = [logprob(learner, groups, number) for number in (0, 1)]
    for _ in range(5):
        _, stats = learner.update(groups)
    after = [logprob(learner, groups, number) for number in (0, 1)]
    assert after[0] > before[0]  # the episode with the reward
    assert stats.skipped_in_a_row == 0
    if text is FULL:
        assert stats.objective_metrics == {"share_learned": 1.0}
        assert stats.kl_behaviour is None
    elif text is SURROGATE:
        assert stats.kl_behaviour is not None
    state = learner.state()
    straight = learner.update(groups)[0]
    learner.resume(state)
    assert learner.update(groups)[0] == straight


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FULL.replace("return [torch.full_like", "return samples and [torch.zeros(99)] or [torch.full_like"),
         r".*mine\.py:BestOfGroup.: its advantages have the shapes \[\(99,\)\]; .* \[3, 2\] tokens"),
        (FULL.replace("-(learned", "-(undefined"), r"mine\.py:27: algorithm\.name = .*NameError: name .undefined."),
        (FULL.replace(".sum(), {", ", {"), "grad can be implicitly created only for scalar outputs"),
        (FULL.replace("BestOfGroup:", "Other:"), "mine.py has no 'BestOfGroup'"),
        (FULL.replace("(self, algorithm, max_tokens)", "(self)"), "BestOfGroup.: its constructor raised TypeError"),
        (FULL.replace("skips_zeros", "skips"), r"mine.py:BestOfGroup.: the objective has no skips_zeros; define each"),
        (FULL.replace("frozenset()", "frozenset([Need.VALUES])").replace(
            "import torch", "import torch\nfrom rlora.core.objectives.objective import Need"
        ), "needs .'VALUES'., but algorithm.advantage = 'centred'"),
    ],
    ids=["shapes", "error", "no sum", "name", "init", "member", "values"],
)  # fmt: skip
def test_errors_of_an_objective_name_its_file_and_line(
    text: str, message: str, tiny: str, config: MakeConfig, groups: list[Group], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(text)
    settings = config(algorithm={"name": f"{tmp_path}/mine.py:BestOfGroup"})
    with pytest.raises((RloraError, RuntimeError), match=message):
        Solo(settings, tiny).update(groups)


def test_an_unknown_name_is_refused_and_the_known_names_are_listed() -> None:
    values = {"model": "-", "env": "-", "reward": "-"}
    with pytest.raises(RloraError, match=r"algorithm\.name = 'grop': it should be 'reinforce', 'grpo',.*docs/alg"):
        validate(values | {"algorithm": {"name": "grop"}})
    with pytest.raises(RloraError, match=r"algorithm\.name = 'gone\.py:Mine': there is no file gone\.py"):
        objective_of(validate(values | {"algorithm": {"name": "gone.py:Mine"}}).algorithm, 8)


def test_gradients_add_up_over_requests_and_each_step_has_its_settings(
    tiny: str, config: MakeConfig, groups: list[Group]
) -> None:
    """The learner's methods as a server uses them: a loss with each request, and Adam's settings with each step."""
    learner = Learner(config(), tiny)
    for name in ("parts", "whole"):
        learner.open(name, Setup(seed=3))

    def cross_entropy(now: object, batch: object) -> object:
        return -(now.logprobs * batch.tokens.weights).sum(), {"logprobs": now.logprobs}  # type: ignore[attr-defined]

    samples = non_empty_samples(groups)
    before = learner.forward("whole", samples)
    whole = learner.forward_backward("whole", samples, cross_entropy)  # type: ignore[arg-type]
    sums = whole.sums
    assert shapes(whole.outputs) == shapes(before)
    assert all(torch.equal(a, b) for a, b in zip(chain(*whole.outputs), chain(*before), strict=True))
    in_parts = [
        learner.forward_backward("parts", [group_samples], cross_entropy).sums  # type: ignore[arg-type]
        for group_samples in samples
    ]
    assert sum(part["loss"] for part in in_parts) == pytest.approx(sums["loss"], rel=1e-5)
    assert sum(part["tokens"] for part in in_parts) == sums["tokens"] == 15
    steps = [
        learner.optim_step(name, Adam(lr=0.01, weight_decay=0.1, max_grad_norm=0.5)) for name in ("parts", "whole")
    ]
    assert steps[0].grad_norm == pytest.approx(steps[1].grad_norm, rel=1e-4)
    assert all(step.stepped for step in steps)
    totals = [torch_sum(learner.forward(name, samples)) for name in ("parts", "whole")]
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)
    assert not learner.optim_step("parts", Adam(lr=0.01)).stepped  # the step cleared the gradient
    assert learner.optim_step("parts", Adam(lr=0.01)).grad_norm == 0.0
    adapter = learner.next_version("parts")
    assert (adapter.number, adapter.version) == (1, learner.adapter("parts").version)
    assert adapter.canary
    assert learner.adapter("whole").number == 0


def test_an_error_in_a_loss_drops_the_accumulated_gradient(tiny: str, config: MakeConfig, groups: list[Group]) -> None:
    learner = Learner(config(learner={"microbatch_tokens": 8}), tiny)
    learner.open("run", Setup(learner=config(learner={"microbatch_tokens": 8}).learner))
    samples = non_empty_samples(groups)
    calls = 0

    def faulty(now: object, batch: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise ValueError("the second row")
        return now.logprobs.sum(), {}  # type: ignore[attr-defined]

    with pytest.raises(ValueError, match="the second row"):
        learner.forward_backward("run", samples, faulty)  # type: ignore[arg-type]
    assert not learner.optim_step("run", Adam(lr=0.01)).stepped


def non_empty_samples(groups: list[Group]) -> list[list[Sample]]:
    return [
        [sample_of(group.prompt.token_ids, episode) for episode in group.episodes if episode.sampled_tokens]
        for group in groups
    ]


def shapes(outputs: list[list[torch.Tensor]]) -> list[list[torch.Size]]:
    return [[tensor.shape for tensor in tensors] for tensors in outputs]


def torch_sum(outputs: list[list[torch.Tensor]]) -> float:
    return float(sum(tensor.sum() for tensors in outputs for tensor in tensors))


def test_an_empty_group_is_nothing_to_learn_from(tiny: str, config: MakeConfig) -> None:
    learner = Solo(config(), tiny)
    assert learner.update([group([5])])[1].tokens == 0
