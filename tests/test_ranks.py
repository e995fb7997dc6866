"""Learners in processes of their own: what is computed is what one in this process computes, also where one dies."""

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
    with cluster._crew(config, base) as crew:
        learners = crew.learners()
        crew.wait()
        yield Ranks(crew.learners, learners, config.restarts)


def kill(made: Ranks, rank: int = 0) -> None:
    """End a learner's process, once it has done what it was asked to."""
    actor: Any = made._remotes[rank].actor
    _, pid = ray.get(actor.place.remote())
    os.kill(pid, signal.SIGKILL)


def setups(config: Callable[..., Config]) -> dict[str, Setup]:
    changes: dict[str, dict[str, Any]] = {
        "one": {"learner": {"lr": 0.01}},
        "two": {"learner": {"lr": 0.02, "rank": 2}, "algorithm": {"name": "ppo", "minibatches": 2}, "seed": 1},
    }
    return {name: Setup.of(config(**each)) for name, each in changes.items()}


def samples(groups: Sequence[Group]) -> list[list[Sample]]:
    return [[sample_of(each.prompt.token_ids, of, of.reward or 0.0) for of in each.episodes] for each in groups]


def test_a_death_changes_no_bit(tiny: str, config: Callable[..., Config]) -> None:
    """Of updates that go on meanwhile, of gradients that were added up, and of what was closed before."""
    settings, known = config(), setups(config)
    here = Learner(settings, tiny)
    scale = 2.0

    def loss(now: Any, batch: Any) -> Any:
        return scale * (now.logprobs * batch.tokens.advantages).sum(), {"logprobs": now.logprobs}

    with ranks(settings, tiny) as there:
        for name, setup in known.items():
            assert there.open(name, setup) == here.open(name, setup)
        there.open("gone", known["one"])
        waits = {name: there.start_update(name, GROUPS) for name in known}
        kill(there)
        there.close("gone")
        for name, wait in waits.items():
            assert wait()[0] == here.update(name, GROUPS)[0]
            assert there.state(name) == here.state(name)
        for part in samples(GROUPS):
            theirs, ours = (each.forward_backward("one", [part], loss) for each in (there, here))
            assert theirs.sums == ours.sums
            assert all(a.equal(b) for a, b in zip(theirs.outputs[0], ours.outputs[0], strict=True))
        kill(there)
        assert there.optim_step("one", Adam(lr=0.01)) == here.optim_step("one", Adam(lr=0.01))
        assert there.next_version("one") == here.next_version("one")
        assert there.state("one") == here.state("one")
        forward = [each.forward("two", samples(GROUPS)) for each in (there, here)]
        assert all(a.equal(b) for a, b in zip(*(chain(*each) for each in forward), strict=True))
        assert there.adapter("two") == here.adapter("two")


def test_an_older_bundle_replays_by_a_process_of_its_own() -> None:
    """Its state names tensors by position, and is compared with what the learner says of it."""
    before, after = (checkpoint.read(UPath(HOME / "grpo-kl" / str(version))) for version in range(2))
    assert is_by_position(safetensors.torch.load(after.state))
    with base() as path, ranks(before.config, path) as there:
        replayed = replay(there, Setup.of(before.config), before, after)  # type: ignore[arg-type]
    if is_home(before.origin.machine):
        assert (replayed.exact, replayed.exact_state) == (True, True)
    assert replayed.off < 1e-2 * replayed.moved


FAULTY = """
from rlora import Objective
import torch

class Faulty(Objective):
    def advantages(self, group, samples):
        return [torch.full_like(s.tokens.weights, s.episode.reward) for s in samples]

    def loss(self, now, batch):
        if torch.distributed.get_rank() == 0:
            raise ValueError("not on this one")
        return -(now.logprobs * batch.tokens.advantages).sum(), {}
"""


def test_an_error_of_one_of_two_ends_its_policy_alone(tiny: str, config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    settings = config(learner={"replicas": 2})
    mine = config(learner={"replicas": 2}, algorithm={"name": f"{tmp_path}/faulty.py:Faulty"})
    with ranks(settings, tiny) as there:
        before = there.open("one", Setup.of(settings))
        there.open("bad", Setup.of(mine))
        waits = [there.start_update(name, GROUPS) for name in ("bad", "one")]
        with pytest.raises(RloraError, match=r"faulty\.py:11: algorithm\.name = .*ValueError: not on this one"):
            waits[0]()
        there.close("bad")
        adapter, stats = waits[1]()
        assert (adapter.number, stats.skipped_in_a_row) == (1, 0)
        assert adapter.weights != before.weights
        total = lambda now, batch: (now.logprobs.sum(), {})  # noqa: E731
        sums = [there.forward_backward("one", part, total).sums for part in (samples(GROUPS), [[], []])]
        assert [each["tokens"] for each in sums] == [11, 0]
        assert there.optim_step("one", Adam(lr=0.01)).stepped
