"""The built-in objectives, one file for each `algorithm.loss`, and the loader of a run's objective."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rlora.core.objectives.cispo import Cispo
from rlora.core.objectives.clip import Clip
from rlora.core.objectives.dpo import Dpo
from rlora.core.objectives.gspo import Gspo
from rlora.core.objectives.ipo import Ipo
from rlora.core.objectives.objective import Need, Objective
from rlora.core.objectives.orpo import Orpo
from rlora.core.objectives.reinforce import Reinforce
from rlora.core.objectives.sft import Sft
from rlora.plugin import file_of, load, location_prefix
from rlora.records import RloraError
from rlora.settings import AlgorithmConfig

_MEMBERS = (
    "needs", "needs_first", "whole_groups", "entropies", "whitens", "skips_zeros",
    "learns_from", "advantages", "weights", "loss",
)  # fmt: skip
READY: Mapping[str, Callable[[AlgorithmConfig, int], Objective]] = {  # by `algorithm.loss`
    "reinforce": Reinforce, "clip": Clip, "gspo": Gspo, "cispo": Cispo,
    "sft": Sft, "dpo": Dpo, "ipo": Ipo, "orpo": Orpo,
}  # fmt: skip


def objective_of(algorithm: AlgorithmConfig, max_tokens: int) -> Objective:
    """Construct the objective of a run: a user's plug-in if `algorithm.name` is file.py:Name or module:Name, else the
    built-in objective of `algorithm.loss`. `max_tokens` is the maximum number of tokens per completion.

    Raises RloraError if the plug-in can't be loaded or lacks a member, or if either the plug-in needs a critic or the
    config has a critic, but not both.
    """
    if ":" not in algorithm.name:
        return READY[algorithm.loss](algorithm, max_tokens)
    plugin, setting = load("algorithm.name", algorithm.name), f"algorithm.name = {algorithm.name!r}"
    try:
        objective: Objective = plugin(algorithm, max_tokens)
    except Exception as error:
        line = location_prefix(error, algorithm.name.rpartition(":")[0])
        raise RloraError(
            f"{line}{setting}: its constructor raised {type(error).__name__}: {error}; fix the constructor"
        ) from error
    kind, required = type(objective), ("advantages", "loss")
    undefined = [name for name in required if getattr(kind, name, None) is getattr(Objective, name)]
    missing = undefined or [name for name in _MEMBERS if not hasattr(objective, name)]
    if missing:
        raise RloraError(
            f"{setting}: the objective has no {', '.join(missing)}; define each missing member, or inherit from "
            "rlora.Objective, which defines all members except advantages and loss"
        )
    if (Need.VALUES in objective.needs) != (algorithm.advantage == "gae"):
        raise RloraError(
            f"{setting}: the objective needs {sorted(need.name for need in objective.needs)}, but "
            f"algorithm.advantage = {algorithm.advantage!r}; put Need.VALUES into `needs` if and only if "
            'algorithm.advantage = "gae", which is the only advantage with a critic'
        )
    return objective


@contextmanager
def plugin_errors(name: str, objective: Objective) -> Iterator[None]:
    """Context that turns errors of a user's objective into RloraError with file and line. `name` is algorithm.name."""
    try:
        yield
    except Exception as error:
        line = location_prefix(error, name.rpartition(":")[0], file_of(objective))
        if ":" not in name or not line or isinstance(error, RloraError):
            raise
        raise RloraError(
            f"{line}algorithm.name = {name!r}: {type(error).__name__}: {error}; fix the objective"
        ) from error
