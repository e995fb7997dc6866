"""Finds the answer in a completion or in a gold, the reference answer. The rules: docs/math.md. Stdlib only."""

# ruff: noqa: RUF001 - signs of other scripts are intended

import math
import re
import unicodedata
from functools import lru_cache
from typing import Any, NamedTuple

from .asides import HEADING, without_asides
from .exact import plain
from .notation import PERCENT
from .prose import MAX_LENGTH, has_number, has_run_of_lines, is_formula, last_value, statement
from .turn import final_text
from .units import MULTIPLIER

_TAIL_LENGTH = 4000  # characters at the end that are searched for an answer without a box
_MAX_MARKERS = 8  # occurrences of "answer" that are tried, from the end

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])(?:\s*\[[^\]{}]{0,40}\]){0,2}")
_MARKER = re.compile(
    r"nswers?\b[\"']?(?:\s+(?:to|of|for)\b[^.\n:]{0,80}?)?\s*[*_`)}]*\s*(?:(?:is|are|was|be|=|:|为|是)\s*[*_`]*\s*:?|:)\s*[*_`]*\s*"
    r"(?:(?:therefore|thus|simply|just|exactly|equal to|given by|the option|option|choice)\s+)*",
    re.IGNORECASE,
)
_ANSWER_HEADING = re.compile(  # "Answer" as a heading, "Answer - 42", "[ANSWER] 42"
    r"(?:\A|\n)[#*_> \t\d.()]{0,20}(?:(?:the|my|final|correct)\s+)*answers?[*_\s]{0,9}?(?:[ \t]-[ \t]+|[*_# \t]{0,9}\n)"
    r"|\[\[?[#\s]*(?:final[ _])?answer[#\s]*\]\]?\s*:?",
    re.IGNORECASE,
)
_NOT_MARKER = re.compile(  # text before "answer": a check of it, or a different answer
    r"\b(?:(?:check|verif|confirm|test|pro[ov]|plug|substitut|validat|justif|explain|explan|estimat|reason|why|how)\w*\s+(?:\w+\s+){0,2}?"
    r"(?:(?:of|that|for|the|our|my|your|this|final|whether|if|with|back|into|in|using|by)\s+)*"
    r"|(?:wrong|incorrect|naive|initial|tempting|previous|intermediate|partial)\s+)(?:final\s+)?a\Z",
    re.IGNORECASE,
)
_FOREIGN_MARKER = re.compile(
    r"(?:答案|答え|正解|정답|(?:réponse|respuesta|risposta|resposta)(?:\s+(?:corr\w+|final\w*|exacta))?|antwort|ответ|الجواب(?:\s+هو)?|उत्तर|(?:(?<![\w])|(?<=[故解]))[答답](?=[\]】*_\s]*[:\]】])"
    r"|(?:option|choice)\s+is|inal\s+result\b)[\]】*_\s]*(?:应?(?:是|为)|は|은|는|est|es|ist|è|é|lautet)?(?:\s+(?:la\s+opción|a\s+opção|l['’]opzione|l['’]option|die\s+Option))?\s*[\]】*_]*\s*:?[*_\s]*",
    re.IGNORECASE,
)
_VALUE_FIRST = re.compile(
    r"(?:\A|[\n.!?:]\s*)(?:(?:so|thus|hence|therefore|and)\b,?\s*)?([^\n.;:!?]{1,60}?)\s+is\s+(?:the|our|my)\s+"
    r"(?:(?:final|correct)\s+)?answer\b(?!\s+(?:to|of|for)\s+(?:part|question|the\s+(?:first|previous)))"
)
_BEFORE_EXPLANATION = re.compile(
    r"([^\n]{1,60})\n[\s*_#]*(?:explanation|reasoning|justification|working|solution|steps)\b", re.IGNORECASE
)
_FOREIGN_HINTS = ("espuest", "ntwort", "ispost", "espost", "ption is", "hoice is", "inal result", "inal Result")
_MARKER_HINT = re.compile(r"####|nswer|NSWER|答|正解|답|</|<\\|")
_TYPESETTING = re.compile(
    r"\\(?:boxed|fbox|framebox|text\w*|math\w*|mbox|left|right|displaystyle|q?quad|operatorname|[,;:! ()\[\]])"
    r"(?![a-zA-Z])"
)
_PUNCTUATION = " \t\r\n\v\f{}()[]$.,:;!?'\"`*_~#/|\\-"
_A_COLON = re.compile(r"(?:\A|\n)[ \t]*(?:A:|Ans\s*[:.=])\s*")
_SEPARATOR = re.compile(
    r"(?:[\s,;.$&]|\\[()\[\],;:! ]|\\q?quad|\\text(?:bf|rm)?\s*\{[^{}]*\}|\band\b|\bor\b|[和与、或]|[A-Za-z]\w*\s*=)*\Z"
)

