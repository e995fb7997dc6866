"""How good a version is on held-out prompts."""

import math
from dataclasses import dataclass
from statistics import fmean

from rlora.config import Config
from rlora.delivery import Fleet, wait_for
from rlora.records import RewardError, Sampling
from rlora.rollout import score, with_text
from rlora.task import Task


@dataclass(frozen=True)
class Evaluation:
    accuracy: float  # share of prompts whose completion earns at least `evaluate.threshold`
    reward: float  # mean


def evaluate(config: Config, task: Task, fleet: Fleet) -> Evaluation:
    """Answer each held-out prompt once, greedily, under the version that was swapped in last.

    Raises RewardError, which keeps what was sampled, where the reward function fails.
    """
    sampling = Sampling(config.sampling.max_tokens, temperature=0.0)
    requests = [fleet.generate(prompt, sampling) for prompt in task.held_out]
    wait_for([request.group for request in requests], len(requests), math.inf, config.engine.patience, fleet.check)
    groups = [with_text(request.group.result(), task.tokenizer) for request in requests]
    try:
        rewards = [score(group, task).rewards[0] for group in groups]
    except RewardError as error:
        raise RewardError(str(error), groups) from error
    return Evaluation(fmean(value >= config.evaluate.threshold for value in rewards), fmean(rewards))
