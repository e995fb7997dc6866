"""The fast path of the math reward: exact comparison of plain numbers. Stdlib only.

A plain number is an integer, a decimal, a fraction, a mixed number or a percentage, optionally with thousands
separators, a currency sign and LaTeX around it. The slow path reads all other answers.
"""

# ruff: noqa: RUF001 - signs of other scripts are intended

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

from .east_asian import to_western

MAX_DIGITS = 1000  # per number
MAX_EXPONENT = 1000  # power of ten, as in 1.5e3
_MAX_LENGTH = 2 * MAX_DIGITS

_DIGITS = r"(?:[1-9]\d{0,2}(?:(?:,|\{,\}|,\\!\s?|\\,|\\!)\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""\s*(?P<sign>[-+]?)\s*(?:\\?\$)?\s*(?P<sign2>-?)
    (?:
      (?:(?P<whole>\d+)\s*)??\\[dtc]?frac\s*
        (?:\{{\s*(?P<top>-?\d+)\s*\}}|\s?(?P<top1>\d))\s*(?:\{{\s*(?P<low>\d+)\s*\}}|(?P<low1>\d))
    | (?:(?P<whole2>\d+)\s+)?(?P<over>\d+)\s*/\s*(?P<under>\d+)
    | (?P<decimal>{_DECIMAL})(?:[eE](?P<exponent>[-+]?\d+))?
    )
    \s*(?P<percent>\\?%|percent|pct)?\s*\.?\s*\Z""",
    re.VERBOSE | re.ASCII,
)
_SEPARATORS = re.compile(r"[^\d.]+", re.ASCII)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUBSCRIPT = re.compile(r"[₀-₉]+")
_SUPERSCRIPT = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_CIRCLED = re.compile(r"[①-⑳❶-❿⓵-⓾]+")
_VULGAR = re.compile(r"[¼½¾⅐-⅞]")
_SIGNS = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "٫": ".", "٬": ",", "٪": "%", "،": ",",
    "؛": ";", "′": "'", "º": "°", "\u2062": "*", "\u2063": ",",
}  # fmt: skip


def plain(text: str) -> str:
    """Convert digits of all scripts, full-width signs and superscripts to ASCII, and remove invisible characters.

    Circled numbers become a list: ②③ is 2, 3. `east_asian` converts Chinese and Japanese numbers.
    """
    if text.isascii():
        return text
    text = _CIRCLED.sub(lambda match: ", ".join(str(int(unicodedata.numeric(sign))) for sign in match[0]), text)
    text = _SUBSCRIPT.sub(lambda match: "_{" + match[0].translate(_SUBSCRIPTS) + "}", text)
    text = _SUPERSCRIPT.sub(lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/") + " ", text)
    return to_western("".join(_ascii(sign) for sign in text))


@lru_cache(4096)
def _ascii(sign: str) -> str:
    if sign in _SIGNS:
        return _SIGNS[sign]
    category = unicodedata.category(sign)
    if category == "Nd":
        return str(unicodedata.decimal(sign))
    if category == "Cf":
        return ""
    if category == "Zs":
        return " "
    normalized = unicodedata.normalize("NFKC", sign)
    return normalized if normalized.isascii() else sign


@lru_cache(1024)
def number(text: str) -> Fraction | None:
    """Return the value of a plain number, or None for any other text. Percentages are divided by 100."""
    match = _NUMBER.match(text) if len(text) <= _MAX_LENGTH else None
    if match is None:
        return None
    top, low = match["top"] or match["top1"] or match["over"], match["low"] or match["low1"] or match["under"]
    whole_part = match["whole"] or match["whole2"]
    if max(map(len, filter(None, (top, low, whole_part, match["decimal"])))) > MAX_DIGITS or (low and not int(low)):
        return None
    if top and low:
        if whole_part and top.startswith("-"):
            return None
        value = int(whole_part or 0) + Fraction(int(top), int(low))
    else:
        value = Fraction(_SEPARATORS.sub("", match["decimal"]).rstrip(".") or 0)
        exponent = match["exponent"] or "0"
        if len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT:
            return None
        value *= Fraction(10) ** int(exponent)
    if match["percent"]:
        value /= 100
    return -value if (match["sign"] + match["sign2"]).count("-") == 1 else value
