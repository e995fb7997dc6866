"""Answers as words: their letters, their spelling, lists of words, times of day."""

import re
import unicodedata

from .prose import MAX_LENGTH

_ARTICLE = re.compile(r"\A[\W_]*(?:an?|the)\s+(?=[^\W\d_]{3})", re.IGNORECASE)


def words(text: str) -> str:
    """Return only the letters and digits, without case, accents and LaTeX text commands."""
    text = re.sub(
        r"\\(?:text\w*|mbox|mathrm|mathbf|boxed|left|right|operatorname|displaystyle|quad|qquad)\b",
        "",
        text[:MAX_LENGTH],
    )
    text = _ARTICLE.sub("", unicodedata.normalize("NFKD", text))
    return "".join(sign for sign in text if sign.isalnum()).casefold()


def spelling(text: str) -> str:
    """Return the text without spaces and typesetting commands."""
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_", text[:MAX_LENGTH])
    text = re.sub(r"\\(?:text\w*|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:text\w*|mbox|mathrm|mathbf|left|right|displaystyle)\b|\\[,;:! ]|[\s$]|\\[()]", "", text)
    return unicodedata.normalize("NFKD", text).rstrip(".,\\") if len(words(text)) < 2 else _folded(text)


def _folded(text: str) -> str:
    symbols = re.sub(r"[^\W\d_]{4,}", lambda match: match[0].casefold(), text)
    text = unicodedata.normalize("NFKD", symbols).rstrip(".,\\")
    return text.casefold() if re.fullmatch(r"[^\W\d_]+", text) else text


def clock_time(text: str) -> tuple[int, int, str] | None:
    """Return hours, minutes and "am", "pm" or "", as in 3:30 PM; None if the text is not a time."""
    bare = re.sub(r"\\(?:text\w*|mathrm|mbox)|[{}$.~\\,!\s]", "", text[:60]).lower()
    match = re.fullmatch(r"(\d{1,2}):(\d{2})([ap]m)?", bare)
    return (int(match[1]), int(match[2]), match[3] or "") if match else None


def is_words(text: str) -> bool:
    return bool(re.fullmatch(r"[^\d\\=^_{}<>]*[^\W\d_]{2,}[^\d\\=^_{}<>]*", text[:300]))


def same_word_lists(gold: str, prediction: str) -> bool:
    """Return whether both have the same words in any order: red, blue and green. Lists with "or" and "and" differ."""
    texts = [re.sub(r"\\text\w*|\\mathrm|[{}$]", " ", text) for text in (gold, prediction)]
    gold_words, prediction_words = (
        sorted(filter(None, map(words, re.split(r"[,;&]|\b(?:and|or)\b", text)))) for text in texts
    )
    gold_or, prediction_or = (re.search(r"\bor\b", text) is not None for text in texts)
    return len(gold_words) > 1 and gold_words == prediction_words and is_words(texts[0]) and gold_or == prediction_or
