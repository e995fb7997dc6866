"""Many policies in one engine, at the same version number: each token is its own policy's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import ROOT, marked, samples

from rlora import cluster
from rlora.core.learner import Learner
from rlora.core.peft_format import fill
from rlora.core.setup import Setup
from rlora.records import BASE, Adapter, DeliveryError, Group, Sampling, StaleError, Version
from rlora.rollout.task import ServedPolicy, Task, load_task
from rlora.settings import Config

pytestmark = pytest.mark.vllm
SPECS = [(1, "all"), (2, "mlp"), (8, "attention"), (1, "mlp"), (8, "all"), (2, "attention"), (4, "all"), (1, "all")]
NAMES = [f"policy-{number}" for number in range(len(SPECS))]
SAMPLING = Sampling(max_tokens=12, group_size=1)


@dataclass(frozen=True)
class Many:
    learner: Learner
    task: Task
    engine: Any  # a FaultyEngine, in its actor
    made: dict[Version, Adapter]

    def next(self, name: str, seed: int) -> Adapter:
        """Another version of a policy: every B random, as far from the base as some ten updates bring it."""
        held, generator = self.learner.held[name], torch.Generator().manual_seed(seed)
        for pair in self.learner.policies.bank.over(name).values():
            pair.b.data.copy_(torch.randn(pair.b.shape, generator=generator) * 4e-3)
        held.number += 1
        held.canary = self.learner.canary_of(held)
        adapter = self.learner.adapter(name)
        self.made[adapter.version] = adapter
        return adapter

    def ask(self, version: Version, count: int) -> list[Any]:
        return [self.engine.generate(prompt, SAMPLING, version) for prompt in self.task.prompts[:count]]

    def off(self, groups: Sequence[Group], version: Version) -> torch.Tensor:
        """How far the engine's logprobs are from those of a version, nats a token."""
        name = None if version == BASE.version else version.policy
        if name:
            fill(self.learner.policies.bank, name, safetensors.torch.load(self.made[version].weights))
        policy = name or NAMES[0]
        asked = samples(groups)
        said = self.learner.forward(policy, asked, reference=name is None)
        behaviour = torch.cat([sample.tokens.behaviour_logprobs for group in asked for sample in group])
        return (behaviour - torch.cat([logprobs for group in said for logprobs in group])).abs()


@pytest.fixture(scope="module")
def many(config: Callable[..., Config]) -> Iterator[Many]:
    shared = config(
        learner={"rank": 8}, max_staleness=14, engine={"max_num_seqs": 160},
        sampling={"max_tokens": 16, "max_prompt_tokens": 48},
    )  # fmt: skip
    task = load_task(shared)
    learner = Learner(shared, task.base)
    for seed, (name, (rank, targets)) in enumerate(zip(NAMES, SPECS, strict=True)):
        own = replace(shared, seed=seed, learner=replace(shared.learner, rank=rank, targets=targets))
        learner.open(name, Setup.of(own))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "ENGINE", f"{ROOT / 'tests' / 'faulty_engine.py'}:FaultyEngine")
        with cluster.start([ServedPolicy(NAMES[0], shared, task)], learn=False) as job:
            fleet = job.fleet
            yield Many(learner, task, fleet.engines[0], {})


def test_eight_policies_at_one_number_and_the_base_each_say_their_own_tokens(many: Many) -> None:
    """144 requests in one engine; half of the policies get their next version while those are in flight."""
    first = [many.next(name, seed) for seed, name in enumerate(NAMES)]
    for adapter in first:
        many.engine.load(adapter).result()
    assert {adapter.number for adapter in first} == {1}
    asked = {adapter.version: many.ask(adapter.version, 10) for adapter in first}
    asked[BASE.version] = many.ask(BASE.version, 16)
    later = [many.next(name, 10 + seed) for seed, name in enumerate(NAMES) if seed % 2]
    for adapter in later:
        many.engine.load(adapter).result()
        asked[adapter.version] = many.ask(adapter.version, 12)
    assert sum(map(len, asked.values())) == 144
    assert not all(each.done() for of in asked.values() for each in of)  # they overlap
    found = {version: [each.result() for each in of] for version, of in asked.items()}
    for version, groups in found.items():
        assert {episode.version for group in groups for episode in group.episodes} == {version}
    doubled = {version: marked([_twice(group) for group in groups]) for version, groups in found.items()}
    for (version, groups), beside in zip(doubled.items(), [*list(doubled)[1:], first[0].version], strict=True):
        own = many.off(groups, version)
        assert own.max() < 1e-3
        for other in {beside, BASE.version} - {version}:
            assert many.off(groups, other).mean() > 20 * own.mean(), (version, other)
    # those whose next version came went with their last lease, and no other did
    newest = [adapter.version for adapter in first if adapter.policy not in {each.policy for each in later}]
    assert set(many.engine.versions().result()) == {*newest, *(adapter.version for adapter in later)}
    assert set(many.engine.stats().result().canaries) == set(NAMES)


def _twice(group: Group) -> Group:
    """With its one episode twice, so that rewards can differ, and its tokens are computed."""
    return replace(group, episodes=group.episodes * 2)


def test_a_corrupted_version_stops_its_own_policy_alone(many: Many) -> None:
    for name in NAMES:  # a test of its own may be run alone
        many.engine.load(many.next(name, 100)).result()
    before = many.engine.versions().result()
    flying = {version: many.ask(version, 4) for version in before}
    many.engine.fail("a flipped byte", ("slots",)).result()
    spoilt = many.next(NAMES[0], 200)
    with pytest.raises(DeliveryError, match=f"adapter {NAMES[0]}-v{spoilt.number}-.*: the engine does not serve it"):
        many.engine.load(spoilt).result()
    for version, of in flying.items():
        assert {episode.version for each in of for episode in each.result().episodes} == {version}
    assert many.engine.versions().result() == before


def test_a_policy_leaves_and_takes_its_versions_and_requests_along(many: Many) -> None:
    adapters = {name: many.next(name, 300) for name in NAMES[:2]}
    for adapter in adapters.values():
        many.engine.load(adapter).result()
    leaving, staying = (many.ask(adapter.version, 4) for adapter in adapters.values())
    many.engine.leave(NAMES[0]).result()
    for each in leaving:
        with pytest.raises(StaleError, match="its policy has left"):
            each.result()
    assert all(len(each.result().episodes) == 1 for each in staying)
    assert NAMES[0] not in {version.policy for version in many.engine.versions().result()}
    assert NAMES[0] not in many.engine.stats().result().canaries
    held = many.engine.versions().result()
    assert len(many.engine.loaded().result()) == len(held)
