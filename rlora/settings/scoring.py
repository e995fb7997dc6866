"""Settings of reward functions and the processes that run them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from rlora.records import Style
from rlora.settings.fields import STRICT, Problem, Share


@dataclass(frozen=True)
class ScoringConfig:
    __pydantic_config__ = STRICT

    style: Style = "auto"
    """Calling convention of the reward functions; `auto` infers it from the names of their parameters. See
    docs/rewards.md."""
    correct: float = 1.0
    """Reward for a correct answer, if the reward function returns a status."""
    wrong: float = 0.0
    """Reward for a wrong answer, if the reward function returns a status."""
    unparsable: float = 0.0
    """Reward for a completion without a readable answer, if the reward function returns a status."""
    timeout: float = 0.0
    """Reward for an episode whose reward function exceeded `scoring.deadline`."""
    error: float = 0.0
    """Reward for an episode whose reward function failed."""
    max_errors: Share = 0.5
    """Largest share of a step's episodes whose reward functions may fail; above it the run stops."""
    deadline: PositiveFloat = 10.0
    """Time limit in seconds for one call of a reward function or of an env's `reply`. Its process is replaced if the
    call takes longer."""
    first_deadline: NonNegativeFloat = 60.0
    """Time limit in seconds for the first call of each function in each process, which may load a model."""
    memory_mib: PositiveInt = 2048
    """Memory limit in MiB for one call of a reward function."""
    workers: PositiveInt = 2
    """Processes that call reward functions, per scoring replica."""
    concurrency: PositiveInt = 16
    """Concurrent calls of a reward function that is a coroutine, per process."""
    replicas: PositiveInt = 1
    """Ray actors that run scoring processes; Ray spreads them over the nodes."""
    cpus: NonNegativeFloat = 0.0
    """Ray CPUs that each scoring replica reserves."""
    environment: tuple[str, ...] = ()
    """Names of environment variables that reward functions receive on every node. Their values are never stored."""

    def check(self) -> Iterator[Problem]:
        for number, name in enumerate(self.environment):
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):  # the item is not shown: it may be a secret
                yield Problem(
                    "scoring.environment",
                    f"item {number} is not the name of an environment variable; give names only, such as JUDGE_KEY, "
                    "and set their values where rlora is started",
                )
