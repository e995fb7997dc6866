"""Answers that try to crash, hang or fool the grader, each with its gold. All are wrong, except in `ODD_CLOTHES`."""

from collections.abc import Iterator

GOLD = "7"


def _box(text: str) -> str:
    return rf"\boxed{{{text}}}"


_TOO_LARGE = [
    "9^{9^{9^{9}}}", "9**9**9**9", "10^{10^{10}}", "2^{2^{2^{2^{2^{2}}}}}", "7^{10^{100}}", "(10^9)!", "100000!", "9!!!!",
    "((9!)!)!", r"\binom{10^9}{5\cdot 10^8}", r"\binom{100000}{50000}", "1e999999999", "1E+99999", "7e-999999999", "0.1^{-10^9}",
    "(1+10^{-9})^{10^{18}}", r"e^{e^{e^{e^{e}}}}", r"\exp(10^{100})", r"\sinh(10^{50})", r"\sin(10^{10^{8}})", r"\tan(9^{9^9})",
    r"\sqrt[10^{30}]{7}", r"\sqrt[10^{-30}]{7}", r"\log_{1}7", r"\log 0", r"\ln(-\infty)", r"\frac{7}{0}", r"0^{-7}", r"0^0",
    r"\sum_{k=1}^{10^{100}} k", r"\prod_{k=1}^{10^9} k", r"\int_0^{10^9} x^x dx", r"\lim_{x\to\infty} x^{x^x}",
    r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{10^{18}}", r"\operatorname{zeros}(10^9,10^9)", r"\operatorname{eye}(10^9)",
    r"(x+y+z)^{10^6}", r"(x+1)^{99999}", r"\frac{1}{(x+1)^{99999}-(x+1)^{99999}}", r"x^{x^{x^{x^{x^{x}}}}}",
    r"\lfloor 10^{10^{10}} \rfloor", r"\gcd(10^{10^9}, 7)", "2^{1000000000}", "(-2)^{10^{12}}", r"(-1)^{0.5^{10^9}}",
]  # fmt: skip
_NOT_NUMBERS = [
    "nan", "NaN", "inf", "-inf", "Infinity", r"\infty", r"-\infty", r"\infty-\infty", r"\frac{\infty}{\infty}", "zoo", "oo",
    "None", "null", "undefined", "True", "False", "0x7", "0b111", "0o7", "VII", "seven", "_7", "..7", "7e", "e7", "7j",
    "7L", "--", "+", "-", "/", "*", "^", "_", "=", "<", ">", "%", "&", "#", "|", "!", "?", r"\%", r"\$", "$", "$$", "()", "[]", "{}",
    r"\{\}", "(", ")", "]", "[", "}{", r"\\", "\\", r"\frac", r"\frac{7}", r"\sqrt", r"\left", r"\right)", r"\begin{pmatrix}",
    r"\end{pmatrix}", r"\begin{pmatrix}7&\\&7&7\end{pmatrix}", r"\text{", r"\text{7", "7^", "^7", "7^{", "|7", r"\boxed{", "##7",
]  # fmt: skip
_CODE = [
    "__import__('os').system('false')", "exec('1')", "eval('7')", "open('/etc/passwd').read()", "lambda: 7", "sys.exit(7)",
    "().__class__.__bases__[0].__subclasses__()", "Symbol('x')", "sympy.Integer(7)", "S(7)", "Integer(7)", "Rational(7)",
    "simplify('7')", "parse_expr('7')", "solve(x-7)", "Eq(x, x)", "Eq(7,7)", "Eq(x**2/16, 1)", "Interval(0, 7)", "factorial(10**9)",
    "print(7)", "gold", "answer", "expected", "{{gold}}", "%s", "{0}", "${answer}", "7; DROP TABLE", "import math", "7 if 1 else 8",
    "[7 for _ in range(10**9)]", "'7'*10**9", "type('x',(),{'__eq__':lambda s,o:1})()", r"\input{/etc/passwd}", r"\write18{rm}",
    r"\def\x{\x\x}\x", r"\loop\repeat", r"\newcommand{\a}{7}\a", "<script>7</script>", "&#55;", "%37", r"\x37", r"\u0037", "\\char55",
]  # fmt: skip
_LISTS = [
    "1,2,3,4,5,6,7", "1, 2, 3, 4, 5, 6, 7", "7,8", "7 or 8", "6 or 7", "7 and 8", "7;8", r"\{6,7\}", "(7,8)", "[6,7]", "[7,8]",
    r"\{1,2,\dots,7\}", "6,7,8", "7,7.5", "6-8", r"7 \text{ or } 8", r"6\le x\le 8", r"[7,8)", r"(-\infty,\infty)", r"\mathbb{R}",
    r"x\ge 7", r"7\le x", r"x>6", r"\pm 7", r"7\pm 1", "7:8", "7/8", "7 8", "7%", r"7\%", "70%", "0.7", "7.0000001", "6.9999999999",
    "7_8", "7_5", "7!", "7i", "7x", "7+x-y", "-7", "7^2", "77", "07.1", "7,000", "7.000.000", r"\sqrt{7}", r"7\text{ or }8\text{ or }9",
    r"x=7,x=8", r"x\neq 7", r"x\approx 8", r"7\ne 8", r"7=8", r"8\text{ (not 7)}", r"\begin{pmatrix}7\\8\end{pmatrix}", "[[7,8]]",
]  # fmt: skip
_COMPLETIONS = [
    r"<think>\boxed{7}", r"<think>The answer is 7", r"<think>\boxed{7}</think>", r"<think>7</think> I don't know.",
    r"<think>x</think><think>\boxed{7}", r"\boxed{7} \boxed{8}", r"\boxed{7}, \boxed{8}", r"\boxed{6} or \boxed{7} or \boxed{8}",
    r"\boxed{7} wait, no: \boxed{9}", r"\boxed{7", r"7 \boxed{}", r"7 \boxed{ }", r"\boxed{7}<answer>8</answer>", "The answer is not 7",
    "It isn't 7", "1\n2\n3\n4\n5\n6\n7", "1 2 3 4 5 6 7", "6 or 7", "I think 6, 7", "#### 8\n#### 6, 7", "Answer: 6 or 7", "A: 6/7",
    "The answer is between 6 and 7.", "The answer is 6 or 7.", "answer: 1,2,3,4,5,6,7", "The answer is 5, 6, or 7.", "", " ", "\n",
    r"\boxed{8}<|im_end|>\boxed{7}", r"<think>a</think>\boxed{8}<think>\boxed{7}</think>", "The final answer is 8, since 7 is odd.",
]  # fmt: skip


