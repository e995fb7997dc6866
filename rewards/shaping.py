"""Rewards for form and length, to stand beside one for the answer.

A form is paid once and whole: a second block of a kind, an empty one, and a tag in any other spelling earn nothing.
"""

import html
import math
import re
import unicodedata
from collections.abc import Sequence

_THINK_ANSWER = re.compile(r"<think>\n(.*)\n</think>\n<answer>\n(.*)\n</answer>", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)</think>.*", re.DOTALL)
_KINDS = {"think": "think(?:ing)?|thoughts?", "answer": "answers?"}
_TAG = r"<\s*/?\s*(?:{})\b[^<>]{{0,200}}>"  # in any case, with white space or attributes in it
_THINK_TAGS = re.compile(_TAG.format(_KINDS["think"]), re.IGNORECASE)
_TAGS = re.compile(_TAG.format("|".join(_KINDS.values())), re.IGNORECASE)
_ANY_TAG = re.compile(r"</?[a-zA-Z|!][^<>]{0,200}>")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
_NOTHING = re.compile(  # what LaTeX prints as nothing, or as white space
    r"\\(?:[ ,;:!>/\\]|q?quad|(?:[hv]?phantom|[hv]space)\*?\s*\{[^{}]*\}|(?:text|math)[a-z]{0,7}(?![a-z])|displaystyle"
    r"|left\.?(?![a-z])|right\.?(?![a-z])|[fm]?box(?:ed)?(?![a-z])|(?:(?:thin|med|thick)space|null|strut)(?![a-z]))|(?<!\\)[{}$~&]"
)
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and signs that print as white space


def think_answer(completion: str) -> float:
    """1 for <think> and <answer> on lines of their own, one after the other and nothing else, not even after them.

    open-r1's format reward, which lets more follow, and takes blocks that are empty or stand there twice.
    """
    found = _THINK_ANSWER.fullmatch(completion)
    return float(
        found is not None and len(_TAGS.findall(completion)) == 4 and all(map(_says_something, found.groups()))
    )


def think(completion: str) -> float:
    """1 where the completion begins with a <think> block that is closed and not empty, and holds no other tag of it.

    TRL's `think_format_reward`, which lets a second </think> follow, and takes an empty block.
    """
    found = _THINK.fullmatch(completion)
    return float(found is not None and len(_THINK_TAGS.findall(completion)) == 2 and _says_something(found[1]))


def boxed(completion: str) -> float:
    r"""1 where there is just one box, a \boxed{} that is closed and not empty, after all thinking."""
    boxes = list(_BOX.finditer(completion))
    if len(boxes) != 1 or not boxes[0][0].startswith("\\boxed"):
        return 0.0
    tags = list(_THINK_TAGS.finditer(completion))
    if tags and (tags[-1].start() > boxes[0].start() or not re.match(r"<\s*/", tags[-1][0])):
        return 0.0
    content = _braced(completion[boxes[0].end() :])
    return float(content is not None and _says_something(_NOTHING.sub("", html.unescape(content))))


def _braced(text: str) -> str | None:
    """What stands in the braces that a text begins with; None where there are none, or they are not closed."""
    depth = 0
    for sign in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += (sign[0] == "{") - (sign[0] == "}")
        if depth == 0:
            return text[1 : sign.start()] if text[0] == "{" else None
    return None


def _says_something(text: str) -> bool:
    """Whether anything can be seen in a text, tags aside."""
    seen = html.unescape(_ANY_TAG.sub("", text))
    return any(unicodedata.category(sign)[0] not in "CZ" and sign not in _BLANK for sign in seen)


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
