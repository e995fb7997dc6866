"""rlora: reinforcement-learning fine-tuning of language models with low-rank policies. Glossary: docs/concepts.md."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlora.primitives import Policy, policies, policy
from rlora.records import Episode, Group, Prompt, RloraError
from rlora.settings import Config
from rlora.train import Result, train

if TYPE_CHECKING:
    from rlora.core.batch import Sample
    from rlora.core.objectives.objective import Objective
    from rlora.core.optimizer import Adam
    from rlora.run.run import Observer
    from rlora.sweeps.halving import Halving
    from rlora.sweeps.sweep import Swept, sweep

logging.getLogger("rlora").addHandler(logging.NullHandler())  # quiet unless the application shows logs

__version__ = "0.1.0"
__all__ = [
    "Adam", "Config", "Episode", "Group", "Halving", "Objective", "Observer", "Policy", "Prompt", "Result",
    "RloraError", "Sample", "Swept", "policies", "policy", "sweep", "train",
]  # fmt: skip
_WITH_TORCH = {  # imported on first access, because importing torch takes seconds
    "Adam": "rlora.core.optimizer", "Objective": "rlora.core.objectives.objective", "Observer": "rlora.run.run",
    "Sample": "rlora.core.batch", "Halving": "rlora.sweeps.halving", "Swept": "rlora.sweeps.sweep",
    "sweep": "rlora.sweeps.sweep",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module 'rlora' has no attribute {name!r}")
    return getattr(import_module(_WITH_TORCH[name]), name)
