"""LaTeX and plain mathematics, cut into tokens. Bounded before anything else reads it. Stdlib only."""

# ruff: noqa: RUF001 - signs of other scripts are what it is about

import re
from typing import NamedTuple

from .exact import MAX_DIGITS, MAX_EXPONENT, plain
from .units import is_unit

MAX_LENGTH = 2000  # characters of an answer
MAX_DEPTH = 40  # of brackets within brackets


class UnreadableError(ValueError):
    """A text over the bounds, or one that is no mathematics."""


class Token(NamedTuple):
    """`kind` is number, letter, name (a function, a constant), text (words), command, or the sign itself."""

    kind: str
    text: str
    spaced: bool  # whether a space stands before it


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
_NAMES |= {"factorial": "factorial", "Union": "Union"}  # of programs
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

_DOUBLED = re.compile(r"\\\\(?=[a-zA-Z(){}\[\]$%,;!])")
_ROWS = re.compile(r"\\begin\s*\{(?:[pbvBV]?(?:small)?matrix|array|cases|aligned?|gathered)\*?\}")
_FENCES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![a-zA-Z])\s*(?:\.(?!\d))?")
_SPACING = re.compile(
    r"\\(?:displaystyle|textstyle|limits|nolimits|boldsymbol|bm|rm|bf|it|tt|small|large|Large|mathstrut|strut|ensuremath|fbox|boxed)(?![a-zA-Z])|\$|(?<!\\)\\[()\[\]]"
    r"|\\label\{[^{}]*\}|\\phantom\{[^{}]*\}|\\hspace\*?\{[^{}]*\}"
)
_SPACE = re.compile(r"(?<!\\)\\[,;:!>\s]|\\q?quad|\\(?:enspace|thinspace|medspace)(?![a-zA-Z])|~|\\\Z")
_DOTS = re.compile(r"\\(?:[cl]dots|dots[bcmoi]?)(?![a-zA-Z])|(?<!\.)\.\.\.(?=.)|…(?=.)")
_RADIX = re.compile(r"(?<![\w.])0[xXbBoO][0-9a-fA-F]")
_FONT = re.compile(r"\\(?:mathrm|operatorname\*?|mathbf|mathit|mathsf|mathcal|mathfrak)\s*\{([^{}]*)\}")
_TAKING = ("frac", "dfrac", "tfrac", "cfrac", "binom", "triangle", "angle")  # commands that letters follow
_OVER = re.compile(r"\{([^{}]*)\\(over|choose)(?![a-zA-Z])([^{}]*)\}")
_ROW_SPACE = re.compile(r"(\\\\)\s*\[\s*[\d.]+\s*(?:pt|em|ex|cm|mm)\s*\]")
_COLOUR = re.compile(r"\\color\s*\{[^{}]*\}|\\textcolor\s*\{[^{}]*\}(?=\s*\{)")
_GROUPS = re.compile(r"(?<![\d.])(\d{1,3})((?:(?:(?:\\!\s?)?,\s?\\!\s?|\{,\}\s?|\\[,;:! ]|~|\s)\d{3})+)(?![\d{])")
_OVERS = {"over": "frac", "choose": "binom"}
_COMMAS = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:,\d{3})+)(?![\d,]*\d)")
_CLOSING = re.compile(r"(?:\^\s*\{?\s*\\circ\s*\}?|\\pi|\s)*(?:[)\]]|\\\})")
_CURRENCIES = {r"\$": "USD", "€": "EUR", "£": "GBP", "¥": "¥"}  # ¥ is a yuan, or a yen
_CURRENCY = re.compile(
    r"(\\\$|[€£¥])\s*(-?(?:\d|,\\!\s?|\{,\}|,(?=\d)|\.(?=\d))+)(?:\s*(?:\\text\s*\{\s*)?(k|K|M|m|B|b|T)(?![a-zA-Z])\s*\}?)?"
)
_DOLLARS = re.compile(r"(?<=[\d}])\s*\\\$(?!\s*[\d\\])")
_SCALED = re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*)?([kKmMbB])\s?\\?\$\s*\}?")
_SCALES = {"k": "thousand", "m": "million", "b": "billion", "t": "trillion"}
_JOINED = re.compile(r"(?<=[\d)}\]])\s*(and|or)(?=[A-Z\\($-])")
PERCENT = r"(?:per[\s-]?cent|pct)"
_PER_CENT = re.compile(r"\bper[\s-]+cent\b", re.IGNORECASE)
_TIMES = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
_WRAPPERS = ("np.array", "numpy.array", "sympy.Matrix", "sp.Matrix", "Matrix", "array")

