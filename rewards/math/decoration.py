r"""Removes text around a value that does not change it: HTML, nested boxes, \SI, labels, qualifiers.

Text that might change the value stays, and makes the answer unreadable later.
"""

# ruff: noqa: RUF001 - signs of other scripts are intended

import html
import re

_FUNCTIONS = "sin cos tan cot sec csc log ln exp cis arcsin arccos arctan lcm gcd".split()
_CODES = r"Rs\.?|INR|USD|EUR|GBP|RMB|CNY|JPY|CHF|KRW"
_CURRENCY = re.compile(
    rf"(?<![a-zA-Z\\])(?:{_CODES})[\s~]*(?=\d)"
    rf"|\\text\s*\{{\s*(?:{_CODES}|(?:US|AU|CA|HK|NZ|SG|R)\s?\\?\$)\s*\}}[\s~]*(?=\d)"
    r"|\\(?:pounds|euro|yen)(?![a-zA-Z])(?:\{\})?"
)
_DASHED = re.compile(r"(?<=\d)\s*/-+\s*\Z")  # 350/- is 350 rupees
_COUNTRY = re.compile(r"(?<![a-zA-Z])(?:US|AU|CA|HK|NZ|SG|[AC])\s?(?=\\?\$\s?\d)")
_CENTS = re.compile(r"(?<=\d)\s*\\?¢(?![^{}]*\})")
_HTML = re.compile(r"</?(?:sup|sub)>|&[a-zA-Z]+;|<br\s*/?>|</\w+>", re.IGNORECASE)
_ENTITY = re.compile(r"&[a-zA-Z]+;")
_RAISED = re.compile(r"<(sup|sub)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?(?:i|b|em|strong|u|p|br|span|div|math|code|font)(?:\s[^<>]*)?/?>", re.IGNORECASE)
_FRAME = re.compile(
    r"\\(?:underline|uline|fbox|boxed|colorbox\s*\{\w*\}|framebox(?:\s*\[[^\]]*\])*|overset\s*\{\})\s*(?=\{)"
)
_SI = re.compile(r"\\(?:SI|qty)\s*(?:\[[^\]]*\])?\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_NUM = re.compile(r"\\num\s*(?:\[[^\]]*\])?\s*\{([^{}]*)\}")
_ANG = re.compile(r"\\ang\s*\{([^{}]*)\}")
_UNIT = re.compile(r"\\(?:si|unit)\s*\{([^{}]*)\}")

_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mbox|hbox|emph|mathrm)\s*\{([^{}]*)\}")
_NESTED = re.compile(
    r"(\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm)\s*\{[^{}]*)\{([^{}]*)\}(?=[^{}]*(?:\{[^{}]*\}[^{}]*)*\})"
)
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.,/^$])([-+−]?\s?(?:\\?[$€£¥₹])?\s?\d+(?:,\d{3})*(?:\.\d+)?(?:\s?/\s?\d+)?\s?(?:\\?%)?)(?![A-Za-z0-9_/^])"
)
_IN_TEXT = re.compile(r"\\text\s*\{\s*\\text(?:bf|it|rm|sf|tt|normal|up)?\s*\{([^{}]*)\}\s*\}")
_DRESSING = re.compile(r"(?:\s|~|\\[,;:! ]|\\q?quad)*\\(?:checkmark|square|Box|blacksquare|qed)\s*\Z")
_EMPTY = re.compile(r"\\text\{\s*\}")