_BOUND_WORDS = re.compile(r"\s*(?:or\s+(?:more|less|fewer)|at\s+(?:least|most))\b")
_LEADING_OPERATOR = re.compile(r"(?:(?:=|\$|\\\[|\\\(|\A)\s*)([-−]|\\(?:ln|log|sin|cos|tan|sqrt|exp))\s*\Z")


class Answer(NamedTuple):
    """The text of an answer, and whether a box or a marker (such as "the answer is") announced the answer.

    `boxes` are several boxes that can form one list. `percent` is whether a percent sign follows. `context` is text
    that can name a letter that is not in `text`: the text after the box, or the whole completion.
    """

    text: str
    marked: bool = True
    boxes: tuple[str, ...] = ()
    percent: bool = False
    context: str = ""


def find_answer(completion: str) -> Answer | None:
    """Find the answer of a completion: the last box, else the value after a marker, else the last value."""
    text = final_text(completion)
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"), text.rfind("\\framebox"))
    if last >= 0:
        boxed = _boxed(text, last)
        return _after_final_answer(boxed.context if boxed else text[last:]) or boxed
    text = plain(text[-_TAIL_LENGTH:])
    answer = _after_hashes(text) or _after_marker(text) or _before_marker(text) or _unmarked(text)
    return answer and answer._replace(context=text)


def find_gold(gold: str) -> Answer:
    """Find a gold's answer: its last box with all boxes joined to it, else the value after a marker, else the text."""
    last = max(gold.rfind("\\boxed"), gold.rfind("\\fbox"))
    if last >= 0:
        return _boxed(gold, last, gold=True) or Answer("")
    if len(gold) <= MAX_LENGTH and not _MARKER_HINT.search(gold):
        return Answer(gold)
    text = plain(final_text(gold)[-_TAIL_LENGTH:])
    return _after_hashes(text) or _after_marker(text) or Answer(gold)


def is_empty(gold: Any) -> bool:
    """Return whether a gold is empty: None, NaN, or only white space, punctuation and commands that print nothing."""
    return gold is None or (isinstance(gold, float) and math.isnan(gold)) or _is_blank(str(gold))


@lru_cache(4096)
def _is_blank(gold: str) -> bool:
    remainder = _TYPESETTING.sub("", plain(gold)) if len(gold) < 200 else gold
    return "\\{" not in remainder and all(map(_is_punctuation, remainder))  # \{\} is the empty set


def _is_punctuation(sign: str) -> bool:
    return sign in _PUNCTUATION if sign.isascii() else unicodedata.category(sign)[0] in "PZC"


def _after_final_answer(text: str) -> Answer | None:
    """Return the value that "final answer is" announces after the last box; None for words."""
    position = max(text.rfind("inal answer"), text.rfind("inal Answer"))
    if position < 0 or _NOT_MARKER.search(text[max(0, position - 80) : position + 6]):
        return None
    answer = _after_marker(plain(text[position : position + MAX_LENGTH]))
    return answer if answer and re.match(r"[-+$\\(\[\d]", answer.text) else None


def _boxed(text: str, position: int, gold: bool = False) -> Answer | None:
    """Return the box that starts at `position`, with the boxes joined before it; None without content."""
    content, end = _box_content(text, position, gold)
    if content is None or not content.strip():
        return None
    boxes, start = [content], position
    while len(boxes) < 50:
        previous = max(
            text.rfind("\\boxed", max(0, start - MAX_LENGTH), start),
            text.rfind("\\fbox", max(0, start - MAX_LENGTH), start),
        )
        if previous < 0:
            break
        inner, inner_end = _box_content(text, previous, False)
        if inner is None or inner_end > start or not _are_joined(text[inner_end:start], gold):
            break
        boxes.insert(0, inner)
        start = previous
    if gold and len(set(boxes)) == 1:
        boxes = boxes[:1]
    boxes = [plain(box) for box in boxes]
    boxes[-1] = _with_neighbours(boxes[-1], text[max(0, position - 20) : position], text[end : end + 40])
    percent = re.match(rf"\s*\$?\s*(?:\\?%|(?:\\text\{{)?\s*{PERCENT}\b)", text[end : end + 30])
    return Answer(boxes[-1], True, tuple(boxes) if len(boxes) > 1 else (), percent is not None, text[end:])


def _with_neighbours(content: str, prefix: str, suffix: str) -> str:
    r"""Add text next to a box that changes the number in the box: \boxed{7}^2, \boxed{7} million, = -\boxed{7}."""
    if not re.fullmatch(r"[\d.,]+", content):
        return content
    if power := re.match(r"\s*\^\s*(?:\{[^{}]*\}|\\circ|\w)", suffix):
        return content + power[0]
    words = re.sub(r"\\text\w*\s*\{|\\[,;: ]|[$~]|\\[)\]]", " ", suffix)
    if match := MULTIPLIER.match(words) or _BOUND_WORDS.match(words):
        return rf"{content}\text{{ {match[0].strip()}}}"
    if match := _LEADING_OPERATOR.search(prefix):
        return f"{match[1]}({content})"
    return content


