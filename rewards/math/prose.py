"""The value that a text without a box commits to: the value after a marker, or the last value. Stdlib only."""

# ruff: noqa: RUF001 - signs of other scripts are intended

import re

from .east_asian import SIGN
from .notation import FUNCTIONS, PERCENT
from .units import CHANGE, MULTIPLIER, is_unit

MAX_LENGTH = 2000  # characters of an answer, and of a statement that contains one

MATH = re.compile(r"\$\$(.+?)\$\$|\$((?:[^$\\]|\\.)+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_VALUE = (
    r"[-+−]?\s?(?:\\?[$€£¥])?\s?(?<![\d.])(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:[.,]\d+)?|\.\d+)"
    rf"(?:[eE][-+]?\d+)?(?:\s?/\s?\d+|\s\d+/\d+)?(?:\s?\\?%|\s{PERCENT}\b)?"
)
_NUMBER = re.compile(rf"(?:(?<![\w\\.^{{])|(?<=[{SIGN}]))(?!0[xXbBoO][0-9a-fA-F]){_VALUE}")
_MAYBE = r"(?:(?:maybe|possibly|perhaps|even|else|alternatively|(?:it\s+)?(?:could|may|might)\s+(?:also\s+)?be)\s+)"
_JOINT = rf"(?:\*\*)?\s*(?:,|;|&|/|\||-|–|\bor\b|\band\b|\bto\b|\s)\s*(?:or\b|and\b)?\s*{_MAYBE}?(?:\*\*)?"
_NEGATION = re.compile(  # text before a number that is not the answer, or only a part of it
    r"(?:\b(?:not|never|neither|nor|except|but|without|(?:less|more|fewer|greater|larger|smaller|higher|lower|other)\s+than"
    r"|at\s+(?:least|most)|up\s+to|below|beyond|minus|negative|half(?:\s+of)?|twice|thrice|double|triple|root\s+of"
    r"|page|step|question|problem|exercise|equation|eq|section|chapter|figure|fig|table|line|case|part|theorem|lemma"
    r"|return|lambda[^:]{0,9}:|echo)|n't|\b(?:wrong|incorrect)\b[^.\n]{0,20}|[^\W\d]{2,}\s*\(\s*[\"']?"
    r"|(?:不是|不等于|不为|并非|至少|至多|最多|最少|超过|不到|少于|多于|大于|小于|第|以外|根号|ルート|√|最大で|最低|少なくとも|ではなく))\s*\.?\s*"
    r"(?:be\s+|equal\s+(?:to\s+)?|simply\s+|just\s+|exactly\s+)?(?:有|为|是)?[$(\\\s]*\Z",
    re.IGNORECASE,
)
_CHANGING_SUFFIX = re.compile(  # text after a number that makes it a bound or a different number
    r"\s*[^\W\d_]{0,2}?(?:以上|以下|以内|以外|未満|未满|ではな|じゃな|不是|不对|多(?!少))|\s*(?:[余几割折成半]|的?倍数|分之)"
    r"|\s*(?:平方|立方)(?![厘米分千公毫cmk])|\s*の\d乗|\s*点\d|\s*(?:[a-z]+\s+)?\bor\s+"
    rf"(?:more|less|fewer|greater|above|below|over|under|higher|lower|larger|smaller)\b"
    rf"|\s*,?\s*(?:[a-z]+\s+)?(?:if|unless|provided|at\s+(?:least|most))\b|{CHANGE.pattern}",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(  # 7 apples or 8 apples; 7, maybe 8
    r"\s*(?P<unit>[^\W\d_]+(?:\s+(?!or\b)[^\W\d_]+){0,2}?)??\s*[,(?]*\s*"
    rf"(?:(?:\bor\b(?!,)|或者?|または|か|也?可能是?|也许是?|\?)\s*{_MAYBE}*|{_MAYBE}+)\W{{0,2}}{_VALUE}\s*(?P<other>[^\W\d_]+)?",
    re.IGNORECASE,
)
_REASONED = re.compile(  # Tuesday, since 7 = 4 + 3
    r"([A-Za-z][A-Za-z' -]{0,60}?)(?:,?\s+(?:because|since)|,\s+as)\b"
)
_MATH_JOINT = re.compile(rf"\s*(?:,|or|and|;)*\s*(?:or|and)?\s*{_MAYBE}?")
_REASON = re.compile(r",?\s+(?:as|which|so|where|because|since|with|for)\b")
_EQUATION_FOLLOWS = r"(?:(?!\b(?:because|since|as|for|so|where)\b)[^=,;:])*="  # 16 ducks * 2 eggs = 32 eggs
_CONTINUED = re.compile(
    rf"{_JOINT}[$\d\\(-]|\s*[*+^/=<>≤≥\\(){{\]}}|!&πi√]|\s*:\s*\d|\s*[-−]?\s*[a-zA-Z]\b|[-−][a-zA-Z]|{_EQUATION_FOLLOWS}"
)
_IN_TEXT = re.compile(r"\A\s*\\(?:text\w*|mbox|mathrm)\s*\{")
_COMPARED = re.compile(r"\s*(?:(?:more|less|fewer|greater|smaller|larger|higher|lower)\s+than|choose)\b")
_CONTRAST = re.compile(  # "14, not 12", "14 rather than 12": the second value is not the answer
    rf"(?:[,;(]\s*(?:and\s+|but\s+)?not|\brather\s+than|\binstead\s+of)\s+{_VALUE}(?![\w/])\)?"
    rf"|,\s+who\s+[a-z]+\s+(?:only\s+)?{_VALUE}"  # 2 more than Ann, who has 24
    rf"|,\s+(?:which\s+is|i\.e\.,?|that\s+is,?)\s+{_VALUE}\s+(?:[a-z]+\s+){{0,2}}?(?:more|less|fewer|greater|older|younger|"
    r"higher|lower|taller|longer|shorter|larger|smaller)\b[^.\n]*"  # 16 apples, which is 4 more than Tom
    rf"|[，,]\s*比[^，,。]*?{_VALUE}[^，,。]*"
    r"|(?:[,，(（]\s*|\s+)(?:attained|achieved|reached|obtained|occurring)\s+(?:when|at|for|if)\b[^\n.)）]*[)）]?"
    r"|[,，(（]\s*(?:when|at|for)\s+[a-z]\s*=[^\n.)）]*[)）]?"
    r"|[,，(（]\s*(?:此时|这时|当)[^。.\n)）]*[)）]?|[(（][^()（）\n]*のとき[)）]"  # the place of a maximum
    rf"|(?<=\d)(?:\s+[a-z]+)?\s+of\s+(?:the|these|those|his|her|their|its)\s+{_VALUE}",  # 8 of the 24
    re.IGNORECASE,
)
_REMARK = re.compile(  # in parentheses after the answer
    r"[ ]?[(\[](?:\d+\s+(?:marks?|points?|pts)|check|verif|note|since|because|as|which|where|and\s+not|not|confirm)\b"
    r"[^()\[\]]*[)\]]",
    re.IGNORECASE,
)
_RELATION = re.compile(r"[A-Za-z]\s*(?:<=|>=|\\[lg]eq?(?:slant)?|\\[lg]t|\\neq?|!=|<|>|≤|≥)\s*" + _VALUE)
_FORMULA_WORDS = frozenset(
    ["and", "pct", "percent", "percentage", "infinity", "inf", "union", "nan", "NaN", "array", "Matrix"]
)
_POINT = re.compile(rf"\b(?:is|are|at|point|pair|be|=)\s*(\(\s*{_VALUE}(?:\s*,\s*{_VALUE})+\s*\))", re.IGNORECASE)
_RUN_OF_LINES = re.compile(r"\d\s*\n\s*[-+\d]")
_SENTENCE = re.compile(rf"[.!?](?=\s|\Z|[{SIGN}])(?!\s*\d)|[。【]|\n|\[/[A-Za-z]|\[\[ ?#")
_HEDGE = re.compile(  # in the next sentence, or another letter
    r"[.!?\s]*(?:(?i:or|and|maybe|perhaps|possibly|alternatively)\b[\s,]*"
    r"(?i:maybe|possibly|perhaps|else|even|option)?\W{0,3}(?:\d|[A-J]\b)"
    r"|(?i:it|this)\s+(?i:could|might|may)\s+(?i:also\s+)?(?i:be)\s+(?i:option\s+)?\W{0,3}(?:\d|[A-J]\b)"
    r"|\(?[A-J]\)?[.):]*\s*(?:\n|\Z))|[.!?]?[ \t]*\n[ \t]*\$?-?\d+(?:\.\d+)?[ \t]*(?:\n|\Z)"
)
_ARROW = re.compile(r"\A[\s*_]*(?:[-=]+>|→)")
_JUDGED = re.compile(  # "the answer is correct since 12/3 = 4" gives no answer
    r"(?:indeed\s+|also\s+)?(?:correct|right|wrong|incorrect|verified|confirmed|consistent|reasonable|valid|unique|plausible|sensible|accurate|sound|fine|okay|good)\b\W*\w",
    re.IGNORECASE,
)


def statement(text: str) -> str | None:
    """Return the value after a marker: a short statement itself, else the value at its start or end, else None."""
    text = _REMARK.sub("", _ARROW.sub("", text).lstrip("*_ \t\n\"'`}「"))
    if re.match(r"not\b|n't|不|并非", text) or _JUDGED.match(text):
        return None
    if text.startswith(("$$", "\\[")):
        math = MATH.match(text)
        return (math[1] or math[3]).strip() if math else None
    ends = (
        end for end in _SENTENCE.finditer(text) if text.count("{", 0, end.start()) <= text.count("}", 0, end.start())
    )
    end = next(ends, None)  # no end is inside braces
    if end and (hedge := _HEDGE.match(text, end.start())):
        return text[: hedge.end()].strip()
    sentence = (text[: end.start()] if end else text).strip(" \t*_`\"'」")
    sentence = re.sub(r"(?<=\d)\*\*(?=[\s.,]|\Z)", "", sentence)
    if sentence.count("}") > sentence.count("{"):  # of JSON
        sentence = sentence.rstrip("}").rstrip(" \"'")
    return _value(sentence) if sentence else None


def _value(sentence: str) -> str | None:
    if match := _REASONED.match(sentence):
        return match[1]
    head = _NUMBER.match(sentence)
    rest = _IN_TEXT.sub(" ", sentence[head.end() :]) if head else ""
    if head and (not rest.strip() or re.match(r"\s+[a-z]+(?:\s[a-z]+)?\Z", rest)):
        return sentence
    math = MATH.match(sentence)
    if math and not re.match(_JOINT + r"[$\d\\]", sentence[math.end() :]):
        suffix = sentence[math.end() :].strip()
        return math[0] + (" " + suffix if re.match(rf"\\?%|{PERCENT}", suffix) else "")
    if head and (_is_doubtful(rest) or _COMPARED.match(rest)):
        return sentence if sentence.isascii() else ""
    if math:
        return sentence
    if head and not _CONTINUED.match(rest) and not ((word := re.match("[A-Za-z]{1,3}", rest)) and not is_unit(word[0])):
        return head[0] + _multiplier_text(rest)
    if re.match(r"[-+(\[{\\]", sentence):
        return sentence
    reason = _REASON.search(sentence)
    if reason and is_formula(sentence[: reason.start()]):
        return sentence[: reason.start()]
    if is_formula(sentence) or not re.search(r"[\d$\\]", sentence):
        return sentence if len(sentence) <= 200 else None
    return last_value(sentence) or (sentence if len(sentence) <= 200 else None)


def _is_doubtful(rest: str) -> bool:
    """Return whether text after a number makes it a bound or offers an alternative: 7 or more, 7 apples or 8 apples."""
    return bool(_CHANGING_SUFFIX.match(rest)) or _offers_alternative(rest)


def _offers_alternative(rest: str) -> bool:
    alternative = _ALTERNATIVE.match(rest)  # 90 minutes or 1.5 hours is one amount
    if alternative is None:
        return False
    units = [unit and unit.rstrip("s") for unit in (alternative["unit"], alternative["other"])]
    return None in units or units[0] == units[1]


def _multiplier_text(rest: str) -> str:
    match = MULTIPLIER.match(rest)
    return rf"\text{{{match[0]}}}" if match else ""


def is_formula(text: str) -> bool:
    """Return whether all words of a text are function names, units, or words that join a list."""
    bare = re.sub(
        r"\\(?:text\w*|mbox|mathrm|begin|end|operatorname)\s*\{[^{}]*\}|\\[a-zA-Z]+|(?<=[\d)])(?:and|or)(?=[A-Z(])",
        " ",
        text,
    )
    return all(
        word in _FORMULA_WORDS or word in FUNCTIONS or is_unit(word)
        for word in re.findall(rf"[^\W\d_]{{3,}}|\bis\b|[{SIGN}]", bare)
    )


def has_run_of_lines(text: str) -> bool:
    """Return whether a text has one number per line, so it is not a single formula."""
    return _RUN_OF_LINES.search(text) is not None


def has_number(text: str) -> bool:
    return _NUMBER.search(text) is not None


def last_value(text: str) -> str | None:
    """Return the last formula or number of a text, with the rest of its list; None if it is negated."""
    text = _REMARK.sub("", _CONTRAST.sub("", text))
    formulas = list(MATH.finditer(text))
    end = formulas[-1].end() if formulas else 0
    numbers = list(_NUMBER.finditer(text, end))
    points = list(_POINT.finditer(text, end))
    if points and numbers and numbers[-1].end() <= points[-1].end():
        return points[-1][1]
    relations = list(_RELATION.finditer(text, end))
    if relations:
        return relations[-1][0]
    if numbers:
        return _last_number(text, numbers)
    if not formulas:
        return None
    start = formulas[-1].start()
    for previous in reversed(formulas[:-1]):
        if not _MATH_JOINT.fullmatch(text, previous.end(), start):
            break
        start = previous.start()
    percent = re.match(rf"\s*(?:\\?%|{PERCENT}\b)", text[end:])
    if _NEGATION.search(text[:start][-30:]):
        return None
    return text[start:end] + (percent[0] if percent else "")


def _last_number(text: str, numbers: list[re.Match[str]]) -> str | None:
    last = numbers[-1]
    start = last.start()
    for previous in reversed(numbers[:-1]):
        if not (
            re.fullmatch(_JOINT, text[previous.end() : start])
            or _offers_alternative(text[previous.end() : last.end() + 20])
        ):
            break
        start = previous.start()
    suffix = _IN_TEXT.sub(" ", text[last.end() :].lstrip(")]}$"))
    if _NEGATION.search(text[:start][-30:]) or _CHANGING_SUFFIX.match(suffix):
        return None
    return re.sub(r"\s*\n\s*", ", ", text[start : last.end()].replace("**", "") + _multiplier_text(suffix))
