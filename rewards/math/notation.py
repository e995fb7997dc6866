"""Splits LaTeX and plain mathematics into tokens, and checks the bounds before anything else. Stdlib only."""

# ruff: noqa: RUF001 - signs of other scripts are intended

import re
from typing import NamedTuple

from .exact import MAX_DIGITS, MAX_EXPONENT, plain
from .units import is_unit

MAX_LENGTH = 2000  # characters of an answer
MAX_DEPTH = 40  # of nested brackets


class UnreadableError(ValueError):
    """A text that exceeds the bounds or is not mathematics."""


class Token(NamedTuple):
    """`kind` is number, letter, name (a function or constant), text (words), command, or the sign itself."""

    kind: str
    text: str
    spaced: bool  # whether white space precedes the token


FUNCTIONS = frozenset(
    "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc arsinh arcosh "
    "artanh asin acos atan asinh acosh atanh cis log ln lg exp sqrt cbrt abs floor ceil gcd lcm max min det "
    "Re Im arg sgn sum prod int lim".split()
)
GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho "
    "sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi "
    "Omega ell hbar".split()
)
_NAMES = {"infinity": "infty", "inf": "infty", "oo": "infty", "pi": "pi", "Eq": "Eq", "and": "and", "or": "or"}
_NAMES |= {"Abs": "abs", "ceiling": "ceil", "binomial": "binom", "comb": "binom", "pow": "pow", "Pow": "pow"}
_NAMES |= {"factorial": "factorial", "Union": "Union"}  # in programs
_NAMES |= {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "union": "cup", "nan": "nan", "NaN": "nan"}
_WORDS = FUNCTIONS | (GREEK - {"eta", "nu", "xi", "mu", "ell"}) | set(_NAMES)

_UNICODE = {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "±": r"\pm ", "∓": r"\mp ",
    "√": r"\sqrt ", "∛": r"\sqrt[3]", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ",
    "λ": r"\lambda ", "μ": r"\mu ", "σ": r"\sigma ", "φ": r"\phi ", "ϕ": r"\phi ", "ω": r"\omega ", "ρ": r"\rho ",
    "τ": r"\tau ", "ε": r"\epsilon ", "ψ": r"\psi ", "Δ": r"\Delta ", "Ω": r"\Omega ", "∧": " and ", "∨": " or ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "、": ",", "∶": ":", "‰": " per mille", "“": "", "”": "", "„": "", "→": r"\to ", "⇒": r"\Rightarrow ",
    "∀": r"\forall ", "∃": r"\exists ", "₩": r"\text{won}", "˚": r"^\circ ", "₹": r"\text{rupee}",
}  # fmt: skip
_SIGNS = str.maketrans(_UNICODE)