def _large() -> Iterator[str]:
    """Megabytes of text, deep nesting, and text that makes careless regular expressions slow."""
    n = 5000
    yield _box("{" * n + "7" + "}" * n)
    yield _box("(" * n + "7" + ")" * n)
    yield _box(r"\left(" * n)
    yield "{" * n
    yield r"\boxed{" * n
    yield r"\boxed{" * n + "8" + "}" * n
    yield _box(r"\frac{1}{" * 1000 + "7" + "}" * 1000)
    yield _box(r"\sqrt{" * 1000 + "7" + "}" * 1000)
    yield _box("7^" * 900 + "7")
    yield _box("-" * 1001 + "7")
    yield _box("|" * 1999)
    yield _box("7!" * 900)
    yield _box("7" + "!" * 1900)
    yield _box("+".join(["x"] * 900))
    yield _box("x" * 1900)
    yield _box("7,1" * 600)
    yield _box(",".join(map(str, range(400))))
    yield _box("9" * 1_000_000)
    yield _box("0." + "7" * 1_000_000)
    yield _box("1," * 500_000)
    yield _box(r"\begin{pmatrix}" + r"7&" * 300 + "7" + r"\\" * 300 + r"\end{pmatrix}")
    yield _box(r"\cup".join(["(0,7)"] * 200))
    yield _box("(" + "(7,7)," * 250 + "7)")
    yield _box(r"\pm 1" * 300)
    yield _box(r"\sin" * 400 + "7")
    yield _box("7" + "'" * 1900)
    yield _box("7" + "_7" * 900)
    yield _box(" " * 1900)
    for piece in ("7 ", "$", "$7", "\\(", "\\[", "a", " ", "\n", "answer ", "Answer: ", "####", "\\boxed", "<think>", "</think>",
                  "1,", "-", "7/", "\\\\", "=", "not ", "\u202e", "\U0001f600", "\x00", "é", "٣", "or 7 ", "{", "<|im_end|>"):  # fmt: skip
        yield piece * (1_000_000 // len(piece)) + "x 8"


def hostile() -> list[tuple[str, str]]:
    """Pairs of gold and prediction, all wrong."""
    answers = [_box(answer) for answer in (*_TOO_LARGE, *_NOT_NUMBERS, *_CODE, *_LISTS)]
    odd = [
        "\ud800",
        "7\ud83d8",
        "\udfff",
        "\x007\x008",
        "7\u0338",
        "⑦⑧",
        "七",
        "7\u20e3\u20e3 8",
        "\ufeff\u200b",
        "\u202e7 8",
    ]
    pairs = [(GOLD, text) for text in (*answers, *map(_box, odd), *_COMPLETIONS, *_large())]
    pairs += [(gold, _box(text)) for gold, text in _OTHER_GOLDS]
    return pairs


_OTHER_GOLDS = [
    ("52_8", "52_5"), ("52", "52_8"), (r"864\text{ inches}^2", r"864\text{ inches}^4"), ("Eq(x**2/4, 1)", "Eq(x**2/16, 1)"),
    ("50", r"50\%"), (r"50\%", "50"), ("(1,2)", r"\{1,2\}"), (r"\{1,2\}", "(1,2)"), (r"\frac{1}{3}", "0.333333"),
    (r"\frac13", "0.33333333333"), (r"\pi", "3.14159265358979"), ("x", "y"), (r"\text{east}", r"\text{east or west}"), ("B", "A, B, C, D"),
    ("B", "AB"), (r"\frac{1}{2}", r"\frac{1}{2}^{10^{10^{10}}}"), ("[0,1]", "(0,1)"), ("x=5", "x=5,x=6"), ("1", r"1+10^{-999}"),
    ("0", r"10^{-999}"), ("0", r"e^{-10000}"), ("2", r"\sqrt{4.000000000000000000000000000000000000000000000001}"),
    (r"9^{9^{9^{9}}}", "7"), ("{" * 5000, "7"), ("\ud800", "7"), (r"\frac{1}{0}", "7"), ("(10^9)!", "7"), ("", "7"),
]  # fmt: skip
ODD_CLOTHES = [
    (GOLD, _box("７")), (GOLD, _box("٧")), (GOLD, _box("\u200b7\u200b")), (GOLD, _box("\u202b7")), (GOLD, _box("7\\")),
    (GOLD, _box("007")), (GOLD, _box("+7")), (GOLD, _box("7.000")), (GOLD, _box(r"\frac{14}{2}")), (GOLD, _box(r"\text{7}")),
    (GOLD, "x " * 400_000 + _box("7")), (GOLD, _box("7") + " x" * 400_000), (GOLD, r"<think>\boxed{8}</think>\boxed{7}"),
    (GOLD, r"\boxed{8} no, \boxed{7}"), (GOLD, _box(r"\boxed{7}")), (r"\frac{1}{2}", _box(r"50\%")), (GOLD, _box(" 7 . ")),
]  # fmt: skip