_SYSTEM = re.compile(r"\\(?:left\s*)?\\\{\s*(?=\\begin\s*\{(?:array|aligned|cases|matrix|gathered)\})")
_CHOSEN = re.compile(
    r"(?:\{\s*\})?\s*([_^])\s*(?:\{(\w+)\}|(\w))\s*(?:\\(?:mathrm|text)\s*\{\s*)?([CP])\}?\s*_\s*(?:\{(\w+)\}|(\w))"
)
_DEGREES = re.compile(r"(?<=[\d})])\s*\^\s*(?:\{\s*)?(?:\\(?:text|mathrm)\s*\{\s*)?[oO](?:\s*\})*(?![a-zA-Z(])")
_SCALE = re.compile(r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\(?:text|mathrm|rm)\s*\{?\s*)?([CF])(?![a-zA-Z])\s*\}?")
_SET_SIGN = re.compile(
    r"\\mathbb\s*\{?\s*([NZQRC])\s*\}?\s*(?:\^\s*\{?\s*([+*-])\s*\}?|_\s*\{?\s*(>|\\gt|\\ge[q]?|\+|\\neq?)\s*0?\s*\}?)"
)
_NUMBERS = re.compile(r"\\in\s*([RZNQC])(?![a-zA-Z(])")
_REPEATING = re.compile(  # 0.333..., 0.0909..., 0.(3)
    r"(?<![\d.])(\d+\.)(?:(\d{0,9}?)(?:(\d)\3{2,}|(\d{2,4}?)\4+)\s*(?:\\ldots|\.\.\.|…)|\((\d+)\))(?![\d.,]|\s*[,\d])"
)
_MODULE = re.compile(r"\b(?:np|numpy|sp|sympy|math)\.(?=[a-zA-Z])")
_NOTHING = re.compile(r"(?<![a-zA-Z}\\])\{\s*\}\s*(?=[\^_])")
_IMAGINARY = re.compile(r"(?<=\*)\s*I(?![a-zA-Z(])|(?<![a-zA-Z\\])I(?=\s*\*)")
_NATURAL = re.compile(r"(?<![a-zA-Z\\])E\s*\*\*")
_INTERVAL = re.compile(r"\bInterval(?:\.(open|Lopen|Ropen))?\(([^()]*,[^()]*)\)")
_OPEN = {"": "[{}]", "open": "({})", "Lopen": "({}]", "Ropen": "[{})"}
_FINITE = re.compile(r"\bFiniteSet\(([^()]*)\)")
_PROGRAM = re.compile(r"\b(?:Rational|Fraction)\(([^(),]*),([^(),]*)\)")

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
_RELATED = {
    "leq": "<=", "le": "<=", "leqslant": "<=", "geq": ">=", "ge": ">=", "geqslant": ">=", "lt": "<", "gt": ">",
    "neq": "!=", "ne": "!=", "approx": "~", "simeq": "~", "sim": "~", "equiv": "==", "in": "in", "cong": "==",
    "times": "*", "cdot": "*", "ast": "*", "div": "/", "pm": "pm", "mp": "mp", "cup": "cup", "cap": "cap",
    "setminus": "minus", "backslash": "minus", "land": "and", "wedge": "and", "lor": "or", "vee": "or", "mid": "|",
    "vert": "|", "lvert": "|", "rvert": "|", "langle": "<(", "rangle": ")>", "lfloor": "lfloor", "rfloor": "rfloor",
    "lceil": "lceil", "rceil": "rceil", "lbrace": "{{", "rbrace": "}}", "colon": ":", "lbrack": "[", "rbrack": "]",
    "lparen": "(", "rparen": ")", "bullet": "*", "to": "->", "rightarrow": "->", "Rightarrow": "->", "implies": "->",
    "iff": "->", "Leftrightarrow": "->", "degree": "degree",
}  # fmt: skip
_JOINTS = {"或": "or", "或者": "or", "且": "and"}
_SIGN_KINDS = {"**": "^", "=<": "<=", "=>": ">=", "<>": "!=", "≡": "==", "≅": "==", "∖": "minus", "≃": "~", "∼": "~"}