_DOUBLED_BACKSLASH = re.compile(r"\\\\(?=[a-zA-Z(){}\[\]$%,;!])")
_ROWS = re.compile(r"\\begin\s*\{(?:[pbvBV]?(?:small)?matrix|array|cases|aligned?|gathered)\*?\}")
_FENCES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![a-zA-Z])\s*(?:\.(?!\d))?")
_TYPESETTING = re.compile(
    r"\\(?:displaystyle|textstyle|limits|nolimits|boldsymbol|bm|rm|bf|it|tt|small|large|Large|mathstrut|strut|ensuremath|fbox|boxed)(?![a-zA-Z])|\$|(?<!\\)\\[()\[\]]"
    r"|\\label\{[^{}]*\}|\\phantom\{[^{}]*\}|\\hspace\*?\{[^{}]*\}"
)
_SPACE = re.compile(r"(?<!\\)\\[,;:!>\s]|\\q?quad|\\(?:enspace|thinspace|medspace)(?![a-zA-Z])|~|\\\Z")
_DOTS = re.compile(r"\\(?:[cl]dots|dots[bcmoi]?)(?![a-zA-Z])|(?<!\.)\.\.\.(?=.)|…(?=.)")
_RADIX = re.compile(r"(?<![\w.])0[xXbBoO][0-9a-fA-F]")
_FONT = re.compile(r"\\(?:mathrm|operatorname\*?|mathbf|mathit|mathsf|mathcal|mathfrak)\s*\{([^{}]*)\}")
_LETTER_COMMANDS = ("frac", "dfrac", "tfrac", "cfrac", "binom", "triangle", "angle")  # commands before letters
_INFIX = re.compile(r"\{([^{}]*)\\(over|choose)(?![a-zA-Z])([^{}]*)\}")
_ROW_SPACE = re.compile(r"(\\\\)\s*\[\s*[\d.]+\s*(?:pt|em|ex|cm|mm)\s*\]")
_COLOUR = re.compile(r"\\color\s*\{[^{}]*\}|\\textcolor\s*\{[^{}]*\}(?=\s*\{)")
_DIGIT_GROUPS = re.compile(r"(?<![\d.])(\d{1,3})((?:(?:(?:\\!\s?)?,\s?\\!\s?|\{,\}\s?|\\[,;:! ]|~|\s)\d{3})+)(?![\d{])")
_INFIX_COMMANDS = {"over": "frac", "choose": "binom"}
_COMMAS = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:,\d{3})+)(?![\d,]*\d)")
_CLOSING = re.compile(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\pi|\s)*(?:[)\]]|\\\})")
_CURRENCIES = {r"\$": "USD", "€": "EUR", "£": "GBP", "¥": "¥"}  # ¥ is a yuan or a yen
_CURRENCY = re.compile(
    r"(\\\$|[€£¥])\s*(-?(?:\d|,\\!\s?|\{,\}|,(?=\d)|\.(?=\d))+)(?:\s*(?:\\text\s*\{\s*)?(k|K|M|m|B|b|T)(?![a-zA-Z])\s*\}?)?"
)
_DOLLARS = re.compile(r"(?<=[\d}])\s*\\\$(?!\s*[\d\\])")
_SCALED_DOLLARS = re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*)?([kKmMbB])\s?\\?\$\s*\}?")
_SCALES = {"k": "thousand", "m": "million", "b": "billion", "t": "trillion"}
_CONJUNCTION = re.compile(r"(?<=[\d)}\]])\s*(and|or)(?=[A-Z\\($-])")
PERCENT = r"(?:per[\s-]?cent|pct)"
_PER_CENT = re.compile(r"\bper[\s-]+cent\b", re.IGNORECASE)
_TIMES = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
_WRAPPERS = ("np.array", "numpy.array", "sympy.Matrix", "sp.Matrix", "Matrix", "array")

_SYSTEM = re.compile(r"\\(?:left\s*)?\\\{\s*(?=\\begin\s*\{(?:array|aligned|cases|matrix|gathered)\})")
_COMBINATION = re.compile(
    r"(?:\{\s*\})?\s*([_^])\s*(?:\{(\w+)\}|(\w))\s*(?:\\(?:mathrm|text)\s*\{\s*)?([CP])\}?\s*_\s*(?:\{(\w+)\}|(\w))"
)
_DEGREE = re.compile(r"(?<=[\d})])\s*\^\s*(?:\{\s*)?(?:\\(?:text|mathrm)\s*\{\s*)?[oO](?:\s*\})*(?![a-zA-Z(])")
_TEMPERATURE_SCALE = re.compile(r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\(?:text|mathrm|rm)\s*\{?\s*)?([CF])(?![a-zA-Z])\s*\}?")
_SET_SIGN = re.compile(
    r"\\mathbb\s*\{?\s*([NZQRC])\s*\}?\s*(?:\^\s*\{?\s*([+*-])\s*\}?|_\s*\{?\s*(>|\\gt|\\ge[q]?|\+|\\neq?)\s*0?\s*\}?)"
)
_NUMBERS = re.compile(r"\\in\s*([RZNQC])(?![a-zA-Z(])")
_REPEATING = re.compile(  # 0.333..., 0.0909..., 0.(3)
    r"(?<![\d.])(\d+\.)(?:(\d{0,9}?)(?:(\d)\3{2,}|(\d{2,4}?)\4+)\s*(?:\\ldots|\.\.\.|…)|\((\d+)\))(?![\d.,]|\s*[,\d])"
)
_MODULE = re.compile(r"\b(?:np|numpy|sp|sympy|math)\.(?=[a-zA-Z])")
_EMPTY_GROUP = re.compile(r"(?<![a-zA-Z}\\])\{\s*\}\s*(?=[\^_])")
_IMAGINARY = re.compile(r"(?<=\*)\s*I(?![a-zA-Z(])|(?<![a-zA-Z\\])I(?=\s*\*)")
_EULER = re.compile(r"(?<![a-zA-Z\\])E\s*\*\*")
_INTERVAL = re.compile(r"\bInterval(?:\.(open|Lopen|Ropen))?\(([^()]*,[^()]*)\)")
_INTERVAL_BRACKETS = {"": "[{}]", "open": "({})", "Lopen": "({}]", "Ropen": "[{})"}
_FINITE_SET = re.compile(r"\bFiniteSet\(([^()]*)\)")
_RATIONAL = re.compile(r"\b(?:Rational|Fraction)\(([^(),]*),([^(),]*)\)")

