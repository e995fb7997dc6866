r"""Structural changes of a gold that change its value: sign, order, one member, multiplicity, a function around it.

Each changes the value by construction (`\ln x = 5` is not 5), or `oracle.py` proves it. Unproven changes are left out.
"""

import re
from collections.abc import Iterator

from members import Change, interval_changes, matrix_changes, member_changes, read_intervals, read_members
from oracle import differ, joined, number, proportional

# Templates around a value or an expression; used if the oracle sees that the value changes.
AROUND = {
    "sign": [r"-({})", r"-|{}|"],
    "function": [
        r"\ln({})", r"\sqrt{{{}}}", r"|{}|", r"({})^2", r"({})^3", r"\frac{{1}}{{{}}}", r"({})^{{-1}}", r"e^{{{}}}",
        r"2^{{{}}}", r"10^{{{}}}", r"\sin({})", r"\cos({})", r"\tan({})", r"\arctan({})", r"\log_2({})",
        r"\sqrt[3]{{{}}}", r"\lfloor {} \rfloor", r"\lceil {} \rceil", r"({})!", r"\exp({})", r"\sinh({})",
    ],
    "factor": [
        r"2({})", r"10({})", r"\frac{{{}}}{{2}}", r"\frac{{{}}}{{10}}", r"({})\pi", r"({})\sqrt{{2}}", r"({})i",
        r"x({})", r"\frac{{{}}}{{y}}", r"1.0001({})", r"\frac{{-({})}}{{3}}", r"100({})",
    ],
    "term": [
        r"({})+1", r"({})-1", r"({})+0.01", r"({})+10^{{-9}}", r"1-({})", r"({})+x", r"({})+i", r"({})+\sqrt{{2}}",
        r"360-({})", r"({})-\pi", r"({})+(1009x-1)(1009x-2)", r"100-({})",
    ],
}  # fmt: skip
# Left side of "= value" -> the value of x, or None if it differs by construction.
LEFT_SIDES = {
    "-x": "-({})", "2x": r"\frac{{{}}}{{2}}", r"\sqrt{{x}}": "({})^2", "x^2": r"\sqrt{{{}}}", "x^3": r"\sqrt[3]{{{}}}",
    r"\frac{{1}}{{x}}": r"\frac{{1}}{{{}}}", "|x|": "-({})", r"\ln x": None, "e^x": None, "x + 1": None, "xy": None,
    "x + y": None, r"\sin x": None, "x!": None, r"\log_2 x": None, r"\lfloor x \rfloor": None, "x - y": None,
    r"\frac{{x}}{{y}}": None, "2^x": None,
}  # fmt: skip
BOUNDS = ["x < {}", r"x \le {}", "x > {}", r"x \ge {}", r"x \ne {}", "|x| < {}", r"({}, \infty)", r"(-\infty, {}]"]
COMPANY = [
    "{}, 1234", "1234, {}", r"{} \text{{ or }} 1234", r"{} \text{{ and }} 1234", "({}, 1234)", r"\{{{}, 1234\}}",
    "[{}, {}+1]", "({}, {})", r"\begin{{pmatrix}} {} \\ 0 \end{{pmatrix}}", r"{} \pm 1",
]  # fmt: skip
WORDS = [
    "at least", "at most", "or more", "or less", "if n is even", "when x > 0", "or 1234", "but not always", "is wrong",
    "out of 1234", "unless n = 2",
]  # fmt: skip
WORDS_UNLESS_ZERO = ["thousand", "million", "dozen", "lakh", "per cent", "per mille", "tenths", "squared"]
_NAMES = [
    (r"\sin", r"\cos"), (r"\cos", r"\sin"), (r"\tan", r"\cot"), (r"\sec", r"\csc"), (r"\pi", "e"), (r"\sqrt", ""),
    ("x", "y"), ("i", ""),
]  # fmt: skip
_WORDS = re.compile(r"\\(?:text|mbox|textnormal)\{[^{}]*\}(?:\^\{?\d\}?)?|\\?\$|\^\{?\\circ\}?|\\%")
_NAME = re.compile(r"\s*[A-Za-z]\s*")


def changes(gold: str) -> list[Change]:
    """The kind and the text of each change; each has a different value."""
    gold = gold.strip().rstrip(".")
    by_text = {text: (kind, text) for kind, text in _all_changes(gold) if text != gold}
    return list(by_text.values())


