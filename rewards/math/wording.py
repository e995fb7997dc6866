"""Answers as words: their letters, their spelling, a time of the day."""

import re
import unicodedata

from .prose import MAX_LENGTH

_ARTICLE = re.compile(r"\A[\W_]*(?:an?|the)\s+(?=[^\W\d_]{3})", re.IGNORECASE)


def words(text: str) -> str:
    """Letters and digits alone, without case, accents and LaTeX's commands for text."""
    text = re.sub(
        r"\\(?:text\w*|mbox|mathrm|mathbf|boxed|left|right|operatorname|displaystyle|quad|qquad)\b",
        "",
        text[:MAX_LENGTH],
    )
    text = _ARTICLE.sub("", unicodedata.normalize("NFKD", text))
    return "".join(sign for sign in text if sign.isalnum()).casefold()


def spelling(text: str) -> str:
    """All but spaces and what only typesets."""
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_", text[:MAX_LENGTH])
    text = re.sub(r"\\(?:text\w*|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:text\w*|mbox|mathrm|mathbf|left|right|displaystyle)\b|\\[,;:! ]|[\s$]|\\[()]", "", text)
    return unicodedata.normalize("NFKD", text).rstrip(".,\\") if len(words(text)) < 2 else _folded(text)


def _folded(text: str) -> str:
    symbols = re.sub(r"[^\W\d_]{4,}", lambda found: found[0].casefold(), text)
    text = unicodedata.normalize("NFKD", symbols).rstrip(".,\\")
    return text.casefold() if re.fullmatch(r"[^\W\d_]+", text) else text


def clock_time(text: str) -> tuple[int, int, str] | None:
    """Hours, minutes, and the half of the day: 3:30 PM."""
    bare = re.sub(r"\\(?:text\w*|mathrm|mbox)|[{}$.~\\,!\s]", "", text[:60]).lower()
    match = re.fullmatch(r"(\d{1,2}):(\d{2})([ap]m)?", bare)
    return (int(match[1]), int(match[2]), match[3] or "") if match else None


def is_words(text: str) -> bool:
    return bool(re.fullmatch(r"[^\d\\=^_{}<>]*[^\W\d_]{2,}[^\d\\=^_{}<>]*", text[:300]))


def same_word_lists(gold: str, prediction: str) -> bool:
    """red, blue and green, in any order; "or" is another list than "and"."""
    texts = [re.sub(r"\\text\w*|\\mathrm|[{}$]", " ", text) for text in (gold, prediction)]
    ours, theirs = (sorted(filter(None, map(words, re.split(r"[,;&]|\b(?:and|or)\b", text)))) for text in texts)
    is_or, other = (re.search(r"\bor\b", text) is not None for text in texts)
    return len(ours) > 1 and ours == theirs and is_words(texts[0]) and is_or == other
