"""The math reward: `rlora.rewards.equivalence:math_answer`."""

from .math import grade, math_answer

__all__ = ["grade", "math_answer"]