_TOKEN = re.compile(
    r"""\s*(?:
    \\(?:text|textbf|textit|textrm|textnormal|textsf|texttt|mbox|hbox|emph|textup)\s*\{(?P<words>[^{}]*)\}
  | (?P<number>(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][-+]?\d+)?)
  | \\(?P<fence>begin|end)\s*\{(?P<environment>[a-zA-Z]+)\*?\}(?:\s*\{[clr|\s]*\}|\[[a-z]\])?
  | \\(?P<command>[a-zA-Z]+)
  | \\(?P<escaped>[\\{}|%#&_])
  | (?P<letters>[^\W\d_]+)
  | (?P<sign><=|>=|=<|=>|!=|<>|\*\*|==|->|\S)
    )""",
    re.VERBOSE,
)
_COMMAND_KINDS = {
    "leq": "<=", "le": "<=", "leqslant": "<=", "geq": ">=", "ge": ">=", "geqslant": ">=", "lt": "<", "gt": ">",
    "neq": "!=", "ne": "!=", "approx": "~", "simeq": "~", "sim": "~", "equiv": "==", "in": "in", "cong": "==",
    "times": "*", "cdot": "*", "ast": "*", "div": "/", "pm": "pm", "mp": "mp", "cup": "cup", "cap": "cap",
    "setminus": "minus", "backslash": "minus", "land": "and", "wedge": "and", "lor": "or", "vee": "or", "mid": "|",
    "vert": "|", "lvert": "|", "rvert": "|", "langle": "<(", "rangle": ")>", "lfloor": "lfloor", "rfloor": "rfloor",
    "lceil": "lceil", "rceil": "rceil", "lbrace": "{{", "rbrace": "}}", "colon": ":", "lbrack": "[", "rbrack": "]",
    "lparen": "(", "rparen": ")", "bullet": "*", "to": "->", "rightarrow": "->", "Rightarrow": "->", "implies": "->",
    "iff": "->", "Leftrightarrow": "->", "degree": "degree",
}  # fmt: skip
_CONJUNCTIONS = {"或": "or", "或者": "or", "且": "and"}
_SIGN_KINDS = {"**": "^", "=<": "<=", "=>": ">=", "<>": "!=", "≡": "==", "≅": "==", "∖": "minus", "≃": "~", "∼": "~"}


