"""Where the answer is in a completion. What counts is written down in docs/rewards.md. Stdlib only."""

# ruff: noqa: RUF001 - signs of other scripts are what it is about

import re
from typing import NamedTuple

from .exact import plain
from .notation import FUNCTIONS
from .units import CHANGE, MULTIPLIER, is_unit

MAX_LENGTH = 2000  # characters of an answer, and of a statement that holds one
_TAIL = 4000  # characters from the end in which an answer without a box is looked for
_MARKERS = 8  # occurrences of "answer" that are looked at, from the end

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])")
_THINK = re.compile(r"<(think|thinking|thought)>")
_END = re.compile(r"<\|(?:im_end|eot_id|endoftext|end|end_of_text|im_start|eom_id)\|>|</s>|<｜end▁of▁sentence｜>")
_LEADING = re.compile(rf"\A(?:\s|{_END.pattern})*")
_MARK = re.compile(
    r"nswers?\b(?:\s+(?:to|of|for)\b[^.\n:]{0,80}?)?\s*[*_`)}]*\s*(?:(?:is|are|was|be|=|:|为|是)\s*[*_`]*\s*:?|:)\s*[*_`]*\s*"
    r"(?:(?:therefore|thus|simply|just|exactly|equal to|given by|the option|option|choice)\s+)*",
    re.IGNORECASE,
)
_OTHER_MARK = re.compile(
    r"(?:答案(?:是|为)?|réponse|respuesta|antwort|ответ|الجواب|答え(?:は)?|(?:option|choice)\s+is)\s*(?:est|es|ist)?\s*[:：]?\s*",
    re.IGNORECASE,
)
_A = re.compile(r"(?:\A|\n)\s*A:\s*")
_MATH = re.compile(r"\$\$(.+?)\$\$|\$((?:[^$\\]|\\.)+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_VALUE = (
    r"[-+−]?\s?(?:\\?[$€£])?\s?(?<![\d.])(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:[.,]\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d+)?(?:\s?/\s?\d+|\s\d+/\d+)?(?:\s?\\?%|\s(?:percent|pct)\b)?"
)
_NUMBER = re.compile(rf"(?<![\w\\.^{{])(?!0[xXbBoO][0-9a-fA-F]){_VALUE}")
_JOIN = r"\s*(?:,|;|/|\||-|–|\bor\b|\band\b|\bto\b|\s)\s*(?:or\b|and\b)?\s*"
_NOT = re.compile(  # before a number that is not the answer, or not all of it
    r"(?:\b(?:not|never|neither|nor|except|but|without|(?:less|more|fewer|greater|larger|smaller|higher|lower|other)\s+than"
    r"|at\s+(?:least|most)|up\s+to|below|beyond|minus|negative|half(?:\s+of)?|twice|thrice|double|triple|root\s+of"
    r"|page|step|question|problem|exercise|equation|eq|section|chapter|figure|fig|table|line|case|part|theorem|lemma"
    r"|return|lambda[^:]{0,9}:|echo)|n't|[^\W\d]{2,}\s*\(\s*[\"']?)\s*\.?\s*"
    r"(?:be\s+|equal\s+(?:to\s+)?|simply\s+|just\s+|exactly\s+)?[$(\\\s]*\Z",
    re.IGNORECASE,
)
_GOES_ON = r"(?:(?!\b(?:because|since|as|for|so|where)\b)[^=,;:])*="  # 16 ducks * 2 eggs = 32 eggs
_CONTRAST = re.compile(  # "14, not 12", "14 rather than 12": what it is not says nothing of what it is
    rf"(?:[,;(]\s*(?:and\s+|but\s+)?not|\brather\s+than|\binstead\s+of)\s+{_VALUE}(?![\w/])\)?", re.IGNORECASE
)
_KNOWN = frozenset(["and", "pct", "percent", "percentage", "infinity", "inf", "union", "nan", "NaN", "array", "Matrix"])
_RUN_OF_LINES = re.compile(r"\d\s*\n\s*[-+\d]")
_SENTENCE = re.compile(r"[.!?。](?=\s|\Z)(?!\s*\d)|\n")
_BETWEEN = re.compile(
    r"(?:[\s,;.$&]|\\[()\[\],;:! ]|\\q?quad|\\text(?:bf|rm)?\s*\{[^{}]*\}|\band\b|\bor\b|[A-Za-z]\w*\s*=)*\Z"
)


