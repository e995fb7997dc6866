"""Removes checks, notes and heading numbers, which are not answers, from a text. Stdlib only."""

# ruff: noqa: RUF001 - signs of other scripts are intended

import re

_BEGIN = (
    r"(?:\A|\n|(?<=[.!?。)✓✅])(?:\s|(?<=。)))[ \t#*_>-]{0,12}(?:(?:(?:step|part)\s*)?\d{1,2}\s*[.:)]\s*)?[*_]{0,4}"
)
_NOT_SEARCH = (  # excludes a search for the answer, such as "check each case"
    r"(?!\s+(?:each|every|all|both|which|whether|if|for|small|when|cases|some|n\b|possib\w+"
    r"|the\s+(?:options?|cases?|possib\w+|candidates?|values?|choices|first|next|other|small\w*)))"
)
_CHECK = re.compile(
    rf"{_BEGIN}(?:(?:now|finally|and|lastly|just|quick)\b,?\s*)?(?:"
    r"(?:double|sanity|quick|cross)?[- ]?(?:check(?:ing)?|verif(?:y|ication|ying))\b"
    r"|to\s+(?:double[- ]?)?(?:check|verify|confirm)\b"
    r"|(?:let(?:'s|’s|\s+us|\s+me)|(?:we|i|you)(?:\s+(?:can|will|could|now))|i'll|we'll)\s+(?:(?:also|now|quickly|then|just)\s+)*"
    r"(?:double[- ]?|cross[- ]?)?(?:check|verify|confirm)\b"
    r"|as\s+a\s+(?:\w+\s+)?check\b|this\s+is\s+(?:right|correct)\s+(?:because|since|as)\b"
    rf"|proof\b(?=\s*[:.*\n])|验证|验算|检验|検算|확인){_NOT_SEARCH}",
    re.IGNORECASE,
)
_RESUMES = re.compile(  # after a check: the argument resumes
    r"(?:(?<=[.!?。✓)])\s+|\n)[ \t#*_>-]{0,12}(?:so|therefore|thus|hence|wait|no|now|next|then|finally|adding|"
    r"but|however|actually|"
    r"the\s+(?:final\s+)?(?:answer|total|result)|in\s+total|final|所以|因此|よって|したがって|그러므로)(?![a-z])[^\n.]*",
    re.IGNORECASE,
)
_CONFIRMS = re.compile(
    r"\b(?:works?|match(?:es)?|correct|holds?|required|expected|verif|confirm|consistent|checks?|agrees?|true|right)|✓|✅|正确|成立",
    re.IGNORECASE,
)
_NOTE = re.compile(
    rf"{_BEGIN}(?:(?P<line>(?:note|notice|remark|n\.?b\.?|p\.?\s?s\.?)\s*[*_]*(?::|(?<=[sb]\.))|(?:i\s+)?hope\b"
    r"|let me know|feel free|if you (?:have|need|want|would|'d)|thanks?\b|thank you)[^\n]*"
    r"|(?:note|notice)\s+that\b(?P<sentence>[^\n]*?(?:[.!?](?=\s|\Z)|\n|\Z)))",
    re.IGNORECASE,
)
_RESULT = re.compile(r"=|\b(?:so|hence|thus|therefore|total|gives?|answer)\b", re.IGNORECASE)
_HEAD_WORDS = re.compile(r"(?:of\s+)?(?:the|our|my|answer|solution|result)\b")
_BREAK = re.compile(r"\n\s*\n")
_NUMBERED = re.compile(  # number of a heading: ### 3. Result, **Step 2: Solve**, Step 4:
    r"^[ \t]*(?:#{1,6}[ \t]{0,9}[*_]{0,4}(?:\d{1,2}[.:)][ \t]*(?=[*_]{0,4}[^\W\d_])|\d{1,2}[ \t]+(?=[A-Z][a-z]))"
    r"|[*_]{1,4}\d{1,2}[.:)][ \t]*(?=[*_]{0,4}[^\W\d_])|[#*_ \t]{0,12}(?:step|part|section)\s+\d{1,2}[ \t]*[.:)]?)",
    re.IGNORECASE | re.MULTILINE,
)
HEADING = re.compile(r"[*_]*(?:\(?\d{1,2}[.:)]\s*[*_]*\s*[^\W\d_]|\d{1,2}(?:\.\d{1,2})*[ \t]+[A-Z][a-z])")


def without_asides(text: str) -> str:
    """Remove checks, notes and heading numbers. Checks and notes stay if there are no other numbers."""
    parts, position = [], 0
    for check in _CHECK.finditer(text):
        if check.start() >= position:
            parts.append(text[position : check.start()])
            position = _end_of_check(text, check.end())
    remaining = _NOTE.sub(_note_replacement, "".join(parts) + text[position:])
    return _NUMBERED.sub("", remaining if re.search(r"[\d$\\]", remaining) else text)


def _end_of_check(text: str, start: int) -> int:
    """End of a check: of its paragraph or of the paragraph below its heading, unless the argument resumes earlier."""
    line = text.find("\n", start)
    is_heading = line >= 0 and not re.search(r"\w", _HEAD_WORDS.sub("", text[start:line]))
    paragraph = _BREAK.search(text, len(text) - len(text[line:].lstrip()) if is_heading else start)
    end = paragraph.start() if paragraph else len(text)
    for match in _RESUMES.finditer(text, start, end):
        if not _CONFIRMS.search(match[0]):
            return match.start()
    return end


def _note_replacement(note: re.Match[str]) -> str:
    return note[0] if note["sentence"] and _RESULT.search(note["sentence"]) else "\n"
