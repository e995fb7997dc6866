"""Where the answer is in a completion. What counts is written down in docs/rewards.md. Stdlib only."""

# ruff: noqa: RUF001 - signs of other scripts are what it is about

import math
import re
import unicodedata
from functools import lru_cache
from typing import Any, NamedTuple

from .asides import HEADING, without_asides
from .exact import plain
from .notation import PERCENT
from .prose import MAX_LENGTH, has_number, has_run_of_lines, is_formula, last_value, statement
from .turn import said
from .units import MULTIPLIER

_TAIL = 4000  # characters from the end in which an answer without a box is looked for
_MARKERS = 8  # occurrences of "answer" that are looked at, from the end

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])(?:\s*\[[^\]{}]{0,40}\]){0,2}")
_MARK = re.compile(
    r"nswers?\b[\"']?(?:\s+(?:to|of|for)\b[^.\n:]{0,80}?)?\s*[*_`)}]*\s*(?:(?:is|are|was|be|=|:|为|是)\s*[*_`]*\s*:?|:)\s*[*_`]*\s*"
    r"(?:(?:therefore|thus|simply|just|exactly|equal to|given by|the option|option|choice)\s+)*",
    re.IGNORECASE,
)
_HEADED = re.compile(  # "Answer" as a heading, "Answer - 42", "[ANSWER] 42"
    r"(?:\A|\n)[#*_> \t\d.()]{0,20}(?:(?:the|my|final|correct)\s+)*answers?[*_\s]{0,9}?(?:[ \t]-[ \t]+|[*_# \t]{0,9}\n)"
    r"|\[\[?[#\s]*(?:final[ _])?answer[#\s]*\]\]?\s*:?",
    re.IGNORECASE,
)
_NO_MARK = re.compile(  # before "answer": a check of it, or another
    r"\b(?:(?:check|verif|confirm|test|pro[ov]|plug|substitut|validat|justif|explain|explan|estimat|reason|why|how)\w*\s+(?:\w+\s+){0,2}?"
    r"(?:(?:of|that|for|the|our|my|your|this|final|whether|if|with|back|into|in|using|by)\s+)*"
    r"|(?:wrong|incorrect|naive|initial|tempting|previous|intermediate|partial)\s+)(?:final\s+)?a\Z",
    re.IGNORECASE,
)
_OTHER_MARK = re.compile(
    r"(?:答案|答え|正解|정답|(?:réponse|respuesta|risposta|resposta)(?:\s+(?:corr\w+|final\w*|exacta))?|antwort|ответ|الجواب(?:\s+هو)?|उत्तर|(?:(?<![\w])|(?<=[故解]))[答답](?=[\]】*_\s]*[:\]】])"
    r"|(?:option|choice)\s+is|inal\s+result\b)[\]】*_\s]*(?:应?(?:是|为)|は|은|는|est|es|ist|è|é|lautet)?(?:\s+(?:la\s+opción|a\s+opção|l['’]opzione|l['’]option|die\s+Option))?\s*[\]】*_]*\s*:?[*_\s]*",
    re.IGNORECASE,
)
_FIRST = re.compile(
    r"(?:\A|[\n.!?:]\s*)(?:(?:so|thus|hence|therefore|and)\b,?\s*)?([^\n.;:!?]{1,60}?)\s+is\s+(?:the|our|my)\s+"
    r"(?:(?:final|correct)\s+)?answer\b(?!\s+(?:to|of|for)\s+(?:part|question|the\s+(?:first|previous)))"
)
_EXPLAINED = re.compile(
    r"([^\n]{1,60})\n[\s*_#]*(?:explanation|reasoning|justification|working|solution|steps)\b", re.IGNORECASE
)
_HINTS = ("espuest", "ntwort", "ispost", "espost", "ption is", "hoice is", "inal result", "inal Result")
_HAS_MARK = re.compile(r"####|nswer|NSWER|答|正解|답|</|<\\|")
_TYPESETS = re.compile(
    r"\\(?:boxed|fbox|framebox|text\w*|math\w*|mbox|left|right|displaystyle|q?quad|operatorname|[,;:! ()\[\]])"
    r"(?![a-zA-Z])"
)
_PUNCTUATION = " \t\r\n\v\f{}()[]$.,:;!?'\"`*_~#/|\\-"
_A = re.compile(r"(?:\A|\n)[ \t]*(?:A:|Ans\s*[:.=])\s*")
_BETWEEN = re.compile(
    r"(?:[\s,;.$&]|\\[()\[\],;:! ]|\\q?quad|\\text(?:bf|rm)?\s*\{[^{}]*\}|\band\b|\bor\b|[和与、或]|[A-Za-z]\w*\s*=)*\Z"
)