def _all_changes(gold: str) -> Iterator[Change]:
    name, _, rest = gold.rpartition("=")
    if _NAME.fullmatch(name) and number(rest) is not None:
        yield from _value_changes(rest.strip())
        yield from (("name kept", f"{name}= {text}") for kind, text in _value_changes(rest.strip()) if kind in AROUND)
    elif gold.count("=") == 1 and not re.search(r"\\(?:text|approx|begin|[lg]e)|[<>,]", gold):
        yield from _equation_changes(*gold.split("="))
    elif parts := read_intervals(gold):
        yield from interval_changes(parts)
    elif matrix := re.fullmatch(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", gold, re.DOTALL):
        yield from matrix_changes(matrix[1])
    elif members := read_members(gold):
        yield from member_changes(*members)
    elif letters := re.fullmatch(r"(?:\\text\{)?([A-J](?:, ?[A-J])+)\}?", gold):
        yield from _letter_set_changes(re.findall("[A-J]", letters[1]))
    elif re.fullmatch(r"\(?\\text\{\(?[A-Z]\)?\},?\)?|[A-J]", gold):
        yield from _choice_changes(re.sub(r"\\text|[{}(),]", "", gold))
    elif ratio := re.fullmatch(r"(\d+) *: *(\d+)", gold):
        yield from _ratio_changes(int(ratio[1]), int(ratio[2]))
    elif words := re.fullmatch(r"\\(?:text|mbox)\{([a-zA-Z ]+)\}", gold):
        yield from _word_changes(words[1])
    elif number(gold) is None and re.search(r"\d", gold) and not re.search(r"frac|=|sqrt|begin|\\[alg]|f\(|_", gold):
        yield from _digit_changes(gold)
    else:
        yield from _value_changes(gold)


def _value_changes(gold: str) -> Iterator[Change]:
    for kind, templates in AROUND.items():
        for text in (template.format(gold) for template in templates):
            is_rounded = len(re.sub(r"\D", "", gold)) >= 8  # a printed float may stand for a value near it
            if differ(gold, text) and not (is_rounded and "-9" in text):
                yield kind, text
    yield from (("edit", text) for text in _edited(gold) if differ(gold, text))
    if number(gold) is not None:
        yield from _number_changes(gold)


def _number_changes(gold: str) -> Iterator[Change]:
    yield "function", f"f({gold})"
    for left, solved in LEFT_SIDES.items():
        if solved is None or differ(gold, solved.format(gold)):
            yield "left side", (left + " = {}").format(gold)
    yield from (("bound", template.format(gold)) for template in BOUNDS)
    yield from (("company", template.format(*[gold] * 2)) for template in COMPANY)
    if not _WORDS.search(gold) and "_" not in gold:
        words = [*WORDS, *(WORDS_UNLESS_ZERO if number(gold) not in (0, 1) else ())]
        yield from (("words", rf"{gold}\text{{ {phrase}}}") for phrase in words)
        if number(gold) != 0:
            yield "per cent", rf"{gold}\%"
            yield "sign", rf"\pm ({gold})"
    if re.fullmatch("[0-6]{2,}", gold):
        yield "base", f"{gold}_7"
    if re.search(r"\\(?:text|mbox)\{ *(?:cm|ft|m|in|inches|feet|meters|units)\}\^\{?2\}?$", gold):
        yield "unit", re.sub(r"\^\{?2\}?$", "^3", gold)


def _edited(gold: str) -> Iterator[str]:
    """The text with one number, sign or name changed."""
    plain = joined(gold)
    for match in re.finditer(r"\d+", plain):
        digits, number_ = match[0], int(match[0])
        numbers = {str(number_ + 1), str(abs(number_ - 1)), str(number_ + 9), digits + "0", digits + digits[-1]}
        for changed in sorted(numbers | {digits[::-1], digits[:-1] or "3"}):
            yield plain[: match.start()] + changed + plain[match.end() :]
    for match in re.finditer("[+-]", plain):
        yield plain[: match.start()] + {"+": "-", "-": "+"}[match[0]] + plain[match.end() :]
    if match := re.search(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", plain):
        yield plain[: match.start()] + rf"\frac{{{match[2]}}}{{{match[1]}}}" + plain[match.end() :]
    for old, new in _NAMES:
        if old in plain:
            yield plain.replace(old, new)
            yield plain.replace(old, new, 1)


def _equation_changes(left: str, right: str) -> Iterator[Change]:
    difference = f"({left})-({right})"
    if _NAME.fullmatch(left) and left.strip() not in right:
        name = left.strip()
        texts = [*_edited(right), *(template.format(right) for templates in AROUND.values() for template in templates)]
        yield from (("right side", f"{name} = {text}") for text in texts if differ(right, text))
        if differ(right, f"{right} + 1"):
            for form in ("2{}", "-{}", "{}^2", r"\ln {}", r"\sqrt{{{}}}", r"\frac{{1}}{{{}}}", "{} + 1"):
                yield "left side", f"{form.format(name)} = {right}"
            yield from (("relation", f"{name} {sign} {right}") for sign in (r"\le", "<", ">", r"\ge", r"\ne"))
    for text in [*_edited(left), *(form.format(left) for form in (*AROUND["term"], "x({})", "({})^2 + 1"))]:
        if not proportional(difference, f"({text})-({right})"):
            yield "left side", f"{text}={right}"
    if right.strip() == "0" and differ(left, f"{left} + 1"):
        for form in (
            "{} = 1", "{} = -1", "{} > 0", "{} < 0", r"{} \le 0", r"{} \ge 0", r"{} \ne 0", "{} + 1 = 0", "{} - 1 = 0",
            "({})(x - 1234) = 0", "{} = x + 1234", "{} = y - 1234", r"\ln({}) = 0", r"e^{{{}}} = 0", "{} = i", "{}",
        ):  # fmt: skip
            yield "equation", form.format(left.strip())


def _choice_changes(letter: str) -> Iterator[Change]:
    alternatives = [changed for changed in "ABCDEFGHIJ" if changed != letter]
    for changed in alternatives:
        yield from (("letter", form.format(changed)) for form in ("{}", r"\text{{({})}}", r"\textbf{{({})}}"))
    for changed in alternatives[:5]:
        for form in ("{} or {}", "{}, {}", r"\text{{({})}} and ({})", "{1} or {0}", "{}/{}"):
            yield "hedged", form.format(letter, changed)
    for words in ("is wrong", "but not always", "is not it", "or (J)", "and (I)"):
        if letter not in words:
            yield "words", rf"\text{{{letter} {words}}}"
    for form in (r"\ln {}", "2{}", "{}^2", r"\sqrt{{{}}}", "-{}", "{} + 1", "x = 2{}"):
        yield "function", form.format(letter)


def _letter_set_changes(letters: list[str]) -> Iterator[Change]:
    absent = [letter for letter in "ABCDEFGHIJ" if letter not in letters]
    for index, letter in enumerate(letters):
        rest = [*letters[:index], *letters[index + 1 :]]
        yield "one less", ", ".join(rest)
        yield "half", letter
        yield from (("letter", ", ".join([*rest, added])) for added in absent)
        yield "words", rf"\text{{not {letter}}}"
        yield "words", ", ".join(letters) + rf"\text{{ but not {letter}}}"
    for added in absent:
        yield "one more", ", ".join([*letters, added])
        yield "hedged", rf"\text{{{', '.join(letters)} or {added}}}"
        yield "hedged", rf"{' or '.join(letters)} or {added}"


def _ratio_changes(first: int, second: int) -> Iterator[Change]:
    pairs = [(a, b) for a in range(first - 4, first + 5) for b in range(second - 3, second + 4)]
    yield from (("ratio", f"{a}:{b}") for a, b in pairs if a > 0 < b and a * second != b * first)
    yield from (("ratio", text) for text in (f"-{first}:{second}", f"{first}:{second}:1", f"({first}, {second})"))
    if first != 1 != second:
        yield from (("half", str(part)) for part in (first, second))


def _word_changes(words: str) -> Iterator[Change]:
    for form in ("not {}", "{} or 7", "neither {} nor 7", "{} is wrong", "un{}", "{}x", "x{}"):
        yield "words", rf"\text{{{form.format(words)}}}"
    for word in ("cat", "Friday", "seven", "no", "April", "green", "none", "B", "x", "7"):
        if word.lower() != words.lower():
            yield "word", rf"\text{{{word}}}"
    for index, letter in enumerate(words):
        if letter.isalpha():
            yield "word", words[:index] + words[index + 1 :]


def _digit_changes(gold: str) -> Iterator[Change]:
    """A time, a date or the like with one number changed."""
    for match in re.finditer(r"(?<![\d.])\d+(?![\d.])", gold):
        for changed in range(1, 60):
            if changed != int(match[0]):
                yield "number", f"{gold[: match.start()]}{changed:0{len(match[0])}}{gold[match.end() :]}"
