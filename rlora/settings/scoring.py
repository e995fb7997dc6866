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
    """Calling convention of the reward functions (docs/rewards.md). `auto` infers the convention of each function from
    its parameter names and its source. `completion`: a call per completion. `group`: a call per prompt, with all
    completions. `trl`, `verl`, `verl-batch`, `openrlhf`, `verifiers`, `verifiers-group`, `areal`: the conventions of
    these frameworks."""
    correct: float = 1.0
    """Reward for the status `correct`, if a reward function returns a status instead of a number."""
    wrong: float = 0.0
    """Reward for the status `wrong`, if a reward function returns a status instead of a number."""
    unparsable: float = 0.0
    """Reward for the status `unparsable` (no readable answer), if a reward function returns a status instead of a
    number."""
    timeout: float = 0.0
    """Reward if a call of a reward function or of an env's `reply` exceeds the time limit (`scoring.deadline`). The
    episode is trained on with this reward."""
    error: float = 0.0
    """Reward if a call of a reward function or of an env's `reply` raises an exception, returns an invalid value, ends
    the process or exceeds `scoring.memory_mib`. The episode is trained on with this reward."""
    max_errors: Share = 0.5
    """Largest share of a step's episodes that may have the status `error`, 0 to 1. With a larger share the run stops.
    Timeouts do not count."""
    deadline: PositiveFloat = 10.0
    """Time limit in seconds for each call of a reward function or of an env's `reply`. A call that takes longer counts
    as a timeout, and the process is replaced (a coroutine is cancelled instead)."""
    first_deadline: NonNegativeFloat = 60.0
    """Time limit in seconds for the first call of each function in each process, which may load a model. A value below
    `scoring.deadline` has no effect."""
    memory_mib: PositiveInt = 2048
    """Memory in MiB that calls may allocate in a process that runs reward functions, in addition to what the process
    uses after loading the functions. An allocation beyond that fails. The limit applies on Linux only."""
    workers: PositiveInt = 2
    """Number of processes that run reward functions, in each of the `scoring.replicas` actors."""
    concurrency: PositiveInt = 16
    """Maximum number of concurrent calls of coroutine reward functions (async def) in each process."""
    replicas: PositiveInt = 1
    """Number of Ray actors, each with `scoring.workers` processes that run reward functions. Ray spreads the actors
    over the nodes."""
    cpus: NonNegativeFloat = 0.0
    """Number of Ray CPUs that each of the `scoring.replicas` actors reserves."""
    environment: tuple[str, ...] = ()
    """Names of environment variables that are passed to the reward functions on every node, none by default. The values
    are read where rlora is started, and are never stored."""

    def check(self) -> Iterator[Problem]:
        """Yield a Problem for every rule that these settings break."""
        for number, name in enumerate(self.environment):
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):  # the item is not shown: it may be a secret
                yield Problem(
                    "scoring.environment",
                    f"item {number} (counted from 0) is not the name of an environment variable; give only names, such "
                    "as JUDGE_KEY, and set the values in the environment of the rlora command",
                )
