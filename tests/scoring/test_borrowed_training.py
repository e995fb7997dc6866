"""Training with unchanged reward functions from the documentation of TRL, verl and OpenRLHF, on real vLLM and Ray."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from conftest import ROOT

from rlora import cluster
from rlora.core.learner import Learner
from rlora.core.setup import Setup
from rlora.rollout.cursor import Cursor
from rlora.rollout.fleet import Fleet
from rlora.rollout.player import AgentLoop
from rlora.rollout.stream import Rollouts
from rlora.rollout.task import ServedPolicy, Task, load_task, setup_of
from rlora.scoring.pool import Pool
from rlora.scoring.scoring import Scoring
from rlora.settings import Config

pytestmark = pytest.mark.vllm
BORROWED = ROOT / "tests" / "borrowed_rewards.py"


@dataclass
class Running:
    config: Config
    task: Task
    learner: Learner
    fleet: Fleet


@pytest.fixture(scope="module")
def running(config: Callable[..., Config]) -> Iterator[Running]:
    """One learner and one engine for all tests."""
    settings = config(prompts_per_step=2, group_size=6, steps=100, sampling={"max_tokens": 16, "max_prompt_tokens": 64})
    task = load_task(settings)
    with cluster.start([ServedPolicy("run", settings, task)]) as job:
        learners, fleet = job.learners, job.fleet
        learner = learners["run"]
        learner.open("run", Setup.of(settings))
        yield Running(settings, task, learner, fleet)


@pytest.mark.parametrize(
    ("names", "style"),
    [
        (("format_reward_func", "reward_token_count", "reward_num_unique_chars"), "auto"),
        (("boxed_reward_func", "math_reward_func", "reward_num_unique_chars"), "trl"),
        (("async_reward_func", "reward_len"), "auto"),
        (("logging_reward_func", "reward_num_unique_chars"), "auto"),
        (("compute_score", "my_reward_fn"), "verl"),
        (("compute_score_dict", "my_reward_fn"), "auto"),
        (("compute_score_batched", "my_reward_fn"), "auto"),
        (("reward_func",), "auto"),
        (("reward_func_of_lengths",), "openrlhf"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_rewards_of_borrowed_functions_lead_to_an_update(running: Running, names: tuple[str, ...], style: str) -> None:
    rewards = [f"{BORROWED}:{name}" for name in names]
    config = replace(running.config, reward=tuple(rewards), scoring=replace(running.config.scoring, style=style))
    task = replace(running.task, prompts=[replace(prompt, columns={"task": "math"}) for prompt in running.task.prompts])
    adapter = running.learner.adapter("run")
    running.fleet.swap(adapter, oldest=adapter.number)
    pool = Pool(setup_of(config, agent=False), 1)
    loop = AgentLoop(task, running.fleet, Scoring(config, [pool]), "run")
    try:
        rollouts = Rollouts(config, task.prompts, running.fleet, loop, Cursor(adapter.number * config.prompts_per_step))
        groups = rollouts.take(adapter.number).groups
    finally:
        loop.close()
        pool.close()
    episodes = [episode for group in groups for episode in group.episodes]
    assert {name for episode in episodes for name in episode.parts if "/" not in name} == set(names)
    assert all(episode.status in ("correct", "wrong") for episode in episodes)
    following, update = running.learner.update("run", groups)
    assert following.number == adapter.number + 1
    assert update.grad_norm > 0
