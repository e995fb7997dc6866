"""The fast path of the math reward: plain numbers, compared exactly. Stdlib only.

A number here is an integer, a decimal, a fraction, a mixed number or a percentage, with or without thousands
separators, currency sign and LaTeX around it. Whatever else an answer may be, the slow path reads.
"""

# ruff: noqa: RUF001 - signs of other scripts are what it is about

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

from .east_asian import readable

MAX_DIGITS = 1000  # of one number
MAX_EXPONENT = 1000  # of ten, in 1.5e3
_LONGEST = 2 * MAX_DIGITS

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
    """`text` with the digits of every script, full-width signs and superscripts in ASCII, and invisible marks gone.

    Numbers in circles are a list, ②③ is 2, 3; Chinese and Japanese numbers are as `east_asian` reads them.
    """
    if text.isascii():
        return text
    text = _CIRCLED.sub(lambda found: ", ".join(str(int(unicodedata.numeric(sign))) for sign in found[0]), text)
    text = _SUBSCRIPT.sub(lambda found: "_{" + found[0].translate(_SUBSCRIPTS) + "}", text)
    text = _SUPERSCRIPT.sub(lambda found: "^{" + found[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]).replace("⁄", "/") + " ", text)
    return readable("".join(_ascii(sign) for sign in text))


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
    normal = unicodedata.normalize("NFKC", sign)
    return normal if normal.isascii() else sign


@lru_cache(1024)
def number(text: str) -> Fraction | None:
    """The value of a plain number, None for anything else. A percentage is a hundredth."""
    found = _NUMBER.match(text) if len(text) <= _LONGEST else None
    if found is None:
        return None
    top, low = found["top"] or found["top1"] or found["over"], found["low"] or found["low1"] or found["under"]
    whole = found["whole"] or found["whole2"]
    if max(map(len, filter(None, (top, low, whole, found["decimal"])))) > MAX_DIGITS or (low and not int(low)):
        return None
    if top and low:
        if whole and top.startswith("-"):
            return None
        value = int(whole or 0) + Fraction(int(top), int(low))
    else:
        value = Fraction(_SEPARATORS.sub("", found["decimal"]).rstrip(".") or 0)
        exponent = found["exponent"] or "0"
        if len(exponent) > 5 or abs(int(exponent)) > MAX_EXPONENT:
            return None
        value *= Fraction(10) ** int(exponent)
    if found["percent"]:
        value /= 100
    return -value if (found["sign"] + found["sign2"]).count("-") == 1 else value