_BOUND = re.compile(r"\s*(?:or\s+(?:more|less|fewer)|at\s+(?:least|most))\b")
_OPERATED = re.compile(r"(?:(?:=|\$|\\\[|\\\(|\A)\s*)([-−]|\\(?:ln|log|sin|cos|tan|sqrt|exp))\s*\Z")


class Answer(NamedTuple):
    """The text of an answer; where it came from; the boxes that one list could be made of; a percent sign behind it.

    `around` is where a letter that is not in `text` may be named: behind the box, or in the whole completion.
    """

    text: str
    marked: bool = True
    boxes: tuple[str, ...] = ()
    percent: bool = False
    around: str = ""


def find_answer(completion: str) -> Answer | None:
    """The answer that a completion commits to: the last box, else what a marker announces, else the last value."""
    text = said(completion)
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"), text.rfind("\\framebox"))
    if last >= 0:
        boxed = _boxed(text, last)
        return _final(boxed.around if boxed else text[last:]) or boxed
    text = plain(text[-_TAIL:])
    found = _after_hashes(text) or _announced(text) or _said_first(text) or _unmarked(text)
    return found and found._replace(around=text)


def find_gold(gold: str) -> Answer:
    """The answer of a gold text: its boxes, where several stand together all of them; else what it marks, or itself."""
    last = max(gold.rfind("\\boxed"), gold.rfind("\\fbox"))
    if last >= 0:
        return _boxed(gold, last, gold=True) or Answer("")
    if len(gold) <= MAX_LENGTH and not _HAS_MARK.search(gold):
        return Answer(gold)
    text = plain(said(gold)[-_TAIL:])
    return _after_hashes(text) or _announced(text) or Answer(gold)


def is_empty(gold: Any) -> bool:
    """Whether a gold says nothing: None, nan, or no more than blanks, punctuation and commands that typeset nothing."""
    return gold is None or (isinstance(gold, float) and math.isnan(gold)) or _says_nothing(str(gold))


@lru_cache(4096)
def _says_nothing(gold: str) -> bool:
    left = _TYPESETS.sub("", plain(gold)) if len(gold) < 200 else gold
    return "\\{" not in left and all(map(_is_punctuation, left))  # \{\} is the empty set


def _is_punctuation(sign: str) -> bool:
    return sign in _PUNCTUATION if sign.isascii() else unicodedata.category(sign)[0] in "PZC"


def _final(text: str) -> Answer | None:
    """What "final answer is" announces behind the last box: a value, not words."""
    at = max(text.rfind("inal answer"), text.rfind("inal Answer"))
    if at < 0 or _NO_MARK.search(text[max(0, at - 80) : at + 6]):
        return None
    found = _announced(plain(text[at : at + MAX_LENGTH]))
    return found if found and re.match(r"[-+$\\(\[\d]", found.text) else None


def _boxed(text: str, at: int, gold: bool = False) -> Answer | None:
    """The box that begins at `at`, with those before it that are joined to it."""
    content, end = _content(text, at, gold)
    if content is None or not content.strip():
        return None
    boxes, start = [content], at
    while len(boxes) < 50:
        before = max(
            text.rfind("\\boxed", max(0, start - MAX_LENGTH), start),
            text.rfind("\\fbox", max(0, start - MAX_LENGTH), start),
        )
        if before < 0:
            break
        inner, closed = _content(text, before, False)
        if inner is None or closed > start or not _joined(text[closed:start], gold):
            break
        boxes.insert(0, inner)
        start = before
    if gold and len(set(boxes)) == 1:
        boxes = boxes[:1]
    boxes = [plain(box) for box in boxes]
    boxes[-1] = _with_what_clings(boxes[-1], text[max(0, at - 20) : at], text[end : end + 40])
    percent = re.match(rf"\s*\$?\s*(?:\\?%|(?:\\text\{{)?\s*{PERCENT}\b)", text[end : end + 30])
    return Answer(boxes[-1], True, tuple(boxes) if len(boxes) > 1 else (), percent is not None, text[end:])


def _with_what_clings(content: str, before: str, behind: str) -> str:
    r"""A number with what stands at its box and changes it: \boxed{7}^2, \boxed{7} million, = -\boxed{7}."""
    if not re.fullmatch(r"[\d.,]+", content):
        return content
    if raised := re.match(r"\s*\^\s*(?:\{[^{}]*\}|\\circ|\w)", behind):
        return content + raised[0]
    words = re.sub(r"\\text\w*\s*\{|\\[,;: ]|[$~]|\\[)\]]", " ", behind)
    if found := MULTIPLIER.match(words) or _BOUND.match(words):
        return rf"{content}\text{{ {found[0].strip()}}}"
    if found := _OPERATED.search(before):
        return f"{found[1]}({content})"
    return content


