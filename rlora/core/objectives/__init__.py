"""The ready objectives, a file each, and how a run's is found."""

from rlora.core.objectives.cispo import Cispo
from rlora.core.objectives.clip import Clip
from rlora.core.objectives.gspo import Gspo
from rlora.core.objectives.objective import Objective
from rlora.core.objectives.reinforce import Reinforce
from rlora.plugin import load
from rlora.settings import AlgorithmConfig

READY = {"reinforce": Reinforce, "clip": Clip, "gspo": Gspo, "cispo": Cispo}  # by `algorithm.loss`


def objective_of(algorithm: AlgorithmConfig, max_tokens: int) -> Objective:
    """A user's own, where `algorithm.name` is file.py:Name or module:Name. Raises RloraError where it can't be had."""
    made: Objective
    if ":" in algorithm.name:
        made = load("algorithm.name", algorithm.name)(algorithm, max_tokens)
    else:
        made = READY[algorithm.loss](algorithm, max_tokens)
    return made