def clean(text: str, thousands: bool = True) -> str:
    """One spelling of what has several; commas that group digits by three go where `thousands`. Checks the bounds."""
    if len(text) > MAX_LENGTH:
        raise UnreadableError("too long")
    text = _DOTS.sub(r" \\ldots ", plain(text).translate(_SIGNS).replace('\\"', '"').strip())
    if _RADIX.search(text):
        raise UnreadableError("a literal of a programming language")
    if not _ROWS.search(text) or r"\\begin" in text:
        text = _DOUBLED.sub(lambda _: "\\", text)
    for wrapper in _WRAPPERS:
        if text.startswith(wrapper + "("):
            text = text.removeprefix(wrapper)
    if text.startswith(("$", "-$")) and text.count("$") == 1:
        text = text.replace("$", r"\$")
    text = _notations(text)
    if "ldots" in text or "..." in text or ".(" in text:
        text = _REPEATING.sub(_overlined, text)
    text = _SCALED.sub(lambda found: rf"\text{{{_SCALES[found[1].lower()]}}} \text{{USD}}", text)
    text = _CURRENCY.sub(_behind, text)
    text = _DOLLARS.sub(r"\\text{USD}", text).replace(r"\$", "").replace("€", r"\text{EUR}").replace("£", r"\text{GBP}")
    text = text.replace("¥}", "¤}").replace("¥", r"\text{¥}").replace("¤}", "¥}")
    text = _ROW_SPACE.sub(r"\1", _COLOUR.sub("", text))
    text = _OVER.sub(lambda found: rf"\{_OVERS[found[2]]}{{{found[1]}}}{{{found[3]}}}", text)
    text = _SPACING.sub(" ", _FENCES.sub("", text))
    text = _GROUPS.sub(lambda found: found[1] + re.sub(r"\D", "", found[2]), text)
    if thousands:
        text = _COMMAS.sub(_thousands, text)
    text = _SPACE.sub(" ", text)
    text = _FONT.sub(_upright, text)
    text = _JOINED.sub(r" \1 ", text)
    text = _PER_CENT.sub("percent", _TIMES.sub(r" * ", text))
    return text.strip().rstrip("\\.,;:?。*_ \n").strip('*`" \n')


def _behind(found: re.Match[str]) -> str:
    """An amount with its currency behind it, and what a letter there multiplies it by."""
    times = rf"\text{{{_SCALES[found[3].lower()]}}} " if found[3] else ""
    return rf"{found[2]} {times}\text{{{_CURRENCIES[found[1]]}}}"


def _overlined(found: re.Match[str]) -> str:
    return rf"{found[1]}{found[2] or ''}\overline{{{found[3] or found[4] or found[5]}}}"


def _thousands(found: re.Match[str]) -> str:
    """1,234 as a number; all that stands in brackets, as (1,100), as several."""
    before, behind = found.string[: found.start()].rstrip(), found.string[found.end() :].lstrip()
    in_brackets = before.endswith(("(", "[", r"\{")) and _CLOSING.match(behind)
    if in_brackets and ",0" not in found[1]:
        return found[1].replace(",", ", ")
    return found[1].replace(",", "")


def _notations(text: str) -> str:
    """One sign for what countries, packages and programs write in several ways."""
    if "begin" in text:
        text = _SYSTEM.sub("", text)
    if "_" in text:
        text = _CHOSEN.sub(_choice, text)
    if "^" in text:
        text = _SCALE.sub(r"\\text{deg\1}", _DEGREES.sub(r"^\\circ ", text))
    text = _NUMBERS.sub(r"\\in \\mathbb{\1}", text)
    if "mathbb" in text:
        text = _SET_SIGN.sub(_signed_set, text)
    text = _NOTHING.sub("", text)
    if "(" in text or "*" in text:
        text = _IMAGINARY.sub("i", _NATURAL.sub("e^", text))
        text = _INTERVAL.sub(lambda found: _OPEN[found[1] or ""].format(found[2]), text)
        text = _FINITE.sub(r"\\{\1\\}", text)
        text = _PROGRAM.sub(r"(\1/\2)", _MODULE.sub("", text))
    return text


