"""Rewards for format and length, to be combined with a reward for the answer.

A reward for a format is 1 or 0. It is 0 for a second block of the same kind, for a block without a letter, digit or
mathematical sign, and for a tag in any other spelling.
"""

import html
import math
import re
import unicodedata
from collections.abc import Sequence

_THINK_ANSWER = re.compile(r"<think>\n(.*)\n</think>\n<answer>\n(.*)\n</answer>", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)</think>.*", re.DOTALL)
_KINDS = {"think": "think(?:ing)?|thoughts?", "answer": "answers?"}
_TAG = r"<\s*/?\s*(?:{})\b[^<>]{{0,200}}>"  # any case, with optional white space and attributes
_THINK_TAGS = re.compile(_TAG.format(_KINDS["think"]), re.IGNORECASE)
_TAGS = re.compile(_TAG.format("|".join(_KINDS.values())), re.IGNORECASE)
_ANY_TAG = re.compile(r"</?[a-zA-Z|!][^<>]{0,200}>")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
_COMMAND = re.compile(
    r"\\(?:(?P<name>[a-zA-Z]+)\*?|\\\*?(?:\s?\[\s?-?[\d.]{1,9}\s?[a-z]{2}\s?\])?|(?P<sign>.))|%[^\n]*", re.DOTALL
)
_HIDDEN = {  # command -> number of its arguments that are not printed
    **dict.fromkeys(("rule", "fcolorbox", "resizebox", "fontsize", "setlength", "setcounter", "newcommand"), 2),
    **dict.fromkeys(
        "begin end phantom hphantom vphantom hspace vspace label tag ref eqref cite color pagecolor textcolor "
        "colorbox href url hyperref raisebox parbox makebox framebox scalebox rotatebox sqrt mspace class style "
        "cssId unicode input include index pagestyle thispagestyle require symbol bbox".split(),
        1,
    ),
}
_OPTIONAL_ONLY = frozenset(["sqrt", "makebox", "framebox", "bbox"])  # only their [] argument is not printed
_COLUMNS = frozenset(["array", "tabular", "alignat", "alignedat", "subarray", "minipage"])  # take one more argument
_LENGTH = re.compile(r"\s{0,9}=?\s{0,9}(?:(?:to|spread)\s{0,9})?[-+]?[\d.]{1,20}\s{0,9}[a-z]{2}")
_LENGTHS = frozenset(["hskip", "vskip", "mskip", "kern", "mkern", "hglue", "vglue", "hbox", "vbox"])  # take a length
_OPTION = re.compile(r"\s*(?:\[[^\[\]]{0,100}\]\s*)*")
_SIGNS = frozenset(  # commands that print a letter or a mathematical sign; function names count as letters
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon "
    "phi chi psi omega varepsilon vartheta varkappa varpi varrho varsigma varphi digamma Gamma Delta Theta Lambda "
    "Xi Pi Sigma Upsilon Phi Psi Omega infty emptyset varnothing aleph beth gimel daleth hbar hslash ell wp Re Im "
    "imath jmath i j partial nabla angle triangle top bot N Z Q R C H F reals natnums integers AA aa AE ae OE oe "
    "O o L l ss checkmark diamondsuit heartsuit clubsuit spadesuit sin cos tan cot sec csc arcsin arccos arctan "
    "sinh cosh tanh coth ln log lg exp det dim gcd ker max min sup inf lim arg deg lt gt le ge leq geq ne neq "
    "leqslant geqslant ll gg equiv approx sim simeq cong propto in ni notin subset supset subseteq supseteq "
    "parallel perp mid".split()
)
_OPERATORS = frozenset(
    "+|~\u00ac\u00b1\u00d7\u00f7\u2044\u2052\u2211\u220f\u2210\u221a\u221b\u221c\u222b\u2212\u2213\u2214\u2215\u2217\u2218\u2219\u2223\u2225\u22c5\u22c6"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE_BRACE = re.compile(r"[{}$~&]")
_SINGLE = re.compile(r"\s*(?:\\[a-zA-Z]+|\\.|[^\s{}])")
_EMPTY_SET = re.compile(r"\\\{\s*\\\}")
_BLANK = frozenset("\u115f\u1160\u3164\uffa0")  # letters that print as white space


def think_answer(completion: str) -> float:
    """Return 1 if the completion is a <think> block and an <answer> block, each tag on its own line, else 0.

    Any other text gives 0. open-r1's format reward also accepts text after the blocks, empty and repeated blocks.
    """
    match = _THINK_ANSWER.fullmatch(completion)
    return float(match is not None and len(_TAGS.findall(completion)) == 4 and all(map(_has_content, match.groups())))


def think(completion: str) -> float:
    """Return 1 if the completion starts with a closed, non-empty <think> block and has no other think tag, else 0.

    TRL's `think_format_reward` also accepts a second </think> and an empty block.
    """
    match = _THINK.fullmatch(completion)
    return float(match is not None and len(_THINK_TAGS.findall(completion)) == 2 and _has_content(match[1]))


def boxed(completion: str) -> float:
    r"""Return 1 if there is exactly one box, a closed, non-empty \boxed{} after all thinking, else 0."""
    boxes = list(_BOX.finditer(completion))
    if len(boxes) != 1 or not boxes[0][0].startswith("\\boxed"):
        return 0.0
    tags = list(_THINK_TAGS.finditer(completion))
    if tags and (tags[-1].start() > boxes[0].start() or not re.match(r"<\s*/", tags[-1][0])):
        return 0.0
    content, _ = _braced(completion, boxes[0].end())
    return float(content is not None and _has_content(content))


def _braced(text: str, start: int) -> tuple[str | None, int]:
    """Return the content and the end of the braces that open at `start`. The content is None without closed braces."""
    if not text.startswith("{", start):
        return None, start
    depth = 0
    for sign in _BRACE.finditer(text, start):
        depth += (sign[0] == "{") - (sign[0] == "}")
        if depth == 0:
            return text[start + 1 : sign.start()], sign.end()
    return None, len(text)


def _has_content(text: str) -> bool:
    """Return whether LaTeX prints a letter, a digit or a mathematical sign. Tags and operators do not count."""
    printed = _printed(html.unescape(_ANY_TAG.sub("", text)))
    return bool(_EMPTY_SET.search(printed)) or any(map(_is_content, printed))


def _is_content(sign: str) -> bool:
    category = unicodedata.category(sign)
    return (category[0] in "LN" and sign not in _BLANK) or (category == "Sm" and sign not in _OPERATORS)


def _printed(text: str) -> str:
    r"""Return the text as LaTeX prints it, without commands that print nothing. Commands that print a sign become x.

    Only the braces \{ and \} are kept.
    """
    printed, start = list[str](), 0
    while command := _COMMAND.search(text, start):
        printed.append(_BARE_BRACE.sub("", text[start : command.start()]))
        start = command.end()
        name = command["name"] or ""
        if name in _SIGNS:
            printed.append("x")
        elif command["sign"] in ("{", "}") or name in ("lbrace", "rbrace"):
            printed.append("\\{" if "{" in command[0] or name == "lbrace" else "\\}")
        elif name:
            start = _skip_arguments(text, name, start)
    return "".join([*printed, _BARE_BRACE.sub("", text[start:])])


def _skip_arguments(text: str, name: str, start: int) -> int:
    """Return the end of the arguments of a command that are not printed."""
    if name in _LENGTHS and (length := _LENGTH.match(text, start)):
        return length.end()
    for _ in range(_HIDDEN.get(name, 0)):
        start = _skip_options(text, start)
        if name in _OPTIONAL_ONLY:
            return start
        content, start = _argument(text, start)
        if name == "begin" and content.rstrip("*") in _COLUMNS:
            start = _argument(text, _skip_options(text, start))[1]
    return start


def _skip_options(text: str, start: int) -> int:
    match = _OPTION.match(text, start)
    return match.end() if match else start


def _argument(text: str, start: int) -> tuple[str, int]:
    """Return an argument (in braces or a single token), and its end."""
    content, end = _braced(text, start)
    if end > start:
        return content or "", end
    single = _SINGLE.match(text, start)
    return (single[0], single.end()) if single else ("", start)


def short(completion_ids: Sequence[int], budget: int = 512) -> float:
    """Return 1 for a completion of up to `budget` tokens, and budget / length for a longer completion."""
    return min(1.0, budget / max(1, len(completion_ids)))


def shortest(completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> list[float]:
    """Return a value per completion: 0.5 for the group's shortest in tokens, -0.5 for the longest, linear in between.

    All values are 0 if all lengths are equal. The formula is that of Kimi k1.5 (arXiv:2501.12599, section 2.3.3), which
    gives positive values to right answers only. Use a small weight in addition to a reward for the answer.
    """
    lengths = [len(ids) for ids in completion_ids]
    low, high = min(lengths), max(lengths)
    return [0.5 - (length - low) / (high - low) if high > low else 0.0 for length in lengths]


def repeated(completion: str, words: int = 3) -> float:
    """Return the share of n-grams of `words` words that are distinct; 1 for a completion of fewer words.

    This is open-r1's repetition penalty plus 1.
    """
    tokens = completion.lower().split()
    ngrams = [tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def cosine(completion_ids: Sequence[int], budget: int = 512) -> float:
    """Return half a cosine, from 1 at 0 tokens to 0 at `budget` tokens, and 0 for more tokens.

    The formula is equation 1 of Yeo et al. 2025, arXiv:2502.03373.
    """
    return (1 + math.cos(math.pi * min(1.0, len(completion_ids) / budget))) / 2