class Answer(NamedTuple):
    """The text of an answer; where it came from; the boxes that one list could be made of; a percent sign behind it."""

    text: str
    marked: bool = True
    boxes: tuple[str, ...] = ()
    percent: bool = False


def find_answer(completion: str) -> Answer | None:
    """The answer that a completion commits to: the last box, else what a marker announces, else the last value."""
    text = _spoken(completion)
    last = max(text.rfind("\\boxed"), text.rfind("\\fbox"), text.rfind("\\framebox"))
    if last >= 0:
        return _final(text[last:]) or _boxed(text, last)
    text = plain(text[-_TAIL:])
    return _after_hashes(text) or _announced(text) or _unmarked(text)


def find_gold(gold: str) -> Answer:
    """The answer of a gold text: its boxes, where several stand together all of them; else what is there."""
    last = max(gold.rfind("\\boxed"), gold.rfind("\\fbox"))
    if last >= 0:
        return _boxed(gold, last, gold=True) or Answer(gold)
    if len(gold) > 60 or "####" in gold:
        return find_answer(gold) or Answer(gold)
    return Answer(gold)


def _spoken(completion: str) -> str:
    """What stands after the thinking, up to the end of the turn; of <answer> blocks the last."""
    for tag in ("think", "thinking", "thought"):
        completion = completion.rpartition(f"</{tag}>")[2]
    if "<" in completion:
        if opened := _THINK.search(completion):
            completion = completion[: opened.start()]
        completion = _LEADING.sub("", completion, count=1)
        if end := _END.search(completion):
            completion = completion[: end.start()]
        start = completion.rfind("<answer>")
        if start >= 0:
            inner = completion[start + len("<answer>") :].partition("</answer>")[0]
            return inner if "answer" in inner.lower() or len(inner) > 300 or "\\boxed" in inner else f"answer: {inner}"
    return completion


def _final(text: str) -> Answer | None:
    """What "final answer is" announces behind the last box: a value, not words."""
    at = max(text.rfind("inal answer"), text.rfind("inal Answer"))
    found = _announced(plain(text[at : at + MAX_LENGTH])) if at >= 0 else None
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
    percent = re.match(r"\s*\$?\s*(?:\\?%|(?:\\text\{)?\s*(?:percent|pct)\b)", text[end : end + 30])
    return Answer(content, True, tuple(boxes) if len(boxes) > 1 else (), percent is not None)


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
    line = text[at:].lstrip("#").strip().partition("\n")[0].strip()
    return Answer(line) if re.match(r"[-+−$\\(\[{.\d*]", line) and len(line) <= MAX_LENGTH else None


def _announced(text: str) -> Answer | None:
    """What "answer is", "Answer:" or "A:" announce, the last of them that announces a value."""
    at = len(text)
    places = []
    for _ in range(_MARKERS):
        at = max(text.rfind("nswer", 0, at), text.rfind("NSWER", 0, at))
        if at < 0:
            break
        if mark := _MARK.match(text, at):
            places.append(mark.end())
    last_a = max((found.end() for found in _A.finditer(text)), default=-1)
    if last_a >= 0:
        places.append(last_a)
    if not text.isascii() or re.search("espuesta|ntwort|(?:option|choice) is", text):
        places += [found.end() for found in _OTHER_MARK.finditer(text)]
    for place in sorted(places, reverse=True):
        if (found := _statement(text[place : place + MAX_LENGTH])) is not None:
            return Answer(found)
    return None


