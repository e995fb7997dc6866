"""Multiple choice: the letters that an answer commits to. Stdlib only."""

# ruff: noqa: RUF001 - signs of other scripts are what it is about

import re

from .answer import Answer
from .exact import plain
from .prose import MAX_LENGTH

_LETTER = "[A-Jアイウエオ]"
_NO_WORD = r"(?![A-Za-z\d_'’^])(?!(?<=[アイウエオ])(?!です|だ|と|か)\w)"
_ONE = rf"(?:[(\[]\s*{_LETTER}\s*[)\]]|{_LETTER}{_NO_WORD}(?:[.):](?!\w))?)"
_AND = r"(?:\s*(?:[,;、&/和与及と]|或者?|か|または|\b(?:and|or)\b))*\s*(?:(?i:options?|choices?)\s+)?"
_SOME = rf"(?:{_ONE}(?:{_AND}{_ONE}){{0,9}}|[A-H]{{2,8}}{_NO_WORD})"
_TYPESETTING = re.compile(
    r"\\(?:text\w*|math(?:rm|bf|it|sf|tt|bb)|mbox|boxed|fbox|framebox|operatorname|bf|rm|left|right|displaystyle|q?quad)(?![a-zA-Z])"
    r"|\\[ ,;:!()\[\]]|[{}$*`\"~「」『』]"
)
_BEFORE = re.compile(
    r"[^\w(\[\-−+=<>/^]*(?:(?:so|thus|hence|therefore|the|my|our|final|correct|right|best|only|is|be|it|that|options?|choices?|"
    r"answers?|statements?)\b|综上|因此|所以|故|应|正确|最终|答案|选项|选择|选|正解|答え|選択肢|是|为|は|答|[\s,:【】])*"
    r"(?=[(\[]|[A-Jアイウエオ])",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"\s*(?:(?:is|are)\s+(?:the\s+)?(?:only\s+)?(?:correct|right|true|best|answer)(?:\s+(?:answer|option|choice|one))?|选?项|正确|です|"
    r"だ|である|입니다|✓|✅|[.。!])+\s*\Z",
    re.IGNORECASE,
)
_WITH_TEXT = re.compile(
    rf"(?:[(\[]({_LETTER})[)\]]|({_LETTER})[.):、])(?=[\s\d\\])\s*(.+)|({_LETTER})\s+(?:\(([^()A-J]+)\)|\d.*|-\s+[A-Za-z]{{3}}.*)",
    re.DOTALL,
)
_AT_END = re.compile(rf"[^A-J=\\^_]{{1,60}}\s\(\s*({_LETTER})\s*\)")
_HEDGED = re.compile(  # in what stands behind a letter
    rf"\W*(?:(?i:or|and|but|(?:is|are)\s+(?:not|wrong|incorrect|false))\b|或|か)|[/&,]\s*{_LETTER}|.*(?:\b{_LETTER}[.):](?:\s|\Z)|[(\[]{_LETTER}[)\]])"
    rf"|.*\b(?i:maybe|perhaps|possibly|alternatively|could|might|not\s+sure|or\s+(?:option|choice))\b.*\b{_LETTER}\b"
    rf"|(?:{_LETTER}\b|\b(?i:and|or)\b|\W)*\Z",
    re.DOTALL,
)
_CHOSEN = re.compile(
    rf"""
      (?:\b(?i:answers?|options?|choices?|one)\W{{0,2}}\s*(?i:is|are|:|=|(?:must|should|would|will|has\s+to)\s+be)\W{{0,3}}
        (?:(?i:therefore|thus|clearly|indeed|either|option|choice|statement|letter)s?\W{{1,2}})*
      | \b(?i:choose|select|pick|chose|selected|going\s+with|go\s+with|is|to|with|matches|gives|i\.e\.,?|namely)\s+
        (?:(?i:the|answer)\s+)?(?:(?i:option|choice|answer|letter)s?\s+)
      | \b(?i:choose|select|pick|chose|go\s+with)\s+
      | \b(?i:therefore|thus|hence|so)[\s,]+(?={_SOME}\s*(?:[.!\n]|\Z))
      | (?:故选|应选|选择|选项|选|選択肢|答案|正解|答え|정답|正确的|正しいの)[是为选:はが은\s】]*
      )(?P<named>{_SOME})
    | (?P<praised>{_SOME})
      (?:\s+(?i:is|are)\s+(?i:the\s+)?(?i:only\s+)?(?i:correct|right|best|answer)\b|\s*(?:选?项)?(?:是)?正确)
    """,
    re.VERBOSE,
)
_DENIED = re.compile(
    r"(?:\b(?:not|nor|neither|never|if|whether|why|suppose|assume|unless)\b|n't|不|非)[^.\n]{0,20}\Z", re.IGNORECASE
)
_REJECTED = re.compile(r"\s*(?:是|为|の?は)?\s*(?:错|不对|不正确|不成立|不符|不选|誤り|間違)")
_ANOTHER = re.compile(
    rf"[\s.,;(]*(?:[/|]|(?i:or|maybe|perhaps|possibly|alternatively)\b|(?i:it|this)\s+(?i:could|might|may)\b|或|か)[^\n.]{{0,40}}?\b{_LETTER}\b"
)
_LABELLED = re.compile(
    r"(?:\(\d{1,2}\)\s*){2,}|(?i:statements?|conclusions?|propositions?|命题|结论)\s*\d{1,2}(?:[\s,]+(?:and\s+)?\d{1,2})*"
)
_OPTION = re.compile(  # \textbf{(C) } 42
    r"\s*(?:\\(?:text\w*|math(?:rm|bf)|mbox)\s*\{\s*\(?[A-J][).:]\s*\}\s*|(?:\([A-J]\)|[A-J][.)])(?=[\s~]|\\[ ,;:!]))"
    r"(?:[\s~]|\\[ ,;:!]|\\q?quad)*(.+)",
    re.DOTALL,
)
_OPTION_LINE = re.compile(rf"^\W*{_LETTER}(?:[.):]|\W*$)", re.MULTILINE)


