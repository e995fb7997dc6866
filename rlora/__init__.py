"""rlora: reinforcement-learning fine-tuning of language models with low-rank policies."""

__version__ = "0.1.0"