def _statement(text: str) -> str | None:
    """The value in what follows a marker: the whole of a short statement, or the value that it begins or ends with."""
    text = text.lstrip("*_ \t\n")
    if re.match(r"not\b|n't", text):
        return None
    if text.startswith(("$$", "\\[")):
        math = _MATH.match(text)
        return (math[1] or math[3]).strip() if math else None
    end = _SENTENCE.search(text)
    sentence = (text[: end.start()] if end else text).strip(" \t*_`\"'")
    if not sentence:
        return None
    head = _NUMBER.match(sentence)
    if head and (not sentence[head.end() :].strip() or re.match(r"\s+[a-z]+(?:\s[a-z]+)?\Z", sentence[head.end() :])):
        return sentence
    math = _MATH.match(sentence)
    if math and not re.match(_JOIN + r"[$\d\\]", sentence[math.end() :]):
        rest = sentence[math.end() :].strip()
        return math[0] + (" " + rest if re.match(r"\\?%|percent|pct", rest) else "")
    if math or re.match(r"[-+(\[{\\]", sentence):
        return sentence
    if head and not re.match(_JOIN + r"[$\d\\(-]|\s*[*+^/=]|\s*[a-zA-Z]\b|" + _GOES_ON, sentence[head.end() :]):
        return head[0]
    if _is_formula(sentence) or not re.search(r"[\d$\\]", sentence):
        return sentence if len(sentence) <= 200 else None
    found = _last_value(sentence)
    return found or (sentence if len(sentence) <= 200 else None)


def _unmarked(text: str) -> Answer | None:
    """A short text is its own answer; of a longer one the last value counts, with all that it is one list with."""
    text = text.strip()
    if not text:
        return None
    if _is_formula(text) and not _RUN_OF_LINES.search(text):
        return Answer(text, marked=False) if len(text) <= MAX_LENGTH else None
    found = _last_value(text)
    if found is not None:
        return Answer(found, marked=False)
    last = text.splitlines()[-1].strip()
    return Answer(last, marked=False) if len(last) <= 200 else None


def _is_formula(text: str) -> bool:
    """Whether all its words are names of functions, units, or join a list."""
    bare = re.sub(
        r"\\(?:text\w*|mbox|mathrm|begin|end|operatorname)\s*\{[^{}]*\}|\\[a-zA-Z]+|(?<=[\d)])(?:and|or)(?=[A-Z(])",
        " ",
        text,
    )
    return all(
        word in _KNOWN or word in FUNCTIONS or is_unit(word) for word in re.findall(r"[^\W\d_]{3,}|\bis\b", bare)
    )


def _last_value(text: str) -> str | None:
    """The last formula or number of a text, as a list with what is joined to it; None where it is denied."""
    text = _CONTRAST.sub("", text)
    maths = list(_MATH.finditer(text))
    covered = maths[-1].end() if maths else 0
    numbers = list(_NUMBER.finditer(text, covered))
    relation = re.compile(r"[A-Za-z]\s*(?:<=|>=|\\[lg]eq?(?:slant)?|\\[lg]t|\\neq?|!=|<|>|≤|≥)\s*" + _VALUE)
    related = list(relation.finditer(text, covered))
    if related:
        return related[-1][0]
    if numbers:
        last = numbers[-1]
        start = last.start()
        for before in reversed(numbers[:-1]):
            if not re.fullmatch(_JOIN, text[before.end() : start]):
                break
            start = before.start()
        if _NOT.search(text[:start][-30:]) or CHANGE.match(text, last.end()):
            return None
        times = MULTIPLIER.match(text, last.end())
        found = text[start : last.end()] + (rf"\text{{{times[0]}}}" if times else "")
        return re.sub(r"\s*\n\s*", ", ", found)
    if not maths:
        return None
    start = maths[-1].start()
    for before in reversed(maths[:-1]):
        if not re.fullmatch(r"\s*(?:,|or|and|;)*\s*(?:or|and)?\s*", text[before.end() : start]):
            break
        start = before.start()
    percent = re.match(r"\s*(?:\\?%|percent\b|pct\b)", text[covered:])
    if _NOT.search(text[:start][-30:]):
        return None
    return text[start:covered] + (percent[0] if percent else "")
