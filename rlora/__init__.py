"""rlora: reinforcement-learning fine-tuning of language models with low-rank policies."""

from pathlib import Path

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").exists() and (_checkout / "envs").is_dir():
    __path__.append(str(_checkout))  # a bare checkout: rlora.envs is envs/, rlora.rewards is rewards/

__version__ = "0.1.0"
