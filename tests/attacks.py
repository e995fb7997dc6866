"""Answers that a grader must not pay: fifty changes of a gold's value, and mutations of its text."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

_ZERO = re.compile(r"-?(?:0|0\.0|0[,+-].*)|\\begin\{pmatrix\}[0 &\\]*\\end\{pmatrix\}")
_SAME_WHERE_ONE = {"0", "1", "-1"}  # roots, powers and reciprocals of these are the same
WRAPPED = [
    r"\ln({})", r"e^{{{}}}", r"({})+1", r"({})-1", r"({})+\frac12", r"({})+0.01", r"({})+x", r"({})+\sqrt{{2}}",
    r"10^{{{}}}", r"\cos({})+2", r"3-({})i+5i", r"\lfloor {} \rfloor + \frac{{1}}{{1009}}", r"({})!+\frac12", r"f({})",
    r"\binom{{9}}{{2}}+\frac13-({})",
]  # fmt: skip
WRAPPED_UNLESS_ZERO = [
    r"({})i", r"2({})", r"\frac{{{}}}{{3}}", r"10({})", r"x({})", r"({})\sqrt2", r"({})\pi", r"\frac{{{}}}{{y}}",
    r"({})(z+1)",
]  # fmt: skip
WRAPPED_UNLESS_ONE = [r"\sqrt{{{}}}", r"({})^2", r"({})^3", r"\sqrt[3]{{{}}}"]
LEFT_SIDES = [
    r"\ln x = {}", r"\log_2 x = {}", r"xy = {}", r"x+1 = {}", r"e^x = {}", r"\sin x = {}", r"x! = {}", r"x + y = {}",
    r"\frac{{x}}{{y}} = {}", r"x_1x_2 = {}", r"2^x = {}", r"1 - x = {}",
]  # fmt: skip
LEFT_SIDES_UNLESS_ONE = [r"\sqrt{{x}} = {}", r"-x = {}", r"2x = {}", r"x^2 = {}", r"|x| = {}", r"\frac1x = {}"]
BOUNDS = [r"x \le {}", r"x < {}", r"x \ge {}", r"x > {}", r"x \ne {}", r"|x| < {}"]
WORDS = [
    "at least", "at most", "or more", "or less", "if n is even", "when x > 0", "or 1234", "but not always", "squared",
    "is wrong", "out of 1234",
]  # fmt: skip
WORDS_UNLESS_ZERO = ["thousand", "dozen", "lakh", "per cent", "per mille", "tenths"]
MEMBERS = [
    "{}, 1234", r"1234, {}", r"{} \text{{ or }} 1234", r"{} \text{{ and }} 1234", r"({}, 1234)", r"(1234, {})",
    r"\{{{}, 1234\}}",
]  # fmt: skip
_TRIGONOMETRIC = {"sin": "cos", "cos": "sin", "tan": "cot", "ln": "log", "log": "ln"}
_PIECES = (
    *r"^ _ { } ( ) [ ] \frac \text{ \} \{ | ! !! ^\circ \mathbb{R} \in \ne = < \le \cup \setminus \{x| \pm &".split(),
    *r"\begin{cases} \end{cases} \sqrt \overline \dot 0. C_n^3 <sup> </sup> &lt; \SI{ \num{ % \boxed{ if , ;".split(),
    *r"1e999 {}_ f( f^{-1}( C( Union( Interval( I* \tanh \operatorname{ \left \right. \infty - + / * ** \binom".split(),
    *r"x n \pi e^ i \forall \lfloor \rceil \sum_{ \int \lim_ \cdot \log_ ' _{ \mathrm{".split(),
    "9" * 60, "\x00", "\u200b", "\u00b2", "\u00bd", "\u0661", "\u4e07", "\u5143", "\u2030",
)  # fmt: skip


def changes(gold: str) -> Iterator[tuple[str, str]]:
    """A kind and a text for each change of a gold, all of another value."""
    zero = _ZERO.fullmatch(gold) is not None
    one = gold in _SAME_WHERE_ONE or zero or re.search(r"_|001|matrix", gold) is not None
    if re.fullmatch(r"(?:\\text\{)?\(?(?:\\text\{)?[A-J]\}?\)?\}?", gold):
        yield from _choices(gold)
        return
    is_statement = re.search(r"[=<>:]|\\[lg]eq?|\\in(?![a-z])|\\approx|\\text\{\s*or", gold) is not None
    is_set = bool(
        is_statement or re.search(r"[\[\]]|infty|\\cup|\{|mathbb", gold.replace("\\frac{", "").replace("^{", ""))
    )
    for kind, templates, is_made in (
        ("wrapped", WRAPPED, True),
        ("wrapped", WRAPPED_UNLESS_ZERO, not zero),
        ("wrapped", WRAPPED_UNLESS_ONE, not one),
        ("left side", LEFT_SIDES, not is_statement),
        ("left side", LEFT_SIDES_UNLESS_ONE, not is_statement and not one),
        ("bound", BOUNDS, not is_set),
        ("members", MEMBERS, not is_set),
    ):
        yield from ((f"{kind} {template}", template.format(gold)) for template in templates if is_made)
    for words in [] if is_statement else [*WORDS, *([] if zero else WORDS_UNLESS_ZERO)]:
        yield f"words {words}", rf"{gold}\text{{ {words}}}"
    yield from _digits(gold)
    yield from _members(gold)
    for old, new in _TRIGONOMETRIC.items():
        if rf"\{old}" in gold and not re.search(r"^-?\d|45", gold):
            yield "function", gold.replace(rf"\{old}", rf"\{new}")


def _choices(gold: str) -> Iterator[tuple[str, str]]:
    """Of a multiple choice: any text may stand behind its letter."""
    for template in [*LEFT_SIDES, *LEFT_SIDES_UNLESS_ONE, r"\ln({})", r"e^{{{}}}", "2({})", r"\sqrt{{{}}}"]:
        yield f"choice {template}", template.format(gold)
    for words in ("is wrong", "but not always", "or 1234", "is not it", "or (J)", "and (I)"):
        yield f"choice {words}", rf"{gold}\text{{ {words}}}"


def _digits(gold: str) -> Iterator[tuple[str, str]]:
    if re.search(
        r"\\(?:text|mbox|pmod|approx|infty|!)|0\.\d|_|:|!|\d,\d{3}|\^0", gold
    ):  # a digit there may change nothing
        return
    for found in re.finditer(r"(?<![\d.])[1-9]\d*(?![\d.])", gold):
        number, (start, end) = int(found[0]), found.span()
        if number > 1:
            for other in (number + 1, number * 10 + 7):
                changed = gold[:start] + str(other) + gold[end:]
                if gold.count(found[0]) == 1 and "frac" not in gold and "sqrt" not in gold:
                    yield "digit", changed


def _members(gold: str) -> Iterator[tuple[str, str]]:
    pair = re.fullmatch(r"\(([^(),\[\]]+),([^(),\[\]]+)\)", gold)
    if pair and "infty" not in gold and pair[1].strip() != pair[2].strip():
        one, other = pair[1].strip(), pair[2].strip()
        yield "order", f"({other}, {one})"
        yield "order", f"(x,y) = ({other}, {one})"
        yield "first", f"({one}+1, {other})"
        yield "second", f"({one}, {other}+1)"
        yield "half", one
        yield "brackets", f"[{one}, {other}]"
        yield "set", rf"\{{{one}, {other}\}}"
        yield "named", f"(x,y) = ({one}+3, {other})"
    if "," in gold and not re.search(r"[()\[\]{}]|\d,\d{3}|,\\!", gold):
        items = [item.strip() for item in gold.split(",")]
        yield "one less", ", ".join(items[:-1])
        yield "one twice", ", ".join([*items, items[0]])
        yield "one changed", ", ".join([f"{items[0]}+1", *items[1:]])


def answers(directories: list[Path]) -> list[str]:
    """Golds and predictions of labelled rows, the last 200 characters of each."""
    rows = [
        json.loads(line)
        for directory in directories
        for file in sorted(directory.glob("*.jsonl"))
        for line in file.read_text("utf-8").split("\n")
        if line
    ]
    return sorted({str(row[side])[-200:] for row in rows for side in ("gold", "prediction")})


def mutated_pairs(texts: list[str], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Pairs of gold and prediction, one a mutation of the other or of anything."""
    random_ = random.Random(seed)
    for _ in range(count):
        gold = random_.choice(texts)
        prediction = _mutated(gold if random_.random() < 0.6 else random_.choice(texts), texts, random_)
        if random_.random() < 0.2:
            gold = _mutated(gold, texts, random_)
        yield gold, rf"\boxed{{{prediction}}}" if random_.random() < 0.7 else prediction


def _mutated(text: str, texts: list[str], random_: random.Random) -> str:
    for _ in range(random_.choice([0, 1, 1, 2, 3, 5])):
        start = random_.randrange(len(text) + 1)
        end = min(len(text), start + random_.randrange(1, 6))
        other = random_.choice(texts)
        text = random_.choice(
            [
                text[:start] + text[end:],
                text[:start] + random_.choice(_PIECES) + text[start:],
                text[:start] + 2 * text[start:end] + text[end:],
                random_.choice(_PIECES) + text,
                text + random_.choice(_PIECES),
                text[:start] + other[random_.randrange(len(other) + 1) :],
                text[:start] + "{" + text[start:end] + "}" + text[end:],
                text[:start] + "-" + text[start:],
            ]
        )
    return text[:400]
