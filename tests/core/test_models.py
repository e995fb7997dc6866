"""Every model class: one update, and its adapter in PEFT and, if vLLM's CPU build supports it, in the engine."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_CONFIGS, Solo, samples, save_words, tiny_model
from peft import PeftModel

from rlora.core.batch import Microbatch, microbatches
from rlora.records import Adapter, Group, Prompt, RloraError, Sampling
from rlora.rollout.task import ServedPolicy, Task
from rlora.settings import Config
from rlora.store import write_adapter

DENSE = sorted(name for name, config in TINY_CONFIGS.items() if "num_experts_per_tok" not in config)
HEAD = {"llama", "qwen3", "phi3"}  # model classes whose output head vLLM can adapt
EXPERTS = sorted(TINY_CONFIGS.keys() - set(DENSE))

MakeConfig = Callable[..., Config]


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The directory of a tiny model of the class `request.param`, with a tokenizer of 97 words."""
    path = str(tmp_path / request.param)
    tiny_model(request.param).save_pretrained(path)
    save_words(path)
    return path


def updated(base: str, config: Config, groups: list[Group]) -> tuple[Solo, Adapter]:
    learner = Solo(config, base)
    return learner, learner.update(groups)[0]


@pytest.mark.parametrize("base", sorted(TINY_CONFIGS), indirect=True)
def test_an_update_loads_in_peft(base: str, config: MakeConfig, groups: list[Group], tmp_path: Path) -> None:
    learner, adapter = updated(base, config(learner={"lr": 0.01}), groups)
    name = Path(base).name
    path = write_adapter(adapter, tmp_path / "adapter")
    peft = PeftModel.from_pretrained(tiny_model(name), str(path))
    ids = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with learner.bank.serving(learner.name):
            logits = learner.policies.base(ids).logits
        assert not torch.allclose(logits, tiny_model(name)(ids).logits, atol=1e-2)
        torch.testing.assert_close(peft(ids).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("base", "head"), [*((name, name in HEAD) for name in DENSE), (EXPERTS[0], False)], indirect=["base"]
)
def test_the_engine_gives_the_logprobs_of_an_update(
    base: str, head: bool, config: MakeConfig, groups: list[Group]
) -> None:
    settings = config(model=base, learner={"lr": 0.01, "head": head})
    learner, adapter = updated(base, settings, groups)
    if Path(base).name in EXPERTS and not torch.cuda.is_available():
        with pytest.raises(RloraError, match="CPU build can't serve adapters over experts"):
            sample(base, settings, [adapter], groups)
        return
    (sampled,) = sample(base, settings, [adapter], groups)
    for batch in microbatches(samples(sampled), 1000, torch.float32, learner.device):
        assert_engine_agrees(learner, batch)
        with torch.no_grad():
            base_logprobs = learner.policies.logprobs(batch, None)
        assert (base_logprobs - batch.tokens.behaviour_logprobs).abs().mean() > 0.02


@pytest.mark.vllm
@pytest.mark.parametrize("base", ["llama", "gemma"], indirect=True)  # vLLM holds their head in two places
def test_the_engine_gives_the_logprobs_of_all_weights_trained(
    base: str, config: MakeConfig, groups: list[Group]
) -> None:
    """The engine serves two versions in turn, and keeps no weights of the base or of the previous version."""
    tiny_model(Path(base).name, tie_word_embeddings=True).save_pretrained(base)
    settings = config(model=base, learner={"adapter": "none", "lr": 0.01})
    learners = [Solo(settings, base) for _ in range(2)]
    adapters = [learner.update(groups)[0] for learner in learners]
    adapters[1] = learners[1].update(groups)[0]
    for learner, sampled in zip(learners, sample(base, settings, adapters, groups), strict=True):
        (batch,) = microbatches(samples(sampled), 1000, torch.float32, learner.device)
        assert_engine_agrees(learner, batch)
        other = learners[1 - learners.index(learner)]
        with torch.no_grad():
            assert (other.logprobs(batch) - batch.tokens.behaviour_logprobs).abs().mean() > 0.02


def sample(base: str, settings: Config, adapters: list[Adapter], groups: list[Group]) -> list[list[Group]]:
    """Groups that an engine samples under each version, with rewards that differ in every group."""
    from rlora import cluster

    chat = SimpleNamespace(stop_token_ids=(1,))  # the only attribute that an engine reads
    task = Task(base, chat, (), False, [], [], 0)  # type: ignore[arg-type]
    prompts = [Prompt("", token_ids=group.prompt.token_ids) for group in groups]
    results = []
    with cluster.start([ServedPolicy("run", settings, task)], learn=False) as job:
        fleet = job.fleet
        for adapter in adapters:
            fleet.swap(adapter)
            requests = [fleet.generate(prompt, Sampling(6, 1.0, 4), "run") for prompt in prompts]
            sampled = [request.group.result() for request in requests]
            assert {episode.version for group in sampled for episode in group.episodes} == {adapter.version}
            results.append([group.with_rewards([0.0, 1.0, 0.0, 1.0]) for group in sampled])
    return results


def assert_engine_agrees(learner: Solo, batch: Microbatch) -> None:
    """The learner's logprobs are those of the engine that sampled."""
    with torch.no_grad():
        torch.testing.assert_close(learner.logprobs(batch), batch.tokens.behaviour_logprobs, atol=2e-4, rtol=1e-4)
