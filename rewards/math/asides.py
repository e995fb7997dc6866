"""Checks, notes and headings, whose numbers are no answer, taken out of a text. Stdlib only."""

# ruff: noqa: RUF001 - signs of other scripts are what it is about

import re

_BEGIN = (
    r"(?:\A|\n|(?<=[.!?。)✓✅])(?:\s|(?<=。)))[ \t#*_>-]{0,12}(?:(?:(?:step|part)\s*)?\d{1,2}\s*[.:)]\s*)?[*_]{0,4}"
)
_SEARCH = (  # for the answer, and no check of it
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
    rf"|proof\b(?=\s*[:.*\n])|验证|验算|检验|検算|확인){_SEARCH}",
    re.IGNORECASE,
)
_GOES_ON = re.compile(  # behind a check: what is said next is no longer of it
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
_NUMBERED = re.compile(  # of a heading: ### 3. Result, **Step 2: Solve**, Step 4:
    r"^[ \t]*(?:#{1,6}[ \t]{0,9}[*_]{0,4}(?:\d{1,2}[.:)][ \t]*(?=[*_]{0,4}[^\W\d_])|\d{1,2}[ \t]+(?=[A-Z][a-z]))"
    r"|[*_]{1,4}\d{1,2}[.:)][ \t]*(?=[*_]{0,4}[^\W\d_])|[#*_ \t]{0,12}(?:step|part|section)\s+\d{1,2}[ \t]*[.:)]?)",
    re.IGNORECASE | re.MULTILINE,
)
HEADING = re.compile(r"[*_]*(?:\(?\d{1,2}[.:)]\s*[*_]*\s*[^\W\d_]|\d{1,2}(?:\.\d{1,2})*[ \t]+[A-Z][a-z])")


def without_asides(text: str) -> str:
    """`text` without checks, notes, and the numbers of headings; as it is where nothing but these has a number."""
    kept, at = [], 0
    for found in _CHECK.finditer(text):
        if found.start() >= at:
            kept.append(text[at : found.start()])
            at = _end_of_check(text, found.end())
    left = _NOTE.sub(_note, "".join(kept) + text[at:])
    return _NUMBERED.sub("", left if re.search(r"[\d$\\]", left) else text)


def _end_of_check(text: str, start: int) -> int:
    """The end of a check: of its paragraph, or of the paragraph below its heading, or where the argument resumes."""
    line = text.find("\n", start)
    is_heading = line >= 0 and not re.search(r"\w", _HEAD_WORDS.sub("", text[start:line]))
    paragraph = _BREAK.search(text, len(text) - len(text[line:].lstrip()) if is_heading else start)
    end = paragraph.start() if paragraph else len(text)
    for found in _GOES_ON.finditer(text, start, end):
        if not _CONFIRMS.search(found[0]):
            return found.start()
    return end


def _note(found: re.Match[str]) -> str:
    return found[0] if found["sentence"] and _RESULT.search(found["sentence"]) else "\n"