def _joined(between: str, gold: bool) -> bool:
    if len(between) > 70:
        return False
    if gold and (len(between) < 10 or re.search(r"\band\b|\bor\b|,|;", between)):
        return True
    return bool(_BETWEEN.match(between)) and (
        len(between) < 4 or re.search(r",|;|\band\b|\bor\b|quad", between) is not None
    )


def _content(text: str, at: int, lenient: bool) -> tuple[str | None, int]:
    """What a box holds, and where it ends; None where it is not closed, or longer than an answer may be."""
    match = _BOX.match(text, at)
    if match is None:
        return None, at
    start = match.end()
    while start < len(text) and text[start].isspace():
        start += 1
    if text[start : start + 1] != "{":
        word = re.match(r"[^\s$\\{}]{1,50}", text[start : start + 60])
        return (word[0], start + word.end()) if word else (None, start)
    depth = 0
    for place in range(start, min(len(text), start + MAX_LENGTH + 2)):
        sign = text[place]
        if sign in "{}" and text[place - 1] != "\\":
            depth += 1 if sign == "{" else -1
            if not depth:
                return text[start + 1 : place], place + 1
        elif sign in "{}" and text[place - 2 : place] == "\\\\" and sign == "}" and depth == 1:
            return text[start + 1 : place], place + 1
    trailing = text[start + 1 : start + MAX_LENGTH].strip()
    if trailing.endswith("\\}") and trailing.count("\\{") < trailing.count("\\}"):  # a backslash before the last brace
        return trailing[:-2], len(text)
    return (text[start + 1 : start + MAX_LENGTH], len(text)) if lenient else (None, at)


def _after_hashes(text: str) -> Answer | None:
    at = text.rfind("####")
    if at < 0:
        return None
    behind = text[at:].lstrip("#").strip()
    line, _, more = behind.partition("\n")
    if not line or HEADING.match(line) or len(line) > MAX_LENGTH or "nswer" in line:
        return None
    begins = re.match(r"[*_]*[-+−$\\(\[{.\d]", line)  # a number or formula; words are a heading, but in the last line
    return Answer(line.strip()) if begins or not more else None


def _announced(text: str) -> Answer | None:
    """What "answer is", "Answer:", a heading or "A:" announce, the last of them that announces a value."""
    for place in sorted(_marks(text), reverse=True):
        start = place + (text[place - 1 : place + 1] in ("=>", "->", "\n>"))
        if (found := statement(text[start : start + MAX_LENGTH])) is not None:
            return Answer(found)
    return None


def _said_first(text: str) -> Answer | None:
    """The value of the last "27 is the answer"."""
    for found in reversed(list(_FIRST.finditer(text)) if "answer" in text else []):
        if is_formula(found[1]) and has_number(found[1]):
            return Answer(found[1].strip())
    return None


def _marks(text: str) -> set[int]:
    """The ends of all that announces an answer."""
    at = len(text)
    places = set()
    for _ in range(_MARKERS):
        at = max(text.rfind("nswer", 0, at), text.rfind("NSWER", 0, at))
        if at < 0:
            break
        before = text[max(0, at - 80) : at].rpartition("\n")[2].rpartition(".")[2]
        if (mark := _MARK.match(text, at)) and not _NO_MARK.search(before):
            places.add(mark.end())
    if "nswer" in text or "NSWER" in text:
        places.update(found.end() for found in _HEADED.finditer(text))
    if ("A:" in text and "\nB:" not in text) or "Ans" in text:
        places.update(found.end() for found in _A.finditer(text))
    if not text.isascii() or any(hint in text for hint in _HINTS):
        places.update(found.end() for found in _OTHER_MARK.finditer(text))
    return places


def _unmarked(text: str) -> Answer | None:
    """A short text is its own answer; of a longer one the last value counts, with all that it is one list with."""
    text = text.strip()
    if not text:
        return None
    if (value := _EXPLAINED.match(text)) and is_formula(value[1]):
        text = value[1]
    if is_formula(text) and not has_run_of_lines(text):
        return Answer(text, marked=False) if len(text) <= MAX_LENGTH else None
    text = without_asides(text).strip()
    found = last_value(text)
    if found is not None:
        return Answer(found, marked=False)
    last = text.splitlines()[-1].strip() if text else ""
    if has_number(last):  # which is denied
        return Answer("", marked=False)
    return Answer(last, marked=False) if 0 < len(last) <= 200 else None
