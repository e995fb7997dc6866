r"""What people and models write around a value without changing it: HTML, boxes in boxes, \SI, labels, qualifiers.

Everything here is text to text. What might change a value stays, and makes the answer unreadable later.
"""

# ruff: noqa: RUF001 - signs of other scripts are what it is about

import html
import re

_HTML = re.compile(r"</?(?:sup|sub)>|&#?\w+;|<br\s*/?>|</\w+>", re.IGNORECASE)
_RAISED = re.compile(r"<(sup|sub)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?(?:i|b|em|strong|u|p|br|span|div|math|code|font)(?:\s[^<>]*)?/?>", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mbox|hbox|emph|mathrm|textrm)\s*\{([^{}]*)\}")
_NESTED = re.compile(
    r"(\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm)\s*\{[^{}]*)\{([^{}]*)\}(?=[^{}]*(?:\{[^{}]*\}[^{}]*)*\})"
)
_FRAME = re.compile(
    r"\\(?:underline|uline|fbox|boxed|colorbox\s*\{\w*\}|framebox(?:\s*\[[^\]]*\])*|overset\s*\{\})\s*(?=\{)"
)
_SI = re.compile(r"\\(?:SI|qty)\s*(?:\[[^\]]*\])?\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_NUM = re.compile(r"\\num\s*(?:\[[^\]]*\])?\s*\{([^{}]*)\}")
_ANG = re.compile(r"\\ang\s*\{([^{}]*)\}")
_UNIT = re.compile(r"\\(?:si|unit)\s*\{([^{}]*)\}")
_NUMBER_IN_TEXT = re.compile(
    r"(?<![\w.,/^_$])([-+−]?\s?(?:\\?[$€£¥₹])?\s?\d+(?:,\d{3})*(?:\.\d+)?(?:\s?/\s?\d+)?\s?(?:\\?%)?)(?![\w/^])"
)
_CURRENCY = re.compile(r"(?<![a-zA-Z])(?:Rs\.?|INR|USD|EUR|GBP|RMB|CNY|JPY)[\s~]*(?=\d)")
_COUNTRY = re.compile(r"(?<![a-zA-Z])(?:US|AU|CA|HK|NZ|SG|[AC])\s?(?=\\?\$\s?\d)")
_EMPTY = re.compile(r"\\text\{\s*\}")
# In what follows ` stands for either end of a \text
_APPROXIMATION = re.compile(
    r"(?<=[^\s`(])(?:[\s,;~`]|\\q?quad|\\[,;:! ])*\(?`?\s*\(?\s*(?:\bor\s+)?(?:\bis\s+)?(?<![\\\w])(?:approximately|approx\.?|about|roughly|"
    r"around|nearly)\b(?:\s+equal\s+to)?[\s`:]*(?:\\\$)?[-−]?[\d.,]+(?:\s*\\?%)?[\s`]*\w*[\s`]*\)?[\s`.)]*\Z",
    re.IGNORECASE,
)
_ROUNDED = re.compile(r"(?<=[^\s`(])(?:[\s,;~]|\\q?quad|\\[,;:! ])*\(\s*(?:\\approx|≈)[^()]*\)\s*\Z")
_FILLER = re.compile(
    r"\A[\s`(]*(?:(?:exactly|only|just|simply|about|approximately|approx\.?|roughly|around|a total of|in total|"
    r"the (?:final )?answer|answer|therefore|so|thus|hence)[\s,:`]+)+(?=[-+−\d\\$.(])",
    re.IGNORECASE,
)
_LETTER = r"\$?\s*([a-zA-Z])\s*\$?"
_INTEGERS = re.compile(
    rf"(?<=[^\s`(])[\s,;`(]*(?:\\q?quad[\s`]*)?(?:\(?\s*(?:for|where|with|and)\s+)?(?:(?:any|some|all|every|each|an?)\s+)?`?\s*(?:"
    rf"(?:arbitrary\s+)?integers?\s*`?\s*{_LETTER}|{_LETTER}`?\s*(?:is|are|as)?\s*(?:an?|any)?\s*(?:arbitrary\s+)?integers?)"
    r"[\s`).]*\Z"
)
_DOMAIN = re.compile(
    rf"(?<=[^\s`(])[\s,;`]*(?:\\q?quad[\s`]*)?\(?[\s`]*(?:(?:for|where|with)\s+)?(?:(?:any|some|all|every|each)\s+)?`?\s*{_LETTER}"
    r"\s*(?:\\in|∈)\s*(?:\\mathbb\s*\{?\s*Z\s*\}?|\\mathbf\s*\{\s*Z\s*\}|ℤ|Z)\s*\)?[\s`.]*\Z"
)
_QUALIFIER = re.compile(
    r"(?<=[^\s`(])(?:[\s,;`(]|\\q?quad|\\[,;:! ])*(?:\\forall\b|∀|\b(?:for\s+(?:all|every|any|each|some)\b|where\b[^=<>]*\b(?:is|are)\s+"
    r"(?:an?|any|some|the|arbitrary|real|all)\b|where\s+`?\s*[a-zA-Z]\s*(?:\\in|∈))).*\Z",
    re.IGNORECASE | re.DOTALL,
)
_RESTRICTS = re.compile(r"\b(?:even|odd|prime|positive|negative|except|unless|only|not|but|otherwise|if|when)\b")
_SAYS = re.compile(r"(?:\b(?:is|are|be|equals?|equal to|become|becomes)|[:=])\s*\Z", re.IGNORECASE)
_OTHERWISE = re.compile(  # what says "is" and does not say what the answer is
    r"\b(?:not|never|isn|aren|cannot|neither|nor|if|unless|when|half|twice|double|triple|thrice|negative|opposite|reciprocal|inverse|"
    r"square|cube|root)\b|n't",
    re.IGNORECASE,
)
_REALS = re.compile(
    r"(?:[a-zA-Z]\s*(?:\\in|can be|is|=)\s*)?(?:the set of\s+)?(?:all|any|every|each)\s+(?:possible\s+)?(?:real\s+(?:numbers?|values?)|reals?|"
    r"real\s+(?=[a-z]\b))\s*(?:(?:of|for)?\s*[a-zA-Z])?\s*(?:,?\s*(?:except|excluding|other than|but not|not equal to|besides|"
    r"(?:where\s+|with\s+|such that\s+)?[a-zA-Z]?\s*\\n(?:e|eq|ot=)(?![a-z]))(?:\s+(?:for|at|when|that))?\s*(?:[a-zA-Z]\s*=\s*)?(.+?))?[\s.]*\Z",
    re.IGNORECASE,
)