def _are_joined(separator: str, gold: bool) -> bool:
    if len(separator) > 70:
        return False
    if gold and (len(separator) < 10 or re.search(r"\band\b|\bor\b|,|;", separator)):
        return True
    return bool(_SEPARATOR.match(separator)) and (
        len(separator) < 4 or re.search(r",|;|\band\b|\bor\b|quad", separator) is not None
    )


def _box_content(text: str, position: int, lenient: bool) -> tuple[str | None, int]:
    """Return the content and the end of a box. The content is None for an unclosed box, and above MAX_LENGTH."""
    match = _BOX.match(text, position)
    if match is None:
        return None, position
    start = match.end()
    while start < len(text) and text[start].isspace():
        start += 1
    if text[start : start + 1] != "{":
        word = re.match(r"[^\s$\\{}]{1,50}", text[start : start + 60])
        return (word[0], start + word.end()) if word else (None, start)
    depth = 0
    for index in range(start, min(len(text), start + MAX_LENGTH + 2)):
        sign = text[index]
        if sign in "{}" and text[index - 1] != "\\":
            depth += 1 if sign == "{" else -1
            if not depth:
                return text[start + 1 : index], index + 1
        elif sign in "{}" and text[index - 2 : index] == "\\\\" and sign == "}" and depth == 1:
            return text[start + 1 : index], index + 1
    trailing = text[start + 1 : start + MAX_LENGTH].strip()
    if trailing.endswith("\\}") and trailing.count("\\{") < trailing.count("\\}"):  # a backslash before the last brace
        return trailing[:-2], len(text)
    return (text[start + 1 : start + MAX_LENGTH], len(text)) if lenient else (None, position)


def _after_hashes(text: str) -> Answer | None:
    position = text.rfind("####")
    if position < 0:
        return None
    content = text[position:].lstrip("#").strip()
    line, _, following = content.partition("\n")
    if not line or HEADING.match(line) or len(line) > MAX_LENGTH or "nswer" in line:
        return None
    starts_value = re.match(r"[*_]*[-+−$\\(\[{.\d]", line)  # words are a heading unless they end the text
    return Answer(line.strip()) if starts_value or not following else None


def _after_marker(text: str) -> Answer | None:
    """Return the value after the last "answer is", "Answer:", heading or "A:" that a value follows."""
    for end in sorted(_marker_ends(text), reverse=True):
        start = end + (text[end - 1 : end + 1] in ("=>", "->", "\n>"))
        if (value := statement(text[start : start + MAX_LENGTH])) is not None:
            return Answer(value)
    return None


def _before_marker(text: str) -> Answer | None:
    """Return the value in the last "27 is the answer"."""
    for match in reversed(list(_VALUE_FIRST.finditer(text)) if "answer" in text else []):
        if is_formula(match[1]) and has_number(match[1]):
            return Answer(match[1].strip())
    return None


def _marker_ends(text: str) -> set[int]:
    """Return the ends of all markers that announce an answer."""
    position = len(text)
    ends = set()
    for _ in range(_MAX_MARKERS):
        position = max(text.rfind("nswer", 0, position), text.rfind("NSWER", 0, position))
        if position < 0:
            break
        prefix = text[max(0, position - 80) : position].rpartition("\n")[2].rpartition(".")[2]
        if (mark := _MARKER.match(text, position)) and not _NOT_MARKER.search(prefix):
            ends.add(mark.end())
    if "nswer" in text or "NSWER" in text:
        ends.update(match.end() for match in _ANSWER_HEADING.finditer(text))
    if ("A:" in text and "\nB:" not in text) or "Ans" in text:
        ends.update(match.end() for match in _A_COLON.finditer(text))
    if not text.isascii() or any(hint in text for hint in _FOREIGN_HINTS):
        ends.update(match.end() for match in _FOREIGN_MARKER.finditer(text))
    return ends


def _unmarked(text: str) -> Answer | None:
    """Return the answer of a text without a marker: a short text itself, else the last value with its whole list."""
    text = text.strip()
    if not text:
        return None
    if (match := _BEFORE_EXPLANATION.match(text)) and is_formula(match[1]):
        text = match[1]
    if is_formula(text) and not has_run_of_lines(text):
        return Answer(text, marked=False) if len(text) <= MAX_LENGTH else None
    text = without_asides(text).strip()
    value = last_value(text)
    if value is not None:
        return Answer(value, marked=False)
    last_line = text.splitlines()[-1].strip() if text else ""
    if has_number(last_line):  # a negated number
        return Answer("", marked=False)
    return Answer(last_line, marked=False) if 0 < len(last_line) <= 200 else None
