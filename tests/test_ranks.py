"""Learners in separate processes compute what a learner in this process computes, also if one dies."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import ray
import safetensors.torch
from conftest import episode, group
from upath import UPath
from witness import HOME, base, is_home

from rlora import cluster
from rlora.cluster.ranks import Ranks
from rlora.core.batch import Sample, sample_of
from rlora.core.learner import Learner
from rlora.core.optimizer import Adam
from rlora.core.setup import Setup
from rlora.core.state import is_by_position
from rlora.records import Group, RloraError
from rlora.run import checkpoint
from rlora.run.replay import replay
from rlora.settings import Config

pytestmark = pytest.mark.vllm

GROUPS = [
    group([3, 4, 5], episode([6, 7, 8], 1.0, [-3.0, -4.0, -2.0]), episode([9, 10], 0.0, [-3.5, -4.0])),
    group([5, 6], episode([7, 8], 0.0, [-3.0, -4.0]), episode([11, 12, 13, 14], 1.0, [-2.0, -3.0, -4.0, -3.0])),
]


@contextmanager
def ranks(config: Config, base: str) -> Iterator[Ranks]:
    with cluster._processes(config, base) as actors:
        learners = actors.start_learners()
        actors.wait()
        yield Ranks(actors.start_learners, learners, config.restarts)


def kill(learners: Ranks, rank: int = 0) -> None:
    """Kill a learner's process after its pending calls."""
    actor: Any = learners._remotes[rank].actor
    _, pid = ray.get(actor.process.remote())
    os.kill(pid, signal.SIGKILL)


def setups(config: Callable[..., Config]) -> dict[str, Setup]:
    changes: dict[str, dict[str, Any]] = {
        "one": {"learner": {"lr": 0.01}},
        "two": {"learner": {"lr": 0.02, "rank": 2}, "algorithm": {"name": "ppo", "minibatches": 2}, "seed": 1},
    }
    return {name: Setup.of(config(**fields)) for name, fields in changes.items()}


def samples(groups: Sequence[Group]) -> list[list[Sample]]:
    return [
        [sample_of(group.prompt.token_ids, episode, episode.reward or 0.0) for episode in group.episodes]
        for group in groups
    ]


def test_a_death_changes_no_bit(tiny: str, config: Callable[..., Config]) -> None:
    """During concurrent updates, with accumulated gradients, and after a policy was closed."""
    settings, policies = config(), setups(config)
    local = Learner(settings, tiny)
    scale = 2.0

    def loss(now: Any, batch: Any) -> Any:
        return scale * (now.logprobs * batch.tokens.advantages).sum(), {"logprobs": now.logprobs}

    with ranks(settings, tiny) as remote:
        for name, setup in policies.items():
            assert remote.open(name, setup) == local.open(name, setup)
        remote.open("closed", policies["one"])
        waits = {name: remote.start_update(name, GROUPS) for name in policies}
        kill(remote)
        remote.close("closed")
        for name, wait in waits.items():
            assert wait()[0] == local.update(name, GROUPS)[0]
            assert remote.state(name) == local.state(name)
        for part in samples(GROUPS):
            actual, expected = (learner.forward_backward("one", [part], loss) for learner in (remote, local))
            assert actual.sums == expected.sums
            assert all(a.equal(b) for a, b in zip(actual.outputs[0], expected.outputs[0], strict=True))
        kill(remote)
        assert remote.optim_step("one", Adam(lr=0.01)) == local.optim_step("one", Adam(lr=0.01))
        assert remote.next_version("one") == local.next_version("one")
        assert remote.state("one") == local.state("one")
        forward = [learner.forward("two", samples(GROUPS)) for learner in (remote, local)]
        assert all(a.equal(b) for a, b in zip(*(chain(*outputs) for outputs in forward), strict=True))
        assert remote.adapter("two") == local.adapter("two")


def test_an_older_bundle_replays_in_a_separate_process() -> None:
    """Its state names tensors by position, so it is compared with the state that the learner returns."""
    before, after = (checkpoint.read(UPath(HOME / "grpo-kl" / str(version))) for version in range(2))
    assert is_by_position(safetensors.torch.load(after.state))
    with base() as path, ranks(before.config, path) as remote:
        replayed = replay(remote, Setup.of(before.config), before, after)  # type: ignore[arg-type]
    if is_home(before.origin.machine):
        assert (replayed.exact, replayed.exact_state) == (True, True)
    assert replayed.max_difference < 1e-2 * replayed.max_change


FAULTY = """
from rlora import Objective
import torch

class Faulty(Objective):
    def advantages(self, group, samples):
        return [torch.full_like(s.tokens.weights, s.episode.reward) for s in samples]

    def loss(self, now, batch):
        if torch.distributed.get_rank() == 0:
            raise ValueError("not on this rank")
        return -(now.logprobs * batch.tokens.advantages).sum(), {}
"""


def test_an_error_in_one_learner_ends_only_its_policy(tiny: str, config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    settings = config(learner={"replicas": 2})
    faulty = config(learner={"replicas": 2}, algorithm={"name": f"{tmp_path}/faulty.py:Faulty"})
    with ranks(settings, tiny) as remote:
        fresh = remote.open("one", Setup.of(settings))
        remote.open("bad", Setup.of(faulty))
        waits = [remote.start_update(name, GROUPS) for name in ("bad", "one")]
        with pytest.raises(RloraError, match=r"faulty\.py:11: algorithm\.name = .*ValueError: not on this rank"):
            waits[0]()
        remote.close("bad")
        adapter, stats = waits[1]()
        assert (adapter.number, stats.skipped_in_a_row) == (1, 0)
        assert adapter.weights != fresh.weights
        total = lambda now, batch: (now.logprobs.sum(), {})  # noqa: E731
        sums = [remote.forward_backward("one", part, total).sums for part in (samples(GROUPS), [[], []])]
        assert [row["tokens"] for row in sums] == [11, 0]
        assert remote.optim_step("one", Adam(lr=0.01)).stepped
