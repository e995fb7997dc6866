"""The ready objectives, one file for each `algorithm.loss`, and how the objective of a run is found."""

from collections.abc import Iterator
from contextlib import contextmanager

from rlora.core.objectives.cispo import Cispo
from rlora.core.objectives.clip import Clip
from rlora.core.objectives.gspo import Gspo
from rlora.core.objectives.objective import Need, Objective
from rlora.core.objectives.reinforce import Reinforce
from rlora.plugin import at, file_of, load
from rlora.records import RloraError
from rlora.settings import AlgorithmConfig

_MEMBERS = (
    "needs", "needs_first", "whole_groups", "entropies", "whitens", "skips_zeros",
    "learns_from", "advantages", "weights", "loss",
)  # fmt: skip
READY = {"reinforce": Reinforce, "clip": Clip, "gspo": Gspo, "cispo": Cispo}  # by `algorithm.loss`


def objective_of(algorithm: AlgorithmConfig, max_tokens: int) -> Objective:
    """A user's own, where `algorithm.name` is file.py:Name or module:Name. Raises RloraError where it can't be had."""
    if ":" not in algorithm.name:
        return READY[algorithm.loss](algorithm, max_tokens)
    make, what = load("algorithm.name", algorithm.name), f"algorithm.name = {algorithm.name!r}"
    try:
        made: Objective = make(algorithm, max_tokens)
    except Exception as error:
        line = at(error, algorithm.name.rpartition(":")[0])
        raise RloraError(f"{line}{what}: building it raised {type(error).__name__}: {error}") from error
    bare = [name for name in ("advantages", "loss") if getattr(type(made), name, None) is getattr(Objective, name)]
    missing = bare or [name for name in _MEMBERS if not hasattr(made, name)]
    if missing:
        raise RloraError(
            f"{what}: it has no {', '.join(missing)}; write it; rlora.Objective, to inherit from, has the others"
        )
    if (Need.VALUES in made.needs) != (algorithm.advantage == "gae"):
        raise RloraError(
            f'{what}: a critic\'s values are there with algorithm.advantage = "gae" and only then, and it is '
            f"{algorithm.advantage!r} where the objective needs {sorted(need.name for need in made.needs)}"
        )
    return made


@contextmanager
def telling_of(name: str, objective: Objective) -> Iterator[None]:
    """Raise what fails in a user's own objective as RloraError, with its file and line."""
    try:
        yield
    except Exception as error:
        line = at(error, name.rpartition(":")[0], file_of(objective))
        if ":" not in name or not line or isinstance(error, RloraError):
            raise
        raise RloraError(f"{line}algorithm.name = {name!r}: {type(error).__name__}: {error}") from error