def _choice(found: re.Match[str]) -> str:
    n, k = found[2] or found[3], found[5] or found[6]
    return rf"\binom{{{n}}}{{{k}}}" if found[4] == "C" else rf"\frac{{{n}!}}{{({n}-{k})!}}"


def _signed_set(found: re.Match[str]) -> str:
    sign = found[2] or {"+": "+", ">": "+", r"\gt": "+"}.get(found[3], "*" if "n" in found[3] else "0")
    return rf"\mathbb{{{found[1]}{sign}}}"


def _upright(found: re.Match[str]) -> str:
    """What a font command holds: a letter or a function as such, words as text."""
    inner = found[1].strip()
    if len(inner) == 1 or inner in _WORDS or inner.startswith("\\"):
        return f" {inner} "
    return rf"\text{{{inner}}}"


def tokens(text: str) -> list[Token]:
    """The tokens of a cleaned text, with an end. Raises UnreadableError for numbers and nesting over the bounds."""
    found: list[Token] = []
    depth, at = 0, 0
    while match := _TOKEN.match(text, at):
        spaced = match.start() < match.end() and text[match.start()].isspace()
        at = match.end()
        for token in _kinds(match, spaced, found):
            depth += (token.kind in "([{" or token.kind == "{{") - (token.kind in ")]}" or token.kind == "}}")
            if depth > MAX_DEPTH:
                raise UnreadableError("too deep")
            found.append(token)
    return [*found, Token("end", "", True)]


def _kinds(match: re.Match[str], spaced: bool, before: list[Token]) -> list[Token]:
    kind, text = match.lastgroup or "", ""
    if kind == "words":
        return _words(match["words"], spaced)
    if kind == "number":
        text = match["number"]
        mantissa, _, exponent = text.lower().partition("e")
        if len(mantissa) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_EXPONENT:
            raise UnreadableError("a number too long")
        return [Token("number", text, spaced)]
    if kind == "environment":
        return [Token("begin" if match["fence"] == "begin" else "close", match["environment"], spaced)]
    if kind == "command":
        text = match["command"]
        if text in FUNCTIONS or text in GREEK:
            return [Token("name", text, spaced)]
        return [Token(_RELATED.get(text, "command"), text, spaced)]
    if kind == "escaped":
        text = match["escaped"]
        return [Token({"\\": "row", "{": "{{", "}": "}}", "|": "|"}.get(text, text), text, spaced)]
    if kind == "letters":
        return _letters(match["letters"], spaced, before)
    return [Token(_SIGN_KINDS.get(match["sign"], match["sign"]), match["sign"], spaced)]


def _words(words: str, spaced: bool) -> list[Token]:
    inner = words.strip(" ,.;:()")
    if inner.lower() in ("and", "or", *_JOINTS):
        return [Token(_JOINTS.get(inner, inner.lower()), inner, spaced)]
    if not inner:
        return [Token(",", ",", spaced)] if "," in words else []
    if re.fullmatch(r"[-+]?\d+(?:\.\d+)?", inner):
        sign = [Token(inner[0], inner[0], spaced)] if inner[0] in "-+" else []
        return [*sign, Token("number", inner.lstrip("-+"), spaced)]
    return [Token("text", words.strip(), spaced)]


def _letters(run: str, spaced: bool, before: list[Token]) -> list[Token]:
    """A known name, words, or letters that are multiplied."""
    if run in _WORDS or run.lower() in ("and", "or"):
        name = _NAMES.get(run, run.lower() if run.lower() in ("and", "or") else run)
        kind = {"and": "and", "or": "or", "cup": "cup", "Eq": "Eq"}.get(name, "name")
        return [Token(kind, name, spaced)]
    after_text = bool(before) and before[-1].kind == "text" and spaced
    after_number = bool(before) and (
        before[-1].kind in ("number", "}", ")") or (before[-1].kind == "command" and before[-1].text not in _TAKING)
    )
    if run in ("U",) and spaced and before and before[-1].kind in (")", "]", "}}"):
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
