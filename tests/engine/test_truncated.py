"""Top-k, top-p and min-p: the learner's probabilities over the tokens that the engine kept are the engine's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import Solo, marked, samples

from rlora import cluster
from rlora.records import BASE, Adapter, Engine, Group, Kept, Sampling
from rlora.rollout.task import ServedPolicy, Task, load_task
from rlora.settings import Config

pytestmark = pytest.mark.vllm
PLAIN = Sampling(12, 1.0, 4)
SETTINGS = [
    replace(PLAIN, top_p=0.9),
    replace(PLAIN, top_k=20),
    replace(PLAIN, min_p=0.05),
    replace(PLAIN, temperature=0.7, top_p=0.8),
    replace(PLAIN, top_k=50, top_p=0.95),
    replace(PLAIN, temperature=1.5, top_p=0.5, min_p=0.01),
    PLAIN,
]


@dataclass(frozen=True)
class Sampled:
    learner: Solo
    adapter: Adapter
    groups: dict[tuple[Sampling, bool], Group]  # by the settings, and whether under the adapter


def trained(learner: Solo) -> Adapter:
    """A version that is far from the base."""
    generator = torch.Generator().manual_seed(0)
    for pair in learner.bank.pairs_of("run").values():
        pair.b.data.copy_(torch.randn(pair.b.shape, generator=generator) * 4e-3)
    learner.held.number += 1
    learner.held.canary = learner.learner.canary_of(learner.held)
    return learner.adapter()


@pytest.fixture(scope="module")
def sampled(config: Callable[..., Config]) -> Iterator[Sampled]:
    """One batch with all settings, under a version and under the base."""
    made = config(sampling={"max_tokens": 12, "max_prompt_tokens": 48, "top_p": 0.9})
    task: Task = load_task(made)
    learner = Solo(made, task.base)
    adapter = trained(learner)
    with cluster.start([ServedPolicy("run", made, task)], learn=False) as job:
        (engine,) = job.fleet.engines
        engine.load(adapter).result()
        yield Sampled(learner, adapter, sample(engine, task, adapter))


def sample(engine: Engine, task: Task, adapter: Adapter) -> dict[tuple[Sampling, bool], Group]:
    futures = {
        (settings, adapted): engine.generate(
            task.prompts[number], settings, adapter.version if adapted else BASE.version
        )
        for number, settings in enumerate(SETTINGS)
        for adapted in (True, False)
    }
    assert not any(future.done() for future in futures.values())
    return {key: future.result() for key, future in futures.items()}


def kept_ids(kept: Kept) -> list[np.ndarray]:
    return np.split(np.frombuffer(kept.ids, np.int32), np.cumsum(kept.counts)[:-1])


def test_each_token_is_among_those_that_were_kept(sampled: Sampled) -> None:
    for (settings, _), group in sampled.groups.items():
        for episode in group.episodes:
            if settings == PLAIN:
                assert episode.kept is None or set(episode.kept.counts) == {0}
                continue
            assert episode.kept
            assert len(episode.kept.counts) == len(episode.completion_ids)
            for token, ids in zip(episode.completion_ids, kept_ids(episode.kept), strict=True):
                assert token in ids
                assert not settings.top_k or len(ids) <= settings.top_k
            assert max(episode.kept.counts) < 49_152


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("adapted", [True, False])
def test_the_learner_computes_the_engines_probabilities(settings: Sampling, adapted: bool, sampled: Sampled) -> None:
    group = sampled.groups[settings, adapted]
    held, learner = sampled.learner.held, sampled.learner.learner
    held.setup = replace(held.setup, temperature=settings.temperature)

    def ratios(group: Group) -> torch.Tensor:
        """Of each token's probability in the learner to that in the engine."""
        inputs = samples(marked([group]))
        (outputs,) = learner.forward("run", inputs, reference=not adapted)
        behaviour = torch.cat([sample.tokens.behaviour_logprobs for sample in inputs[0]])
        return (torch.cat(list(outputs)) - behaviour).exp()

    assert (ratios(group) - 1).abs().max() < 1e-3
    assert abs(float(ratios(group).double().mean()) - 1) < (1e-5 if settings != PLAIN else 1e-4)
    whole = replace(group, episodes=tuple(replace(episode, kept=None) for episode in group.episodes))
    if settings != PLAIN:  # over the whole vocabulary a token's probability is smaller
        assert float(ratios(whole).mean()) < 0.99