def same_choice(gold: str, found: Answer) -> bool | None:
    """Whether both choose the same letters; None where the gold is no multiple choice, or the answer names none."""
    if (
        (labels := _labels(found.text))
        and labels == sorted(re.findall(r"\d+", gold))
        and re.fullmatch(r"[\d,\s]+", gold)
    ):
        return True
    wanted = letters(gold)
    if not wanted:
        return None
    chosen = _chosen(found)
    return None if chosen is None else chosen == wanted


def letters(text: str) -> str | None:
    """The letters that a text consists of, "C" or "ACD", words around and text behind aside.

    Empty where it hedges (B or C, B. C., two labelled options), None where it is no choice.
    """
    bare = _bare(text[:MAX_LENGTH]).strip()
    if re.fullmatch(r"\(?[a-j]\)", bare) or (re.fullmatch(r"[a-j]", bare) and re.search(r"\\(?:text|mathrm)", text)):
        return bare.strip("()").upper()
    start = _BEFORE.match(bare)
    bare = _AFTER.sub("", bare[start.end() :] if start else bare)
    if re.fullmatch(_SOME, bare):
        return _set(bare)
    if match := _WITH_TEXT.fullmatch(bare):
        return "" if _HEDGED.match(match[3] or match[5] or "-1") else match[1] or match[2] or match[4]
    if match := _AT_END.fullmatch(bare):
        return match[1]
    return "" if re.match(rf"{_ONE}[\s,.]*(?:\bor\b|[/|]|或|か|\({_LETTER}\b)", bare) else None


def option_text(text: str) -> str | None:
    """What stands behind the letter of an option: 42 of (C) 42; None without a letter, or with several."""
    match = _OPTION.fullmatch(text)
    return match[1] if match and letters(text) else None


def _bare(text: str) -> str:
    return re.sub(r"[ \t]+", " ", _TYPESETTING.sub(" ", plain(text)))


def _set(text: str) -> str | None:
    """Of "A, C and D", "ACD", "(A)(C)": each letter once; a run of letters in another order is a word."""
    found = re.findall(_LETTER, text)
    if re.fullmatch(r"[A-H]{2,8}", text):
        return text if list(text) == sorted(set(text)) else None
    if len(found) > 1 and (len(set(found)) < len(found) or re.search(r"\bor\b|[/或か:]|または|[.](?!\Z)", text)):
        return ""
    return "".join(sorted(found))


def _chosen(found: Answer) -> str | None:
    """The letters that an answer commits to: in its text, else in a phrase around it, else in the last line."""
    text = " and ".join(found.boxes) if found.boxes else found.text
    if (own := letters(text)) is not None:
        return own
    around = _bare(found.around[-2 * MAX_LENGTH :])
    for phrase in reversed(list(_CHOSEN.finditer(around))):
        before = around[max(0, phrase.start() - 30) : phrase.start()]
        if _ANOTHER.match(around, phrase.end()) or re.search(
            r"(?i:\bor|\bmaybe|\bperhaps|\bpossibly|或|か)\s*\Z", before
        ):
            return ""
        if not _DENIED.search(before) and not _REJECTED.match(around, phrase.end()):
            return letters(phrase["named"] or phrase["praised"])
    lines = around.strip().splitlines()
    if not lines or len(_OPTION_LINE.findall(around)) > 1:
        return None
    return letters(lines[-1])


def _labels(text: str) -> list[str]:
    """Of "(2)(3)" and "statements 2 and 3", these labels."""
    return sorted(re.findall(r"\d+", text)) if _LABELLED.fullmatch(_bare(text).strip()) else []
