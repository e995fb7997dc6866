"""Episodes of several turns on real vLLM: the learner reads exactly the tokens that the engine sampled."""

from collections.abc import Callable
from itertools import chain, groupby
from typing import Any

import pytest
import torch
from conftest import ROOT, Solo, marked, samples

from rlora import cluster
from rlora.core.batch import microbatches
from rlora.records import Episode, Group, Prompt
from rlora.rollout.stream import sampling_of
from rlora.rollout.task import ServedPolicy, load_task
from rlora.rollout.toolset import tool_metrics
from rlora.settings import Config

pytestmark = pytest.mark.vllm
QUIZ = ROOT / "tests" / "quiz_env.py"


def test_learner_and_engine_see_the_same_ids_over_turns(config: Callable[..., Config]) -> None:
    settings = config(
        env=f"{QUIZ}:Quiz", reward=f"{QUIZ}:all_turns", sampling={"max_tokens": 96, "max_prompt_tokens": 64}
    )
    task = load_task(settings)
    learner = Solo(settings, task.base)
    requested: list[Prompt] = []
    with cluster.start([ServedPolicy("run", settings, task)], learn=False) as job:
        fleet, loops = job.fleet, job.loops
        fleet.swap(learner.adapter())
        generate: Any = fleet.generate

        def recording_generate(prompt: Prompt, *arguments: Any) -> Any:
            requested.append(prompt)
            return generate(prompt, *arguments)

        fleet.generate = recording_generate  # type: ignore[method-assign]
        flights = [loops["run"].start(prompt, sampling_of(settings, 4)) for prompt in task.prompts[:4]]
        groups: list[Group] = [flight.scored.result(timeout=300) for flight in flights]

    chat = task.chat
    complete = 0
    for group in groups:
        later = {prompt.token_ids for prompt in requested if prompt.answer == group.prompt.answer}
        for episode in group.episodes:
            heard = episode.state.get("turns", [])  # none if the first turn was cut off
            assert episode.reward == len(heard)
            runs = turns(episode)
            messages, replies = runs[0::2], runs[1::2]
            assert [chat.text(ids) for ids in messages[: len(heard)]] == heard  # the env read what was sampled
            assert len(messages) == len(heard) + (episode.finish_reason == "length")
            assert [chat.decode(ids) for ids in replies[:1]] == [" Or rather:"][: len(replies)]
            if len(messages) == 3:
                complete += 1
                asks_again = "<|im_start|>user\nAre you sure? Say it again.<|im_end|>\n<|im_start|>assistant\n"
                assert chat.decode(replies[1]).endswith(asks_again)
                assert [message["role"] for message in episode.messages] == ["assistant", "user", "assistant"]
                assert episode.messages[0]["content"] == chat.text([*messages[0], *replies[0], *messages[1]])
            for turn in range(1, len(messages)):  # sampled after exactly the ids that precede it in the learner
                context = tuple(chain.from_iterable(runs[: 2 * turn]))
                assert group.prompt.token_ids + context in later
    assert complete >= 8  # of 16

    with torch.no_grad():
        differences = [
            (learner.logprobs(batch, 1.0) - batch.tokens.behaviour_logprobs).abs()
            for batch in microbatches(samples(marked(groups)), 2000, learner.policies.base.dtype, learner.device)
        ]
    assert sum(map(len, differences)) == sum(e.sampled_tokens for group in groups for e in group.episodes)
    assert torch.cat(differences).max() < 2e-3  # in fp32: the same contexts


def test_a_model_calls_tools_and_reads_their_results(config: Callable[..., Config]) -> None:
    """SmolLM2 copies the form of the examples in some episodes; the results follow exactly what it sampled."""
    settings = config(
        env="rlora.envs.calculator:ToolCalculator", env_args={"levels": "1", "shots": 3}, chat={"template": "hermes"},
        sampling={"max_tokens": 112, "max_prompt_tokens": 512},
    )  # fmt: skip
    task = load_task(settings)
    assert task.tools
    learner = Solo(settings, task.base)
    with cluster.start([ServedPolicy("run", settings, task)], learn=False) as job:
        job.fleet.swap(learner.adapter())
        flights = [job.loops["run"].start(prompt, sampling_of(settings, 4)) for prompt in task.prompts[:4]]
        groups = [flight.scored.result(timeout=300) for flight in flights]
    episodes = [episode for group in groups for episode in group.episodes]
    called = [episode for episode in episodes if len(episode.messages) > 1]
    assert len(called) >= 2  # of 16
    for episode in called:
        call, result = episode.messages[:2]
        sampled, reply, *_ = turns(episode)
        assert task.chat.text(sampled) == call["content"]
        assert task.chat.decode(reply) == (
            f"\n<|im_start|>user\n<tool_response>\n{result['content']}\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
        )
    answered = [episode.messages[1] for episode in called if episode.messages[1]["status"] == "ok"]
    assert answered
    assert any(int(message["content"]) for message in answered if message["content"].lstrip("-").isdigit())
    assert tool_metrics(episodes)["tools/calls"] >= len(called) / len(episodes)


def turns(episode: Episode) -> list[list[int]]:
    """The tokens of the turns, alternately the policy's and the env's."""
    mask = episode.sampled_mask or (True,) * len(episode.completion_ids)
    runs = groupby(zip(episode.completion_ids, mask, strict=True), key=lambda token: token[1])
    return [[token for token, _ in run] for _, run in runs]