# In the patterns below, ` stands for both ends of a \text.
_NOT_FIRST = r"(?<=[^\s`(])"  # not at the start
_GAP = r"(?:[\s,;~`]|\\q?quad|\\[,;:!\ ])*"
_APPROXIMATION = re.compile(
    rf"""{_NOT_FIRST}{_GAP}\(?`?\s*\(?\s*(?:\bor\s+)?(?:\bis\s+)?
    (?<![\\\w])(?:approximately|approx\.?|about|roughly|around|nearly)\b(?:\s+equal\s+to)?[\s`:]*
    (?:\\\$)?[-−]?[\d.,]+(?:\s*\\?%)?[\s`]*\w*[\s`]*\)?[\s`.)]*\Z""",
    re.IGNORECASE | re.VERBOSE,
)
_ROUNDED = re.compile(rf"{_NOT_FIRST}{_GAP}\(\s*(?:\\approx|≈)[^()]*\)\s*\Z")
_FILLER = re.compile(
    r"""\A[\s`(]*(?:(?:exactly|only|just|simply|about|approximately|approx\.?|roughly|around|a\ total\ of|in\ total|
    i\.e\.,?|the\ (?:final\ )?answer|answer|therefore|so|thus|hence)[\s,:`]+)+(?=[-+−\d\\$.(])""",
    re.IGNORECASE | re.VERBOSE,
)
_MINUS = re.compile(r"\A[\s`]*(?:minus|negative)[\s`]+(?=[\d\\$.(])", re.IGNORECASE)
_LETTER = r"\$?\s*([a-zA-Z])\s*\$?"
_EACH = r"(?:(?:any|some|all|every|each|an?)\s+)?`?\s*"
_INTEGERS = re.compile(  # where k is an integer; for any integer k
    rf"""{_NOT_FIRST}[\s,;`(]*(?:\\q?quad[\s`]*)?(?:\(?\s*(?:for|where|with|and)\s+)?{_EACH}
    (?:(?:arbitrary\s+)?integers?\s*`?\s*{_LETTER}
    |{_LETTER}`?\s*(?:is|are|as)?\s*(?:an?|any)?\s*(?:arbitrary\s+)?integers?)[\s`).]*\Z""",
    re.VERBOSE,
)
_DOMAIN = re.compile(  # for all k \in \mathbb{Z}
    rf"""{_NOT_FIRST}[\s,;`]*(?:\\q?quad[\s`]*)?\(?[\s`]*(?:(?:for|where|with)\s+)?{_EACH}
    {_LETTER}\s*(?:\\in|∈)\s*(?:\\mathbb\s*\{{?\s*Z\s*\}}?|\\mathbf\s*\{{\s*Z\s*\}}|ℤ|Z)\s*\)?[\s`.]*\Z""",
    re.VERBOSE,
)
_IN_PARENTHESES = re.compile(  # 2n (n \in N^*)
    rf"{_NOT_FIRST}(?:[\s,;~`]|\\q?quad|\\[,;:! ])*\(\s*([a-zA-Z]\s*(?:\\in(?![a-z])|∈)[^()]*)\)[\s.]*\Z"
)
_QUALIFIER = re.compile(
    rf"""{_NOT_FIRST}(?:[\s,;`(]|\\q?quad|\\[,;:!\ ])*(?:\\forall\b|∀
    |\b(?:for\s+(?:all|every|any|each|some)\b
        |where\b[^=<>]*\b(?:is|are)\s+(?:an?|any|some|the|arbitrary|real|all)\b
        |where\s+`?\s*[a-zA-Z]\s*(?:\\in|∈))).*\Z""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
_FOR_SOME = re.compile(r"\bfor\s+some\b[\s`]*(?:[a-z]{2,}[\s`,]*)*([a-zA-Z])\b")
_RESTRICTS = re.compile(r"\b(?:even|odd|prime|positive|negative|except|unless|only|not|but|otherwise|if|when)\b")
_LABEL_END = re.compile(r"(?:\b(?:is|are|be|equals?|equal to|become|becomes)|[:=])\s*\Z", re.IGNORECASE)
_NOT_LABEL = re.compile(  # phrases with "is" that do not state the answer
    r"""\b(?:not|never|isn|aren|cannot|neither|nor|if|unless|when|half|twice|double|triple|thrice|negative|opposite
    |reciprocal|inverse|square|cube|root)\b|n't""",
    re.IGNORECASE | re.VERBOSE,
)
_REALS = re.compile(  # all real numbers x except 2 and 3
    r"""(?:[a-zA-Z]\s*(?:\\in|can\ be|is|=)\s*)?(?:the\ set\ of\s+)?
    (?:all|any|every|each)\s+(?:possible\s+)?(?:real\s+(?:numbers?|values?)|reals?|real\s+(?=[a-z]\b))\s*
    (?:(?:of|for)?\s*[a-zA-Z])?\s*
    (?:,?\s*(?:except|excluding|other\ than|but\ not|not\ equal\ to|besides
        |(?:where\s+|with\s+|such\ that\s+)?[a-zA-Z]?\s*\\n(?:e|eq|ot=)(?![a-z]))
    (?:\s+(?:for|at|when|that))?\s*(?:[a-zA-Z]\s*=\s*)?(.+?))?[\s.]*\Z""",
    re.IGNORECASE | re.VERBOSE,
)


def bare(text: str) -> str:
    """Remove the parts of an answer's text that do not change its value."""
    text = _IN_PARENTHESES.sub(r", \1", text)
    text = _CENTS.sub(r"\\text{ cents}", _DASHED.sub("", _CURRENCY.sub("", _COUNTRY.sub("", text))))
    if ("<" in text or "&" in text) and _HTML.search(text):
        text = _RAISED.sub(lambda match: ("^" if match[1].lower() == "sup" else "_") + "{" + match[2] + "}", text)
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), _TAG.sub(" ", text))
    if "\\" not in text and not re.search(r"[a-z]{2}", text):
        return text
    text = _IN_TEXT.sub(r"\\text{\1}", _DRESSING.sub("", _FRAME.sub("", _siunitx(text))))
    while (flat := _NESTED.sub(r"\1\2", text)) != text:  # \text{m s^{-2}}
        text = flat
    return _without_words(_TEXT.sub(_isolated, text))


def _siunitx(text: str) -> str:
    text = _SI.sub(lambda match: rf"{match[1]}\text{{ {_unit_words(match[2])} }}", text)
    text = _ANG.sub(r"\1^\\circ", _NUM.sub(r"\1", text))
    return _UNIT.sub(lambda match: rf"\text{{ {_unit_words(match[1])} }}", text)


