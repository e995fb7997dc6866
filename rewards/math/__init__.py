"""The grader of mathematical answers. Its one door: `math_answer`, a reward function, and `grade`, a pair's status."""

from .equivalence import grade, math_answer

__all__ = ["grade", "math_answer"]
