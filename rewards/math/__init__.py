"""The grader of mathematical answers. Public: `math_answer`, a reward function, and `grade`, the status of a pair."""

from .equivalence import grade, math_answer

__all__ = ["grade", "math_answer"]
