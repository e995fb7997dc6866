"""rlora: reinforcement-learning fine-tuning of language models with low-rank policies."""

from typing import TYPE_CHECKING, Any

from rlora.records import Episode, Group, Prompt, RloraError
from rlora.settings import Config
from rlora.train import Result, train

if TYPE_CHECKING:
    from rlora.core.objectives.objective import Objective

__version__ = "0.1.0"
__all__ = ["Config", "Episode", "Group", "Objective", "Prompt", "Result", "RloraError", "train"]


def __getattr__(name: str) -> Any:
    """`Objective`, which imports torch: only where it is asked for."""
    if name != "Objective":
        raise AttributeError(f"module 'rlora' has no attribute {name!r}")
    from rlora.core.objectives.objective import Objective

    return Objective
