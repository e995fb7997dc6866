"""Many policies in one engine, at the same version number: each token is sampled by the right policy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import ROOT, marked, samples

from rlora import cluster
from rlora.cluster import processes
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
    adapters: dict[Version, Adapter]

    def next(self, name: str, seed: int) -> Adapter:
        """The next version of a policy, with random B, as far from the base as after about ten updates."""
        held, generator = self.learner.states[name], torch.Generator().manual_seed(seed)
        for pair in self.learner.policies.bank.pairs_of(name).values():
            pair.b.data.copy_(torch.randn(pair.b.shape, generator=generator) * 4e-3)
        held.number += 1
        held.canary = self.learner.canary_of(held)
        adapter = self.learner.adapter(name)
        self.adapters[adapter.version] = adapter
        return adapter

    def generate(self, version: Version, count: int) -> list[Any]:
        return [self.engine.generate(prompt, SAMPLING, version) for prompt in self.task.prompts[:count]]

    def differences(self, groups: Sequence[Group], version: Version) -> torch.Tensor:
        """Absolute difference of each token's logprob between engine and learner under a version, in nats."""
        name = None if version == BASE.version else version.policy
        if name:
            fill(self.learner.policies.bank, name, safetensors.torch.load(self.adapters[version].weights))
        policy = name or NAMES[0]
        inputs = samples(groups)
        outputs = self.learner.forward(policy, inputs, reference=name is None)
        behaviour = torch.cat([sample.tokens.behaviour_logprobs for group in inputs for sample in group])
        return (behaviour - torch.cat([logprobs for group in outputs for logprobs in group])).abs()


@pytest.fixture(scope="module")
def many(config: Callable[..., Config]) -> Iterator[Many]:
    shared = config(
        learner={"rank": 8}, max_staleness=14, engine={"max_num_seqs": 160},
        sampling={"max_tokens": 16, "max_prompt_tokens": 48},
    )  # fmt: skip
    task = load_task(shared)
    learner = Learner(shared, task.base)
    for seed, (name, (rank, targets)) in enumerate(zip(NAMES, SPECS, strict=True)):
        settings = replace(shared, seed=seed, learner=replace(shared.learner, rank=rank, targets=targets))
        learner.open(name, Setup.of(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "ENGINE", f"{ROOT / 'tests' / 'faulty_engine.py'}:FaultyEngine")
        with cluster.start([ServedPolicy(NAMES[0], shared, task)], learn=False) as job:
            fleet = job.fleet
            yield Many(learner, task, fleet.engines[0], {})


def test_eight_policies_at_one_number_and_the_base_each_sample_their_own_tokens(many: Many) -> None:
    """144 requests in one engine. Half of the policies get their next version while requests are in flight."""
    first = [many.next(name, seed) for seed, name in enumerate(NAMES)]
    for adapter in first:
        many.engine.load(adapter).result()
    assert {adapter.number for adapter in first} == {1}
    futures = {adapter.version: many.generate(adapter.version, 10) for adapter in first}
    futures[BASE.version] = many.generate(BASE.version, 16)
    later = [many.next(name, 10 + seed) for seed, name in enumerate(NAMES) if seed % 2]
    for adapter in later:
        many.engine.load(adapter).result()
        futures[adapter.version] = many.generate(adapter.version, 12)
    assert sum(map(len, futures.values())) == 144
    assert not all(future.done() for row in futures.values() for future in row)  # they overlap
    sampled = {version: [future.result() for future in row] for version, row in futures.items()}
    for version, groups in sampled.items():
        assert {episode.version for group in groups for episode in group.episodes} == {version}
    doubled = {version: marked([_twice(group) for group in groups]) for version, groups in sampled.items()}
    for (version, groups), neighbour in zip(doubled.items(), [*list(doubled)[1:], first[0].version], strict=True):
        differences = many.differences(groups, version)
        assert differences.max() < 1e-3
        for wrong in {neighbour, BASE.version} - {version}:
            assert many.differences(groups[:2], wrong).mean() > 20 * differences.mean(), (version, wrong)
    # only versions that were replaced have been unloaded, with their last lease
    replaced = {adapter.policy for adapter in later}
    newest = [adapter.version for adapter in first if adapter.policy not in replaced]
    assert set(many.engine.versions().result()) == {*newest, *(adapter.version for adapter in later)}
    assert set(many.engine.stats().result().canaries) == set(NAMES)


def _twice(group: Group) -> Group:
    """The group with its episode twice: the learner computes a group only if rewards differ."""
    return replace(group, episodes=group.episodes * 2)


def test_a_corrupted_version_stops_its_own_policy_alone(many: Many) -> None:
    for name in NAMES:  # the test may run alone
        many.engine.load(many.next(name, 100)).result()
    versions = many.engine.versions().result()
    futures = {version: many.generate(version, 4) for version in versions}
    many.engine.fail("a flipped byte", ("slots",)).result()
    corrupted = many.next(NAMES[0], 200)
    with pytest.raises(DeliveryError, match=f"adapter {NAMES[0]}-v{corrupted.number}-.*: the engine does not serve it"):
        many.engine.load(corrupted).result()
    for version, row in futures.items():
        assert {episode.version for future in row for episode in future.result().episodes} == {version}
    assert many.engine.versions().result() == versions


def test_a_policy_leaves_with_its_versions_and_requests(many: Many) -> None:
    adapters = {name: many.next(name, 300) for name in NAMES[:2]}
    for adapter in adapters.values():
        many.engine.load(adapter).result()
    leaving, staying = (many.generate(adapter.version, 4) for adapter in adapters.values())
    many.engine.leave(NAMES[0]).result()
    for future in leaving:
        with pytest.raises(StaleError, match=r"policy [\w-]+ has left"):
            future.result()
    assert all(len(future.result().episodes) == 1 for future in staying)
    assert NAMES[0] not in {version.policy for version in many.engine.versions().result()}
    assert NAMES[0] not in many.engine.stats().result().canaries
    versions = many.engine.versions().result()
    assert len(many.engine.lora_ids().result()) == len(versions)