def bare(text: str) -> str:
    """The text of an answer without what adds nothing to its value."""
    text = _CURRENCY.sub("", _COUNTRY.sub("", text))
    if "<" in text or "&" in text:
        text = _without_html(text)
    if "\\" not in text and not re.search(r"[a-z]{2}", text):
        return text
    text = _FRAME.sub("", _siunitx(text))
    while (flat := _NESTED.sub(r"\1\2", text)) != text:  # \text{m s^{-2}}
        text = flat
    text = _TEXT.sub(_isolated, text)
    return _without_words(text)


def _without_html(text: str) -> str:
    if not _HTML.search(text):
        return text
    text = _RAISED.sub(lambda found: ("^" if found[1].lower() == "sup" else "_") + "{" + found[2] + "}", text)
    return html.unescape(_TAG.sub(" ", text))


def _siunitx(text: str) -> str:
    if not re.search(r"\\(?:SI|qty|num|ang|si|unit)\b", text):
        return text
    text = _SI.sub(lambda found: rf"{found[1]}\text{{ {_words_of(found[2])} }}", text)
    text = _ANG.sub(r"\1^\\circ", _NUM.sub(r"\1", text))
    return _UNIT.sub(lambda found: rf"\text{{ {_words_of(found[1])} }}", text)


def _words_of(unit: str) -> str:
    """The commands of a unit as words: \\meter\\per\\second."""
    unit = re.sub(r"\\(squared|cubed|square|cubic|per)", r" \1 ", unit)
    return re.sub(r"\s+", " ", re.sub(r"\\([a-zA-Z]+)", r" \1", unit).replace(".", " ").replace("~", " ")).strip()


