"""Rewards for form and length, to stand beside one for the answer."""

import math
import re
from collections.abc import Sequence

_THINK_ANSWER = re.compile(r"<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>", re.DOTALL)
_THINK = re.compile(r"<think>(?!.*<think>)(?!.*</think>.*</think>).*?</think>.*", re.DOTALL)


def think_answer(completion: str) -> float:
    """1 for <think> and <answer> on lines of their own, one after the other and nothing else, not even after them.

    open-r1's format reward, which lets more follow.
    """
    return float(_THINK_ANSWER.fullmatch(completion) is not None)


def think(completion: str) -> float:
    """1 where the completion begins with a <think> block that is closed, and holds no other tag of it.

    TRL's `think_format_reward`, which lets a second </think> follow.
    """
    return float(_THINK.fullmatch(completion) is not None)


def boxed(completion: str) -> float:
    r"""1 where there is just one \boxed{}, after all thinking."""
    said = completion.rpartition("</think>")[2]
    return float(said.count("\\boxed{") == completion.count("\\boxed{") == 1)


def short(completion_ids: Sequence[int], budget: int = 512) -> float:
    """1 up to `budget` tokens, and budget / length beyond."""
    return min(1.0, budget / max(1, len(completion_ids)))


def shortest(completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> list[float]:
    """0.5 for the shortest of a group to -0.5 for the longest (Kimi k1.5, arXiv:2501.12599, section 2.3.3).

    There only right answers earn what is above 0: give it a small weight beside a reward for the answer.
    """
    lengths = [len(ids) for ids in completion_ids]
    low, high = min(lengths), max(lengths)
    return [0.5 - (length - low) / (high - low) if high > low else 0.0 for length in lengths]


def repeated(completion: str, words: int = 3) -> float:
    """1 less the share of runs of `words` words that come again (open-r1's repetition penalty, plus 1)."""
    said = completion.lower().split()
    runs = [tuple(said[i : i + words]) for i in range(len(said) - words + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def cosine(completion_ids: Sequence[int], budget: int = 512) -> float:
    """From 1 at no tokens to 0 at `budget`, along half a cosine (Yeo et al. 2025, arXiv:2502.03373, eq. 1)."""
    return (1 + math.cos(math.pi * min(1.0, len(completion_ids) / budget))) / 2