def _unit_words(unit: str) -> str:
    r"""Convert the commands of a unit to words: \meter\per\second becomes meter per second."""
    return " ".join(re.sub(r"\\([a-zA-Z]+)", r" \1", unit).replace(".", " ").replace("~", " ").split())


def _isolated(match: re.Match[str]) -> str:
    r"""Convert \text{42 apples} to 42\text{ apples}; remove \text around function names, currency signs and letters."""
    content, prefix, suffix = match[1].strip(), match.string[: match.start()], match.string[match.end() :]
    if content in _FUNCTIONS:
        return rf"\{content} "
    if content in ("€", "£", "¥", "₹", r"\$", "$"):
        return r"\$" if "$" in content else content
    if re.fullmatch(r"[A-Z]", content) and suffix.lstrip().startswith("_"):
        return content
    if content in ("o", r"\circ") and prefix.rstrip("{ ").endswith("^"):
        return r"\circ"
    if not re.search(r"\d", content) or (match[0].startswith(r"\mathrm") and not re.match(r"\d+\\? ", content)):
        return match[0]
    return _EMPTY.sub("", r"\text{" + _NUMBER.sub(r"}\1\\text{", match[1]) + "}")


def _without_words(text: str) -> str:
    """Remove labels before a value, and qualifiers and approximations after it."""
    original = marked = _TEXT.sub(r"`\1`", text)
    if (reals := _REALS.match(marked.replace("`", " ").strip())) is not None:
        return _real_numbers(reals[1])
    marked = _MINUS.sub("-", marked)
    marked = _FILLER.sub("", unfilled := _ROUNDED.sub("", _APPROXIMATION.sub("", marked)))
    if marked != unfilled and marked.count(")") > marked.count("("):  # (about 18.9)
        marked = re.sub(r"\)(?=[\s`.]*\Z)", "", marked)
    for pattern in (_INTEGERS, _DOMAIN):
        marked = pattern.sub(lambda match: rf", {next(filter(None, match.groups()))} \in \mathbb{{Z}}", marked)
    if (qualifier := _QUALIFIER.search(marked)) and not (
        _RESTRICTS.search(qualifier[0]) or _is_one_case(marked[: qualifier.start()], qualifier[0])
    ):
        marked = marked[: qualifier.start()]
    marked = _without_labels(marked)
    if marked == original:
        return text
    return re.sub(r"`([^`]*)`", r"\\text{\1}", marked).replace("`", "")


def _is_one_case(claim: str, qualifier: str) -> bool:
    """Return whether "for some x" restricts a claim: f(x) = 1 for some x. In f(x) = cx for some c, c is a constant."""
    if (match := _FOR_SOME.search(qualifier)) is None:
        return False
    named, _, value = claim.rpartition("=")
    return f"({match[1]})" in named or re.search(rf"(?<![a-zA-Z\\]){match[1]}|{match[1]}(?![a-zA-Z])", value) is None


def _real_numbers(exceptions: str | None) -> str:
    if exceptions is None:
        return r"\mathbb{R}"
    excluded = re.sub(r"\b(?:and|or)\b", ",", exceptions)
    excluded = re.sub(r"[a-zA-Z]\s*(?:=|\\n(?:e|eq|ot=)(?![a-z]))\s*", "", excluded).strip(" {}\\,")
    return rf"\mathbb{{R}} \setminus \{{{excluded}\}}"


def _without_labels(marked: str) -> str:
    """Convert `Ana: ` 18, ` Ben: ` 14 to `Ana` = 18, `Ben` = 14; a sentence to the text after its last "is"."""
    parts = marked.split("`")  # texts have odd indices
    label_indices = [
        n for n in range(1, len(parts) - 1, 2) if _LABEL_END.search(parts[n]) and parts[n + 1].strip(" ,.;")
    ]
    if not label_indices or _NOT_LABEL.search(parts[label_indices[-1]]):
        return marked
    values = [re.sub(r"\\q?quad|\\[,;:! ]|\s", "", parts[n - 1]) for n in label_indices]
    if (
        len(label_indices) > 1
        and label_indices[0] == 1
        and all(not value or value.endswith((",", ";")) for value in values)
    ):
        return "".join(
            _named(part) if n in label_indices else f"`{part}`" if n % 2 else part for n, part in enumerate(parts)
        )
    rest = parts[label_indices[-1] + 1 :]
    return "".join(f"`{part}`" if n % 2 else part for n, part in enumerate(rest))


def _named(label: str) -> str:
    """Convert a label to a name and "=", after the comma or "and" that the label starts with."""
    match = re.match(r"\s*(,|;|and\b)?(.*?)\s*(?:\b(?:is|are|be|equals?|equal to)|[:=])\s*\Z", label, re.DOTALL)
    joint, name = (match[1], match[2].strip()) if match else (None, label.strip())
    return (", " if joint else " ") + (f"`{name}` = " if name else "")