def clean(text: str, thousands: bool = True) -> str:
    """Unify notations, and remove commas between groups of three digits if `thousands`. Raises UnreadableError."""
    if len(text) > MAX_LENGTH:
        raise UnreadableError("the text is too long")
    text = _DOTS.sub(r" \\ldots ", plain(text).translate(_SIGNS).replace('\\"', '"').strip())
    if _RADIX.search(text):
        raise UnreadableError("a literal of a programming language")
    if not _ROWS.search(text) or r"\\begin" in text:
        text = _DOUBLED_BACKSLASH.sub(lambda _: "\\", text)
    for wrapper in _WRAPPERS:
        if text.startswith(wrapper + "("):
            text = text.removeprefix(wrapper)
    if text.startswith(("$", "-$")) and text.count("$") == 1:
        text = text.replace("$", r"\$")
    text = _notations(text)
    if "ldots" in text or "..." in text or ".(" in text:
        text = _REPEATING.sub(_overlined, text)
    text = _SCALED_DOLLARS.sub(lambda match: rf"\text{{{_SCALES[match[1].lower()]}}} \text{{USD}}", text)
    text = _CURRENCY.sub(_currency_last, text)
    text = _DOLLARS.sub(r"\\text{USD}", text).replace(r"\$", "").replace("€", r"\text{EUR}").replace("£", r"\text{GBP}")
    text = text.replace("¥}", "¤}").replace("¥", r"\text{¥}").replace("¤}", "¥}")
    text = _ROW_SPACE.sub(r"\1", _COLOUR.sub("", text))
    text = _INFIX.sub(lambda match: rf"\{_INFIX_COMMANDS[match[2]]}{{{match[1]}}}{{{match[3]}}}", text)
    text = _TYPESETTING.sub(" ", _FENCES.sub("", text))
    text = _DIGIT_GROUPS.sub(lambda match: match[1] + re.sub(r"\D", "", match[2]), text)
    if thousands:
        text = _COMMAS.sub(_thousands, text)
    text = _SPACE.sub(" ", text)
    text = _FONT.sub(_upright, text)
    text = _CONJUNCTION.sub(r" \1 ", text)
    text = _PER_CENT.sub("percent", _TIMES.sub(r" * ", text))
    return text.strip().rstrip("\\.,;:?。*_ \n").strip('*`" \n')


def _currency_last(match: re.Match[str]) -> str:
    """Return an amount followed by its factor (k, M, ...) and its currency."""
    factor = rf"\text{{{_SCALES[match[3].lower()]}}} " if match[3] else ""
    return rf"{match[2]} {factor}\text{{{_CURRENCIES[match[1]]}}}"


def _overlined(match: re.Match[str]) -> str:
    return rf"{match[1]}{match[2] or ''}\overline{{{match[3] or match[4] or match[5]}}}"


def _thousands(match: re.Match[str]) -> str:
    """Convert 1,234 to one number; to several numbers if it fills brackets, as in (1,100)."""
    prefix, suffix = match.string[: match.start()].rstrip(), match.string[match.end() :].lstrip()
    in_brackets = prefix.endswith(("(", "[", r"\{")) and _CLOSING.match(suffix)
    if in_brackets and ",0" not in match[1]:
        return match[1].replace(",", ", ")
    return match[1].replace(",", "")


def _notations(text: str) -> str:
    """Unify notations that differ between countries, LaTeX packages and programs."""
    if "begin" in text:
        text = _SYSTEM.sub("", text)
    if "_" in text:
        text = _COMBINATION.sub(_combination, text)
    if "^" in text:
        text = _TEMPERATURE_SCALE.sub(r"\\text{deg\1}", _DEGREE.sub(r"^\\circ ", text))
    text = _NUMBERS.sub(r"\\in \\mathbb{\1}", text)
    if "mathbb" in text:
        text = _SET_SIGN.sub(_signed_set, text)
    text = _EMPTY_GROUP.sub("", text)
    if "(" in text or "*" in text:
        text = _IMAGINARY.sub("i", _EULER.sub("e^", text))
        text = _INTERVAL.sub(lambda match: _INTERVAL_BRACKETS[match[1] or ""].format(match[2]), text)
        text = _FINITE_SET.sub(r"\\{\1\\}", text)
        text = _RATIONAL.sub(r"(\1/\2)", _MODULE.sub("", text))
    return text


def _combination(match: re.Match[str]) -> str:
    n, k = match[2] or match[3], match[5] or match[6]
    return rf"\binom{{{n}}}{{{k}}}" if match[4] == "C" else rf"\frac{{{n}!}}{{({n}-{k})!}}"


def _signed_set(match: re.Match[str]) -> str:
    sign = match[2] or {"+": "+", ">": "+", r"\gt": "+"}.get(match[3], "*" if "n" in match[3] else "0")
    return rf"\mathbb{{{match[1]}{sign}}}"


