"""Random pairs of answers with mutated texts, drawn from a seed."""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

_PIECES = (
    *r"^ _ { } ( ) [ ] \frac \text{ \} \{ | ! !! ^\circ \mathbb{R} \in \ne = < \le \cup \setminus \{x| \pm &".split(),
    *r"\begin{cases} \end{cases} \sqrt \overline \dot 0. C_n^3 <sup> </sup> &lt; \SI{ \num{ % \boxed{ if , ;".split(),
    *r"1e999 {}_ f( f^{-1}( C( Union( Interval( I* \tanh \operatorname{ \left \right. \infty - + / * ** \binom".split(),
    *r"x n \pi e^ i \forall \lfloor \rceil \sum_{ \int \lim_ \cdot \log_ ' _{ \mathrm{ \not | || \\ & \mid".split(),
    *r"\begin{pmatrix} \end{pmatrix} \begin{array}{c} \hline \pmod{ \dots ... \cdots \circ \prime \hat{ \vec".split(),
    "9" * 60, "\x00", "\u200b", "\u00b2", "\u00bd", "\u0661", "\u4e07", "\u5143", "\u2030",
    "\U0001d7d9", "\u2460", "\u0301",
)  # fmt: skip
_UNITS = (
    "cm",
    "cm^2",
    "apples",
    "dollars",
    "per cent",
    "thousand",
    "at least",
    "or more",
    "degrees",
    "hours",
    "if n is even",
    "squared",
)
_LOOKALIKES = str.maketrans("-x012(,*/<A", "\u2212\u0445\uff10\u0661\u00b2\uff08\uff0c\u00d7\u2044\uff1c\uff21")
_HUGE = (
    "10^{1000}",
    "9^{9^{9}}",
    "2000!",
    "1" * 300,
    "10^{-999}",
    "e^{e^{e^{e}}}",
    "((((((((7))))))))",
    "0.{}".format("3" * 200),
)
_JOINED = ("{}, {}", "{} or {}", "{} = {}", "({}, {})", "{}{}", r"\frac{{{}}}{{{}}}", "{}^{{{}}}")

Mutation = Callable[[str, str, random.Random], str]


def answers(directories: list[Path], max_length: int = 200) -> list[str]:
    """Golds, predictions and box contents of labelled rows, each cut to its last `max_length` characters."""
    rows = [
        json.loads(line)
        for directory in directories
        for file in sorted(directory.glob("*.jsonl"))
        for line in file.read_text("utf-8").split("\n")
        if line
    ]
    texts = {str(row[side]) for row in rows for side in ("gold", "prediction")}
    boxed = {box for text in texts for box in re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)}
    return sorted({text[-max_length:] for text in texts | boxed})


def mutated_pairs(texts: list[str], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Pairs of gold and prediction. The prediction mutates the gold or a random text; two thirds are short answers."""
    random_ = random.Random(seed)
    short = [text for text in texts if len(text) <= 60]

    def drawn() -> str:
        return random_.choice(short if short and random_.random() < 0.67 else texts)

    for _ in range(count):
        gold = drawn()
        prediction = _mutated(gold if random_.random() < 0.6 else drawn(), texts, random_)
        if random_.random() < 0.2:
            gold = _mutated(gold, texts, random_)
        yield gold, rf"\boxed{{{prediction}}}" if random_.random() < 0.7 else prediction


def _mutated(text: str, texts: list[str], random_: random.Random) -> str:
    for _ in range(random_.choice([0, 1, 1, 2, 3, 5])):
        text = random_.choice(_MUTATIONS)(text, random_.choice(texts), random_)
    return text[:400]


def _cut(text: str, random_: random.Random) -> tuple[str, str, str]:
    start = random_.randrange(len(text) + 1)
    end = min(len(text), start + random_.randrange(1, 6))
    return text[:start], text[start:end], text[end:]


def _within(change: Callable[[str, random.Random], str]) -> Mutation:
    """A mutation that changes up to five characters at a random position."""

    def mutation(text: str, _: str, random_: random.Random) -> str:
        head, cut, tail = _cut(text, random_)
        return head + change(cut, random_) + tail

    return mutation


def _digit(text: str, _: str, random_: random.Random) -> str:
    indices = [index for index, letter in enumerate(text) if letter.isascii() and letter.isdigit()]
    if not indices:
        return text
    index = random_.choice(indices)
    return text[:index] + random_.choice("0123456789") + text[index + 1 :]


def _sign(text: str, _: str, random_: random.Random) -> str:
    indices = [index for index, letter in enumerate(text) if letter in "+-<>"]
    if not indices:
        return "-" + text
    index = random_.choice(indices)
    return text[:index] + {"+": "-", "-": "+", "<": ">", ">": "<"}[text[index]] + text[index + 1 :]


def _swapped(text: str, _: str, random_: random.Random) -> str:
    """Exchanges two parts between commas, signs or relations."""
    parts = re.split(r"(,|\+|-|=|<|>|\}\{|\\\\|&|:|\\cup)", text)
    if len(parts) < 3:
        return text
    first, second = random_.sample(range(0, len(parts), 2), 2)
    parts[first], parts[second] = parts[second], parts[first]
    return "".join(parts)


_MUTATIONS: tuple[Mutation, ...] = (
    _digit,
    _sign,
    _swapped,
    _within(lambda cut, _: ""),
    _within(lambda cut, _: 2 * cut),
    _within(lambda cut, _: "{" + cut + "}"),
    _within(lambda cut, _: "-" + cut),
    _within(lambda cut, _: cut.translate(_LOOKALIKES)),
    _within(lambda cut, _: rf"\text{{{cut}}}"),
    _within(lambda cut, _: "^{" * 3 + cut + "}" * 3),
    _within(lambda cut, random_: random_.choice(_PIECES) + cut),
    _within(lambda cut, random_: random_.choice(_PIECES) + cut),
    _within(lambda cut, random_: random_.choice(_HUGE) + cut),
    lambda text, _, random_: random_.choice(_PIECES) + text,
    lambda text, _, random_: text + random_.choice(_PIECES),
    lambda text, _, random_: text + rf"\text{{ {random_.choice(_UNITS)}}}",
    lambda text, _, random_: text + " " + random_.choice(_UNITS),
    lambda text, _, random_: text[: random_.randrange(len(text) + 1)],
    lambda text, _, random_: text[random_.randrange(len(text) + 1) :],
    lambda text, second, random_: _cut(text, random_)[0] + second[random_.randrange(len(second) + 1) :],
    lambda text, second, random_: random_.choice(_JOINED).format(text, second[:60]),
    lambda text, _, random_: rf"\text{{{text}}}",
)  # fmt: skip
