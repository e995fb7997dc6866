"""Converts numbers in Chinese, Japanese and Korean notation to western notation. Stdlib only."""

import re
from collections.abc import Callable
from decimal import Decimal

SIGN = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # kana, Han and Hangul, for a character class
_ANY_SIGN = re.compile(f"[、{SIGN}]")
_POWERS = {"百": 10**2, "千": 10**3, "万": 10**4, "萬": 10**4, "億": 10**8, "亿": 10**8}
_DIGITS = r"\d{1,12}(?:,\d{3}){0,4}(?:\.\d{1,8})?"
_AMOUNT = re.compile(  # 3万5千, but not 3千克
    rf"(?<![\d.])(?:{_DIGITS}(?:百(?!分)|千(?![克米瓦焦赫卡帕升伏])|[万萬億亿])+)+(?:\d+(?![\d.]))?"
)
_STEP = re.compile(rf"({_DIGITS})([百千万萬億亿]*)")
_HAN = str.maketrans({sign: str(number) for number, sign in enumerate("一二三四五六七八九十", 1)})
_KILO = re.compile(r"(?<=\d)千([克米])")


def _digit(match: re.Match[str]) -> str:
    """Convert a Han numeral to a digit: 三分之二 becomes 3分之2."""
    return match[0].translate(_HAN)


_REWRITTEN: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"百分之\s*(\d+(?:\.\d+)?)"), r"\1%"),
    (
        re.compile(r"([二三四五六七八九十])分[之の](?=[一二三四五六七八九\d])|(?<=分[之の])([一二三四五六七八九])"),
        _digit,
    ),
    (re.compile(r"(\d+)\s*(?:分[之の]|분의)\s*(\d+)"), r"\2/\1"),
    (re.compile(rf"(?<=\d)\s*\(([{SIGN}]{{1,4}})\)"), r"\1"),  # 18(元)
    (re.compile(r"(?:负|負|マイナス|零下)\s*(?=\d)"), "-"),
    (re.compile(r"(?<=[\w)}\]$%])\s*、\s*"), ", "),
    (re.compile(r"\s*(?:或者?|または|又は|もしくは|或いは|あるいは|또는)\s*(?=[-\dA-Za-z$\\(])"), " or "),
    (re.compile(rf"(?<=[^\W{SIGN}]|[)}}\]$%])\s*(?:和|与|以及|及び?|と)\s*(?=[-\dA-Za-z$\\(])"), " and "),
    (re.compile(r"(?<=\d)\s*(?:到|至|から)\s*(?=-?\d)"), " to "),
]


def to_western(text: str) -> str:
    """Convert amounts, fractions, signs and conjunctions: 3万5千 becomes 35000, 3分の1 becomes 1/3."""
    if not _ANY_SIGN.search(text):
        return text
    text = _KILO.sub(lambda match: r"\text{ km}" if match[1] == "米" else r"\text{ kg}", text)
    text = _AMOUNT.sub(lambda match: _amount(match[0]), text)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return text


def _amount(text: str) -> str:
    total, pending = Decimal(0), Decimal(0)  # 2千3百万: 万 multiplies the whole sum before it
    for digits, signs in _STEP.findall(text):
        value = Decimal(digits.replace(",", ""))
        for sign in signs:
            if _POWERS[sign] < 10**4:
                value *= _POWERS[sign]
            else:
                total, pending, value = total + (pending + value) * _POWERS[sign], Decimal(0), Decimal(0)
        pending += value
    amount = total + pending
    return str(int(amount)) if amount == int(amount) else str(amount)
