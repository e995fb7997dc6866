"""Episodes of several turns on real vLLM: what the learner reads is, token for token, what the engine has sampled."""

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
from rlora.settings import Config

pytestmark = pytest.mark.vllm
QUIZ = ROOT / "tests" / "quiz_env.py"


def test_learner_and_engine_see_the_same_ids_over_turns(config: Callable[..., Config]) -> None:
    settings = config(
        env=f"{QUIZ}:Quiz", reward=f"{QUIZ}:all_turns", sampling={"max_tokens": 96, "max_prompt_tokens": 64}
    )
    task = load_task(settings)
    learner = Solo(settings, task.base)
    asked: list[Prompt] = []
    with cluster.start([ServedPolicy("run", settings, task)], learn=False) as job:
        fleet, loops = job.fleet, job.loops
        fleet.swap(learner.adapter())
        generate: Any = fleet.generate

        def watched(prompt: Prompt, *others: Any) -> Any:
            asked.append(prompt)
            return generate(prompt, *others)

        fleet.generate = watched  # type: ignore[method-assign]
        flights = [loops["run"].start(prompt, sampling_of(settings, 4)) for prompt in task.prompts[:4]]
        groups: list[Group] = [flight.scored.result(timeout=300) for flight in flights]

    chat = task.chat
    complete = 0
    for group in groups:
        later = {prompt.token_ids for prompt in asked if prompt.answer == group.prompt.answer}
        for episode in group.episodes:
            heard = episode.state.get("turns", [])  # none if the first turn was cut off
            assert episode.reward == len(heard)
            runs = turns(episode)
            own, said = runs[0::2], runs[1::2]
            assert [chat.text(ids) for ids in own[: len(heard)]] == heard  # what the env read is what was sampled
            assert len(own) == len(heard) + (episode.finish_reason == "length")
            assert [chat.shown(ids) for ids in said[:1]] == [" Or rather:"][: len(said)]
            if len(own) == 3:
                complete += 1
                asks_again = "<|im_start|>user\nAre you sure? Say it again.<|im_end|>\n<|im_start|>assistant\n"
                assert chat.shown(said[1]).endswith(asks_again)
                assert [message["role"] for message in episode.messages] == ["assistant", "user", "assistant"]
                assert episode.messages[0]["content"] == chat.text([*own[0], *said[0], *own[1]])
            for turn in range(1, len(own)):  # was sampled after exactly the ids that the learner has before it
                before = list(chain.from_iterable(runs[: 2 * turn]))
                assert group.prompt.token_ids + tuple(before) in later
    assert complete >= 8  # of 16

    with torch.no_grad():
        off = [
            (learner.logprobs(batch, 1.0) - batch.tokens.behaviour_logprobs).abs()
            for batch in microbatches(samples(marked(groups)), 2000, learner.policies.base.dtype, learner.device)
        ]
    assert sum(len(each) for each in off) == sum(e.sampled_tokens for group in groups for e in group.episodes)
    assert torch.cat(off).max() < 2e-3  # in fp32: the same contexts, whoever wrote them


def turns(episode: Episode) -> list[list[int]]:
    """The tokens of the policy's turns and of the env's, one after the other."""
    own = episode.sampled_mask or (True,) * len(episode.completion_ids)
    runs = groupby(zip(episode.completion_ids, own, strict=True), key=lambda token: token[1])
    return [[token for token, _ in run] for _, run in runs]
