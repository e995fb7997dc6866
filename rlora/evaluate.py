"""How good a version is on held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rlora.config import Config
from rlora.records import Engine, Sampling
from rlora.rollout import collect
from rlora.task import Task


@dataclass(frozen=True)
class Evaluation:
    accuracy: float  # share of prompts whose completion earns at least `evaluate.threshold`
    reward: float  # mean


def evaluate(config: Config, task: Task, engines: Sequence[Engine], version: int) -> Evaluation:
    """Answer each held-out prompt once, greedily, under `version`."""
    sampling = Sampling(config.sampling.max_tokens, temperature=0.0)
    groups = collect(task, engines, task.held_out, sampling, version).groups
    rewards = [group.rewards[0] for group in groups]
    return Evaluation(fmean(value >= config.evaluate.threshold for value in rewards), fmean(rewards))
