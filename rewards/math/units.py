"""Units of measurement: which words mean the same unit. Stdlib only."""

import math
import re
from functools import lru_cache

_SPELLINGS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "dm": "decimeter decimetre", "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "s": "second sec", "min": "minute", "h": "hour hr", "day": "", "week": "", "month": "", "year": "yr",
    "ms": "millisecond", "mg": "milligram", "g": "gram", "kg": "kilogram", "t": "ton tonne", "lb": "pound lbs",
    "oz": "ounce",
    "l": "liter litre L", "ml": "milliliter millilitre mL", "gal": "gallon", "quart": "", "pint": "", "cup": "",
    "usd": "dollar USD buck", "cent": "¢", "eur": "euro EUR", "gbp": "GBP",
    "yuan": "rmb RMB CNY 元 块 圆", "yen": "JPY 円", "rupee": "rs Rs INR ₹", "won": "KRW ₩", "franc": "CHF",
    "deg": "degree", "rad": "radian", "degc": "celsius Celsius", "degf": "fahrenheit Fahrenheit", "k": "kelvin",
    "n": "newton", "j": "joule", "w": "watt", "v": "volt", "ohm": "", "hz": "hertz Hz", "pa": "pascal Pa",
    "unit": "", "acre": "", "hectare": "ha",
}  # fmt: skip
_UNITS = {word: unit for unit, words in _SPELLINGS.items() for word in (unit, *words.split())}
_COMPOUND = {"mph": {"mi": 1, "h": -1}, "kmph": {"km": 1, "h": -1}, "kph": {"km": 1, "h": -1}, "sqft": {"ft": 2}}
_SINGLE = frozenset("mshgtlLNJWVKk")  # letters that may also be variables
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_PIECE = re.compile(r"(?P<word>[^\W\d_]+|¢)|\^\s*\{?\s*(?P<power>-?\d+)\s*\}?|(?P<over>/)")
Unit = tuple[tuple[str, int], ...]


def _unit(word: str) -> str | None:
    for form in (word, word.lower()):
        for stem in (form, form.removesuffix("s"), form.removesuffix("es")):
            if stem in _UNITS:
                return _UNITS[stem]
    return None


_CURRENCIES = {"usd", "cent", "eur", "gbp", "yuan", "yen", "rupee", "won", "franc"}
_MULTIPLIERS = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "million": 10**6, "mn": 10**6, "crore": 10**7,
    "billion": 10**9, "bn": 10**9, "trillion": 10**12, "tn": 10**12, "mln": 10**6, "mio": 10**6, "mrd": 10**9,
    "myriad": 10**4, "score": 20, "gross": 144, "grand": 10**3,
    "百": 100, "千": 10**3, "万": 10**4, "萬": 10**4, "億": 10**8, "亿": 10**8,
}  # fmt: skip
_CHANGES = frozenset(  # words after a number that change it or make it only a part of the answer
    "squared cubed factorial half halves third thirds quarter quarters fourths fifths sixths sevenths eighths ninths "
    "tenth tenths hundredth hundredths thousandth thousandths mille or but not unless except wrong incorrect maybe "
    "otherwise versus vs plus minus times pairs th nd rd st root remainder mod modulo more less fewer greater permille "
    "promille ppm ppb fold inverse tens basis bps prozent ciento cento mil millionen milliarden doubled tripled halved "
    "quadrupled divided multiplied exponent percentile impossible false fails cannot excluded invalid ruled".split()
)
_CONDITIONS = frozenset(  # words that do so if they belong to the number; in prose they may begin a new phrase
    "at if iff when whenever where while given provided assuming for up upward upwards above below under over least "
    "most than minimum maximum too base out half twice double triple thrice negative never neither nor percent "
    "percentage pct with case cases some sometimes usually often occasionally possibly probably rarely "
    "typically".split()
)

FACTORS = frozenset("b e i n r x y z pi max min".split())  # alone after a number, as in 7 \text{ x}, they multiply it
_BOUNDS = ("以上", "以下", "以内", "未満", "未满", "多", "半", "不到", "超")  # in scripts without spaces


def is_currency(text: str) -> bool:
    return _unit(text.strip(" .,:")) in _CURRENCIES


def multiplier(text: str) -> int:
    """Return the factor of "million" or "million people"; 1 for other words."""
    if text.strip() == "k":  # K is a kelvin
        return 1000
    words = [word if word.isascii() else word[:1] for word in re.findall(r"[^\W\d_]+", text.lower())]
    return math.prod(_MULTIPLIERS.get(word) or _MULTIPLIERS.get(word.removesuffix("s"), 1) for word in words)


def changes_value(text: str) -> bool:
    """Return whether words after a number change it or make it doubtful: 7 tenths, 7 but maybe, 7 is wrong."""
    if any(sign in text for sign in _BOUNDS) or re.search(r"\b\d+[^\W\d_]", text):  # 6 \text{1feet}
        return True
    words = re.findall(r"[^\W\d_]+", text.lower())
    return "p.c." in text.lower() or (bool((_CHANGES | _CONDITIONS).intersection(words)) and unit(text) is None)


_SIGNS = "".join(word for word in _MULTIPLIERS if not word.isascii())
MULTIPLIER = re.compile(rf"[\s-]*(?:(?:{'|'.join(filter(str.isascii, _MULTIPLIERS))})s?\b|[{_SIGNS}])", re.IGNORECASE)
CHANGE = re.compile(
    rf"[\s-]*(?:is\s+|was\s+)?(?:{'|'.join(sorted(_CHANGES - {'or', 'but', 'more', 'less'}))})\b", re.IGNORECASE
)


def is_unit(word: str) -> bool:
    """Return whether a word is a unit that can't be read as a variable."""
    return word not in _SINGLE and (_unit(word) is not None or word in _COMPOUND)


@lru_cache(4096)
def unit(text: str) -> Unit | None:
    """Return the sorted units with their powers: `(("cm", 2),)` for `cm^2`. None if a word is not a unit."""
    powers: dict[str, int] = {}
    sign, prefix_power, last = 1, 1, ""
    for piece in _PIECE.finditer(text.replace(".", "")):
        word = piece["word"]
        if piece["over"] or word in ("per", "an", "a", "each"):
            sign = -1
        elif piece["power"]:
            if last:
                powers[last] += sign * (int(piece["power"][:4]) - 1)
        elif word in _COMPOUND:
            powers |= _COMPOUND[word]
        elif word.lower() in _POWERS:
            if word.lower() in ("squared", "cubed") and last:
                powers[last] += sign * (_POWERS[word.lower()] - 1)
            else:
                prefix_power = _POWERS[word.lower()]
        elif (last := _unit(word) or "") == "":
            return None
        else:
            powers[last] = powers.get(last, 0) + sign * prefix_power
            prefix_power = 1
    return tuple(sorted(powers.items())) if powers else None


def conflict(gold: str, prediction: str) -> bool:
    """Return whether both are known units and differ. Other words (students, apples) are not compared."""
    gold_unit, prediction_unit = unit(gold), unit(prediction)
    if gold_unit is None or prediction_unit is None or gold_unit == prediction_unit:
        return False
    if {name for name, _ in gold_unit} == {"unit"} or {name for name, _ in prediction_unit} == {"unit"}:
        return sum(power for _, power in gold_unit) != sum(power for _, power in prediction_unit)
    return True
