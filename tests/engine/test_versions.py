"""Several versions in an engine at a time, and engines that fail. In fp32, with versions one update apart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import ray
import safetensors.torch
import torch
from conftest import ROOT, Solo, marked, samples

from rlora import cluster
from rlora.cluster import processes
from rlora.config import validate
from rlora.core.batch import microbatches
from rlora.core.peft_format import fill
from rlora.machine import adapter_directory
from rlora.model.base import DEMO
from rlora.records import BASE, OFF, Adapter, DeliveryError, Group, NotLoadedError, Sampling, StaleError, Version
from rlora.rollout.task import ServedPolicy, Task, load_task

pytestmark = pytest.mark.vllm
KINDS = (  # of faults, see faulty_engine.py
    "a flipped byte", "a missing module", "two modules swapped", "a different alpha",
    "the previous version", "the same number trained again", "no load at all",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Versions 0 to 4 of one run, their learner, and an engine that fails on request."""

    learner: Solo
    task: Task
    engine: Any  # a FaultyEngine, in its actor
    versions: list[Adapter]

    def version(self, number: int) -> Version:
        """`OFF` is the base."""
        return BASE.version if number == OFF else self.versions[number].version

    def differences(self, number: int, groups: Sequence[Group]) -> torch.Tensor:
        """Absolute differences of the groups' logprobs between engine and learner; `OFF` is the base."""
        if number != OFF:
            fill(self.learner.bank, "run", safetensors.torch.load(self.versions[number].weights))
        batches = list(microbatches(samples(marked(groups)), 1000, torch.float32, self.learner.device))
        with torch.no_grad():
            policy = None if number == OFF else "run"
            logprobs = torch.cat([self.learner.policies.logprobs(batch, policy) for batch in batches])
        return (logprobs - torch.cat([batch.tokens.behaviour_logprobs for batch in batches])).abs()


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    config = validate(
        {
            "model": DEMO, "env": "rlora.envs.arithmetic:Arithmetic", "dtype": "float32",
            "reward": "rlora.rewards.integer:integer_answer",
            "max_staleness": 2, "learner": {"lr": 5e-4},
            "sampling": {"max_tokens": 24, "max_prompt_tokens": 48}, "engine": {"max_num_seqs": 64},
        }
    )  # fmt: skip
    task = load_task(replace(config, reward="rlora.rewards.integer:integer_answer"))
    learner = Solo(config, task.base)
    versions = [learner.adapter()]
    faulty = f"{ROOT / 'tests' / 'faulty_engine.py'}:FaultyEngine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "ENGINE", faulty)
        with cluster.start([ServedPolicy("run", config, task)], learn=False) as job:
            fleet = job.fleet
            (engine,) = fleet.engines
            engine.load(versions[0]).result()
            sampling, version = Sampling(24, 1.0, 4), versions[0].version
            futures = [engine.generate(prompt, sampling, version) for prompt in task.prompts[:3]]
            groups = marked([future.result() for future in futures])
            versions += [learner.update(groups)[0] for _ in range(4)]
            yield Line(learner, task, engine, versions)


def test_versions_in_flight_at_once_each_match_their_own_learner(line: Line) -> None:
    """64 requests on three versions and the base. Versions are loaded while others are in flight (vllm#47724)."""
    sampling = Sampling(max_tokens=24, group_size=2)
    futures: dict[int, list[Any]] = {}
    for turn, number in enumerate((OFF, 0, 1, 2)):
        if number >= 0:
            line.engine.load(line.versions[number]).result()
        prompts = line.task.prompts[turn * 8 : turn * 8 + 8]
        futures[number] = [line.engine.generate(prompt, sampling, line.version(number)) for prompt in prompts]
    for row in futures.values():
        assert not all(future.done() for future in row)  # they overlap
    assert line.engine.versions().result() == [line.version(number) for number in (0, 1, 2)]
    groups = {number: [future.result() for future in row] for number, row in futures.items()}
    for number, sampled in groups.items():
        assert {episode.version for group in sampled for episode in group.episodes} == {line.version(number)}
        differences = line.differences(number, sampled)
        assert differences.max() < 1e-3
        if number > 0:  # version 0 equals the base
            assert line.differences(number - 1, sampled).mean() > max(1e-3, 20 * differences.mean())
    assert line.engine.versions().result() == [line.version(2)]  # the others were unloaded with their last lease
    assert len(line.engine.lora_ids().result()) == 1


def test_a_request_too_stale_to_learn_from_is_aborted(line: Line) -> None:
    line.engine.load(line.versions[0]).result()
    stale = [line.engine.generate(prompt, Sampling(24, 1.0, 4), line.version(0)) for prompt in line.task.prompts[:4]]
    fresh = line.engine.generate(line.task.prompts[0], Sampling(24, 1.0, 2), BASE.version)
    line.engine.load(line.versions[3], oldest=1).result()
    for future in stale:
        with pytest.raises(StaleError, match=rf"version {line.version(0)}: aborted, .* below 1 are too old"):
            future.result()
    assert len(fresh.result().episodes) == 2
    assert line.engine.versions().result() == [line.version(3)]


def test_a_canary_that_fails_in_a_batch_is_repeated_alone(line: Line) -> None:
    """Rounding that depends on the batch ends no run: the version is served after the second canary."""
    engine, prompts = line.engine, line.task.prompts
    checked = engine.fail_canaries_in_batch(True).result()
    engine.load(line.versions[2]).result()
    futures = [engine.generate(prompt, Sampling(24, 1.0, 4), line.version(2)) for prompt in prompts[:4]]
    assert all(len(future.result().episodes) == 4 for future in futures)
    assert engine.fail_canaries_in_batch(False).result() == checked + 2


@pytest.mark.parametrize(
    ("kind", "checks"),
    [
        *((kind, ("file",)) for kind in KINDS[:-1]),
        *((kind, ("slots",)) for kind in KINDS),
        *((kind, ("canary",)) for kind in KINDS[2:-1]),
    ],
)
def test_an_engine_that_serves_something_else_is_detected(line: Line, kind: str, checks: tuple[str, ...]) -> None:
    """With one check at a time, the others disabled."""
    engine, prompt, sampling = line.engine, line.task.prompts[0], Sampling(4, 1.0, 1)
    engine.load(line.versions[1]).result()
    assert engine.generate(prompt, sampling, line.version(1)).result()
    engine.fail(kind, checks).result()
    if checks == ("canary",):  # it runs with the first prompt
        engine.load(line.versions[2]).result()
        with pytest.raises(DeliveryError, match=r"adapter run-v2-\w+: .* differ from the learner's by .* nats"):
            engine.generate(prompt, sampling, line.version(2)).result()
    else:
        with pytest.raises(DeliveryError, match=r"adapter run-v2-.* does not serve it: .*(digest|adapter's|slot)"):
            engine.load(line.versions[2]).result()
        with pytest.raises(NotLoadedError, match=rf"version {line.version(2)}: not loaded in this engine"):
            engine.generate(prompt, sampling, line.version(2)).result()
    engine.load(line.versions[3]).result()  # the engine recovers, and the failed version is gone
    assert engine.generate(prompt, sampling, line.version(3)).result()
    assert engine.versions().result() == [line.version(3)]
    assert len(engine.lora_ids().result()) == 1
    _, pid = ray.get(engine.process)
    assert [path.name for path in adapter_directory(pid).iterdir()] == [line.versions[3].name]