def _isolated(found: re.Match[str]) -> str:
    r"""\text{42 apples} as 42\text{ apples}; a function's name as such."""
    inner = found[1]
    if inner.strip() in (
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "cis",
        "arcsin",
        "arccos",
        "arctan",
        "lcm",
        "gcd",
    ):
        return rf"\{inner.strip()} "
    if inner.strip() in ("€", "£", "¥", "₹", r"\$", "$"):
        return inner.replace("\\$", "$").replace("$", r"\$")
    if re.fullmatch(r"\s*[A-Z]\s*", inner) and found.string[found.end() :].lstrip().startswith("_"):
        return f"{{{inner}}}"
    if inner.strip() in ("o", "\\circ") and found.string[: found.start()].rstrip("{ ").endswith("^"):
        return r"\circ"
    if not re.search(r"\d", inner) or found[0].startswith(r"\mathrm"):
        return found[0]
    return _EMPTY.sub("", r"\text{" + _NUMBER_IN_TEXT.sub(r"}\1\\text{", inner) + "}")


def _without_words(text: str) -> str:
    """Without labels before, and qualifiers and approximations behind."""
    marked = _TEXT.sub(r"`\1`", text)
    if (reals := _REALS.match(marked.replace("`", " ").strip())) is not None:
        return _real_numbers(reals[1])
    before = marked
    marked = _FILLER.sub("", _ROUNDED.sub("", _APPROXIMATION.sub("", marked)))
    for pattern in (_INTEGERS, _DOMAIN):
        marked = pattern.sub(lambda found: rf", {next(filter(None, found.groups()))} \in \mathbb{{Z}}", marked)
    if (behind := _QUALIFIER.search(marked)) and not _RESTRICTS.search(behind[0]):
        marked = marked[: behind.start()]
    marked = _without_labels(marked)
    if marked == before:
        return text
    return re.sub(r"`([^`]*)`", r"\\text{\1}", marked).replace("`", "")


def _real_numbers(but: str | None) -> str:
    if but is None:
        return r"\mathbb{R}"
    left_out = re.sub(r"\b(?:and|or)\b", ",", but)
    left_out = re.sub(r"[a-zA-Z]\s*(?:=|\\n(?:e|eq|ot=)(?![a-z]))\s*", "", left_out).strip(" {}\\,")
    return rf"\mathbb{{R}} \setminus \{{{left_out}\}}"


def _without_labels(marked: str) -> str:
    """`Ana: ` 18, ` Ben: ` 14 as 18, 14; of a sentence what its last "is" says."""
    parts = marked.split("`")  # texts are at odd places
    says = [n for n in range(1, len(parts) - 1, 2) if _SAYS.search(parts[n]) and parts[n + 1].strip(" ,.;")]
    if not says or any(_OTHERWISE.search(parts[n]) for n in says[-1:]):
        return marked
    is_item = [not parts[n - 1].strip(" \\quad") or parts[n - 1].rstrip(" \\quad").endswith((",", ";")) for n in says]
    if len(says) > 1 and says[0] == 1 and all(is_item):
        return "".join(_joint(part) if n in says else f"`{part}`" if n % 2 else part for n, part in enumerate(parts))
    rest = parts[says[-1] + 1 :]
    return "".join(f"`{part}`" if n % 2 else part for n, part in enumerate(rest))


def _joint(label: str) -> str:
    """What a label leaves: the comma or "and" that it begins with."""
    return ", " if re.match(r"\s*(?:,|;|and\b)", label) else " "
