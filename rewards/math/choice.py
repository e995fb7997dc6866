"""Multiple choice: the letters that an answer commits to. Stdlib only."""

# ruff: noqa: RUF001 - signs of other scripts are intended

import re

from .answer import Answer
from .exact import plain
from .prose import MAX_LENGTH

_LETTER = "[A-Jアイウエオ]"
_NO_WORD_FOLLOWS = r"(?![A-Za-z\d_'’^])(?!(?<=[アイウエオ])(?!です|だ|と|か)\w)"
_CHOICE = rf"(?:[(\[]\s*{_LETTER}\s*[)\]]|{_LETTER}{_NO_WORD_FOLLOWS}(?:[.):](?!\w))?)"
_JOINT = r"(?:\s*(?:[,;、&/和与及と]|或者?|か|または|\b(?:and|or)\b))*\s*(?:(?i:options?|choices?)\s+)?"
_CHOICES = rf"(?:{_CHOICE}(?:{_JOINT}{_CHOICE}){{0,9}}|[A-H]{{2,8}}{_NO_WORD_FOLLOWS})"
_TYPESETTING = re.compile(
    r"\\(?:text\w*|math(?:rm|bf|it|sf|tt|bb)|mbox|boxed|fbox|framebox|operatorname|bf|rm|left|right|displaystyle|q?quad)(?![a-zA-Z])"
    r"|\\[ ,;:!()\[\]]|[{}$*`\"~「」『』]"
)
_LEADING_WORDS = re.compile(
    r"[^\w(\[\-−+=<>/^]*(?:(?:so|thus|hence|therefore|the|my|our|final|correct|right|best|only|is|be|it|that|options?|choices?|"
    r"answers?|statements?)\b|综上|因此|所以|故|应|正确|最终|答案|选项|选择|选|正解|答え|選択肢|是|为|は|答|[\s,:【】])*"
    r"(?=[(\[]|[A-Jアイウエオ])",
    re.IGNORECASE,
)
_TRAILING_WORDS = re.compile(
    r"\s*(?:(?:is|are)\s+(?:the\s+)?(?:only\s+)?(?:correct|right|true|best|answer)(?:\s+(?:answer|option|choice|one))?|选?项|正确|です|"
    r"だ|である|입니다|✓|✅|[.。!])+\s*\Z",
    re.IGNORECASE,
)
_WITH_TEXT = re.compile(
    rf"(?:[(\[]({_LETTER})[)\]]|({_LETTER})[.):、])(?=[\s\d\\])\s*(.+)|({_LETTER})\s+(?:\(([^()A-J]+)\)|\d.*|-\s+[A-Za-z]{{3}}.*)",
    re.DOTALL,
)
_TRAILING_LETTER = re.compile(rf"[^A-J=\\^_]{{1,60}}\s\(\s*({_LETTER})\s*\)")
_HEDGED = re.compile(  # text after a letter that offers another choice
    rf"\W*(?:(?i:or|and|but|(?:is|are)\s+(?:not|wrong|incorrect|false))\b|或|か)|[/&,]\s*{_LETTER}|.*(?:\b{_LETTER}[.):](?:\s|\Z)|[(\[]{_LETTER}[)\]])"
    rf"|.*\b(?i:maybe|perhaps|possibly|alternatively|could|might|not\s+sure|or\s+(?:option|choice))\b.*\b{_LETTER}\b"
    rf"|(?:{_LETTER}\b|\b(?i:and|or)\b|\W)*\Z",
    re.DOTALL,
)
_SELECTION = re.compile(
    rf"""
      (?:\b(?i:answers?|options?|choices?|one)\W{{0,2}}\s*(?i:is|are|:|=|(?:must|should|would|will|has\s+to)\s+be)\W{{0,3}}
        (?:(?i:therefore|thus|clearly|indeed|either|option|choice|statement|letter)s?\W{{1,2}})*
      | \b(?i:choose|select|pick|chose|selected|going\s+with|go\s+with|is|to|with|matches|gives|i\.e\.,?|namely)\s+
        (?:(?i:the|answer)\s+)?(?:(?i:option|choice|answer|letter)s?\s+)
      | \b(?i:choose|select|pick|chose|go\s+with)\s+
      | \b(?i:therefore|thus|hence|so)[\s,]+(?={_CHOICES}\s*(?:[.!\n]|\Z))
      | (?:故选|应选|选择|选项|选|選択肢|答案|正解|答え|정답|正确的|正しいの)[是为选:はが은\s】]*
      )(?P<named>{_CHOICES})
    | (?P<praised>{_CHOICES})
      (?:\s+(?i:is|are)\s+(?i:the\s+)?(?i:only\s+)?(?i:correct|right|best|answer)\b|\s*(?:选?项)?(?:是)?正确)
    """,
    re.VERBOSE,
)
_NEGATED = re.compile(
    r"(?:\b(?:not|nor|neither|never|if|whether|why|suppose|assume|unless)\b|n't|不|非)[^.\n]{0,20}\Z", re.IGNORECASE
)
_REJECTED = re.compile(r"\s*(?:是|为|の?は)?\s*(?:错|不对|不正确|不成立|不符|不选|誤り|間違)")
_ALTERNATIVE = re.compile(
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


def same_choice(gold: str, answer: Answer) -> bool | None:
    """Return whether both choose the same letters; None if the gold is not a choice or the answer names no letter."""
    if (
        (numbers := _statement_numbers(answer.text))
        and numbers == sorted(re.findall(r"\d+", gold))
        and re.fullmatch(r"[\d,\s]+", gold)
    ):
        return True
    gold_letters = letters(gold)
    if not gold_letters:
        return None
    answer_letters = _chosen_letters(answer)
    return None if answer_letters is None else answer_letters == gold_letters


def letters(text: str) -> str | None:
    """Return the letters that a text names, "C" or "ACD", without the words around them and the text of the option.

    Empty if the text hedges (B or C, B. C., two labelled options), None if it is not a choice.
    """
    bare = _without_typesetting(text[:MAX_LENGTH]).strip()
    if re.fullmatch(r"\(?[a-j]\)", bare) or (re.fullmatch(r"[a-j]", bare) and re.search(r"\\(?:text|mathrm)", text)):
        return bare.strip("()").upper()
    start = _LEADING_WORDS.match(bare)
    bare = _TRAILING_WORDS.sub("", bare[start.end() :] if start else bare)
    if re.fullmatch(_CHOICES, bare):
        return _letter_set(bare)
    if match := _WITH_TEXT.fullmatch(bare):
        return "" if _HEDGED.match(match[3] or match[5] or "-1") else match[1] or match[2] or match[4]
    if match := _TRAILING_LETTER.fullmatch(bare):
        return match[1]
    return "" if re.match(rf"{_CHOICE}[\s,.]*(?:\bor\b|[/|]|或|か|\({_LETTER}\b)", bare) else None


def option_text(text: str) -> str | None:
    """Return the text after the letter of an option: 42 for (C) 42. None without a letter or with several letters."""
    match = _OPTION.fullmatch(text)
    return match[1] if match and letters(text) else None


def _without_typesetting(text: str) -> str:
    return re.sub(r"[ \t]+", " ", _TYPESETTING.sub(" ", plain(text)))


def _letter_set(text: str) -> str | None:
    """Return the letters in "A, C and D", "ACD" or "(A)(C)"; "" if the text hedges; None for a word."""
    names = re.findall(_LETTER, text)
    if re.fullmatch(r"[A-H]{2,8}", text):
        return text if list(text) == sorted(set(text)) else None
    if len(names) > 1 and (len(set(names)) < len(names) or re.search(r"\bor\b|[/或か:]|または|[.](?!\Z)", text)):
        return ""
    return "".join(sorted(names))


def _chosen_letters(answer: Answer) -> str | None:
    """Return the letters of an answer: in its text, else in a phrase of its context, else in the last line."""
    text = " and ".join(answer.boxes) if answer.boxes else answer.text
    if (text_letters := letters(text)) is not None:
        return text_letters
    context = _without_typesetting(answer.context[-2 * MAX_LENGTH :])
    for phrase in reversed(list(_SELECTION.finditer(context))):
        prefix = context[max(0, phrase.start() - 30) : phrase.start()]
        if _ALTERNATIVE.match(context, phrase.end()) or re.search(
            r"(?i:\bor|\bmaybe|\bperhaps|\bpossibly|或|か)\s*\Z", prefix
        ):
            return ""
        if not _NEGATED.search(prefix) and not _REJECTED.match(context, phrase.end()):
            return letters(phrase["named"] or phrase["praised"])
    lines = context.strip().splitlines()
    if not lines or len(_OPTION_LINE.findall(context)) > 1:
        return None
    return letters(lines[-1])


def _statement_numbers(text: str) -> list[str]:
    """Return the sorted numbers in "(2)(3)" or "statements 2 and 3"."""
    return sorted(re.findall(r"\d+", text)) if _LABELLED.fullmatch(_without_typesetting(text).strip()) else []