def _upright(match: re.Match[str]) -> str:
    """Return the content of a font command: a letter or function as it is, words as text."""
    content = match[1].strip()
    if len(content) == 1 or content in _WORDS or content.startswith("\\"):
        return f" {content} "
    return rf"\text{{{content}}}"


def tokens(text: str) -> list[Token]:
    """Split a cleaned text into tokens and an end token. Raises UnreadableError for too long numbers or nesting."""
    result: list[Token] = []
    depth, position = 0, 0
    while match := _TOKEN.match(text, position):
        spaced = match.start() < match.end() and text[match.start()].isspace()
        position = match.end()
        for token in _match_tokens(match, spaced, result):
            depth += (token.kind in "([{" or token.kind == "{{") - (token.kind in ")]}" or token.kind == "}}")
            if depth > MAX_DEPTH:
                raise UnreadableError("brackets are nested too deeply")
            result.append(token)
    return [*result, Token("end", "", True)]


def _match_tokens(match: re.Match[str], spaced: bool, previous: list[Token]) -> list[Token]:
    kind, text = match.lastgroup or "", ""
    if kind == "words":
        return _words(match["words"], spaced)
    if kind == "number":
        text = match["number"]
        mantissa, _, exponent = text.lower().partition("e")
        if len(mantissa) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_EXPONENT:
            raise UnreadableError("a number is too long")
        return [Token("number", text, spaced)]
    if kind == "environment":
        return [Token("begin" if match["fence"] == "begin" else "close", match["environment"], spaced)]
    if kind == "command":
        text = match["command"]
        if text in FUNCTIONS or text in GREEK:
            return [Token("name", text, spaced)]
        return [Token(_COMMAND_KINDS.get(text, "command"), text, spaced)]
    if kind == "escaped":
        text = match["escaped"]
        return [Token({"\\": "row", "{": "{{", "}": "}}", "|": "|"}.get(text, text), text, spaced)]
    if kind == "letters":
        return _letters(match["letters"], spaced, previous)
    return [Token(_SIGN_KINDS.get(match["sign"], match["sign"]), match["sign"], spaced)]


def _words(words: str, spaced: bool) -> list[Token]:
    inner = words.strip(" ,.;:()")
    if inner.lower() in ("and", "or", *_CONJUNCTIONS):
        return [Token(_CONJUNCTIONS.get(inner, inner.lower()), inner, spaced)]
    if not inner:
        return [Token(",", ",", spaced)] if "," in words else []
    if re.fullmatch(r"[-+]?\d+(?:\.\d+)?", inner):
        sign = [Token(inner[0], inner[0], spaced)] if inner[0] in "-+" else []
        return [*sign, Token("number", inner.lstrip("-+"), spaced)]
    return [Token("text", words.strip(), spaced)]


def _letters(run: str, spaced: bool, previous: list[Token]) -> list[Token]:
    """Split a run of letters into tokens: a known name, words, or letters that are multiplied."""
    if run in _WORDS or run.lower() in ("and", "or"):
        name = _NAMES.get(run, run.lower() if run.lower() in ("and", "or") else run)
        kind = {"and": "and", "or": "or", "cup": "cup", "Eq": "Eq"}.get(name, "name")
        return [Token(kind, name, spaced)]
    after_text = bool(previous) and previous[-1].kind == "text" and spaced
    after_number = bool(previous) and (
        previous[-1].kind in ("number", "}", ")")
        or (previous[-1].kind == "command" and previous[-1].text not in _LETTER_COMMANDS)
    )
    if run in ("U",) and spaced and previous and previous[-1].kind in (")", "]", "}}"):
        return [Token("cup", run, spaced)]
    if len(run) > 1 and (after_text or (after_number and is_unit(run))):
        return [Token("text", run, spaced)]
    if len(run) >= 4 or (len(run) > 1 and after_number and spaced):
        head = next((n for n in range(len(run), 1, -1) if run[:n] in FUNCTIONS), 0)
        if head and len(run) - head == 1:  # sinx
            return [Token("name", run[:head], spaced), Token("letter", run[head:], False)]
        return [Token("text", run, spaced)]
    if not run.isascii():
        return [Token("text", run, spaced)]
    return [Token("letter", letter, spaced and n == 0) for n, letter in enumerate(run)]
