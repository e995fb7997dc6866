import json

import pytest
from conftest import NEEDS_SHARED, SHARED, case

from rlora.rewards import shaping
from rlora.scoring.signatures import reward_function


@NEEDS_SHARED
def test_open_r1_format_cases() -> None:
    rows = [json.loads(line) for line in (SHARED / "graders" / "open_r1_format.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert shaping.think_answer(row["prediction"]) == row["expected"], row


BLOCKS = "<think>\n{}\n</think>\n<answer>\n{}\n</answer>"
EMPTY = ["", " ", "\n\t", "\u200b", "\xa0\u3000", "\u2800", "&nbsp;", "<b></b>", "<!-- so -->"]


BLANK = [  # text that LaTeX prints as nothing, or as signs that are not content
    "{}", "~", "$$", r"\,", r"\ \quad", r"\text{}", r"\mathrm{ }", r"\phantom{4}", r"\left.\right.", r"\hspace{1cm}",
    r"\emph{}", r"\operatorname{}", r"\ensuremath{}", r"\smash{}", r"\enspace", r"\label{x}", r"\color{red}",
    r"\rule{0pt}{0pt}", r"\rule[1pt]{0pt}{0pt}", r"\underline{\hspace{2cm}}", r"\(\)", r"\[\]",
    r"\begin{align}\end{align}", "%comment", "()", "...", "?", r"\begin{array}[t]{cc}\end{array}", r"\textcolor{red}{}",
    r"\color[rgb]{1,0,0}", r"\phantom{\frac{1}{2}}", r"\phantom 4", r"\hskip 1em", r"\kern-3pt", r"\mkern3mu",
    r"\vspace*{1cm}", r"\raisebox{2pt}{}", r"\makebox[2cm]{}", r"\hbox to 2cm{}", r"\frac{}{}", r"\sqrt{}",
    r"\sqrt[3]{}", r"\overline{}", r"\mathbf{\text{}}", r"\displaystyle", r"\ldots", r"\relax", r"\par",
    r"\mathstrut", r"\square", r"\\[2pt]", r"\href{http://x}{}", r"\fontsize{10}{12}", "[ ]", "\u2026", "\u25a1", "-",
    "\u2014", "*", "_", "+", r"\pm", r"\times", "\u00d7", "\u2212", "!", r"\%", "&nbsp;", "% 4\n", r"\unknown{}",
    r"{\bf }", r"\tag{1}", r"\ref{x}", r"\phantom{4",
]  # fmt: skip
CONTENT = [
    r"\emptyset", r"\{\}", r"\{ \}", r"\left\{\right\}", r"\infty", r"-\infty", r"\pi", r"\pi{}", r"\varnothing",
    r"\text{A}", "A", "4", "-4", "x+1", "\u221e", "\u2205", "\u03c0", "\u4e00", r"\mathbb{R}", r"\R",
    r"\textcolor{red}{4}", r"\color{red}4", r"\color{red}{4}", "50%", r"50\%", r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\begin{array}{c}[4]\end{array}", r"\frac{1}{2}", r"\sqrt[3]{5}", r"\hbox{no}", r"\left[1\right]", r"\alpha_i",
    r"\operatorname{cis}", r"\sin", "<", "=", r"\le", r"\%4", r"\phantom{4}5", r"\,x", r"\hskip 1em 4", r"4\\[2pt]",
    r"\#4", r"\$4",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nSo.\n</think>\nIt is 4.", 1.0),
        ("<think>So.</think>", 1.0),
        ("<think>It is 3 < 4, I think.</think>\n<answer>\n4\n</answer>", 1.0),
        ("<think>\nSo. It is 4.", 0.0),
        ("So.\n</think>\nIt is 4.", 0.0),
        ("First <think>so</think>", 0.0),
        ("<think>a<think>b</think></think>", 0.0),
        ("<think>a</think>b</think>", 0.0),
        ("<think>a</think>b<think>c</think>", 0.0),
        ("<think>a</think>b<think>c", 0.0),
        ("<think>a</think>b<THINK>c</THINK>", 0.0),
        ("<think>a</think>b</ think >", 0.0),
        ("<think>a<thinking>b</thinking></think>", 0.0),
        ("<think>a</think><think about='b'>", 0.0),
        ("<Think>So.</Think>It is 4.", 0.0),
        ("<think></think ></think>It is 4.", 0.0),
        *((f"<think>{blank}</think>It is 4.", 0.0) for blank in EMPTY),
    ],
)
def test_think_wants_one_block_at_the_start(text: str, expected: float) -> None:
    assert shaping.think(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BLOCKS.format("So.", "4"), 1.0),
        (BLOCKS.format("1 < 2 > 0", "\N{INFINITY}"), 1.0),
        (BLOCKS.format("a\n\nb", "x\ny"), 1.0),
        (BLOCKS.format("So.", "4\n</answer>\n<answer>\n5"), 0.0),
        (BLOCKS.format("So.", "4") + "\n<answer>\n5\n</answer>", 0.0),
        (BLOCKS.format("So.\n</think>\n<think>\nOr.", "4"), 0.0),
        (BLOCKS.format("<think>So.</think>", "4"), 0.0),
        (BLOCKS.format("So.", "<answer>4</answer>"), 0.0),
        (BLOCKS.format("So.", "<think>4</think>"), 0.0),
        (BLOCKS.format("So. <answer>4</answer>", "4"), 0.0),
        (BLOCKS.format("So. <ANSWER>", "4"), 0.0),
        (BLOCKS.format("So.", "4 < / answer >"), 0.0),
        (BLOCKS.format("So.", "4") + " as asked", 0.0),
        ("It is. " + BLOCKS.format("So.", "4"), 0.0),
        (BLOCKS.format("So.", "4").replace("</think>\n", "</think>\nHence\n"), 0.0),
        (BLOCKS.format("So.", "4").upper(), 0.0),
        *((BLOCKS.format(blank, "4"), 0.0) for blank in EMPTY),
        *((BLOCKS.format("So.", blank), 0.0) for blank in EMPTY),
        *((BLOCKS.format("So.", blank), 0.0) for blank in BLANK),
        *((BLOCKS.format("So.", content), 1.0) for content in CONTENT),
        *((BLOCKS.format("So.", rf"\boxed{{{blank}}}"), 0.0) for blank in BLANK),
        (BLOCKS.format("So.", r"\boxed{}"), 0.0),
        (BLOCKS.format("So.", r"\boxed{ }"), 0.0),
        (BLOCKS.format("So.", r"\boxed{4}"), 1.0),
        (BLOCKS.format("...", "4"), 0.0),
    ],
)
def test_think_answer_wants_one_block_of_each_kind(text: str, expected: float) -> None:
    assert shaping.think_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"<think>2 + 2</think> \boxed{4}", 1.0),
        (r"It is \boxed{4}.", 1.0),
        (r"\boxed {\frac{1}{2}}", 1.0),
        (r"\boxed{\{\}}", 1.0),  # the empty set
        (r"\boxed{\emptyset}", 1.0),
        (r"\boxed{\text{no}}", 1.0),
        (r"\boxed{\mbox{no}}", 1.0),
        (r"\boxed{\left[1, 2\right)}", 1.0),
        (r"<think>\boxed{4}</think> 4", 0.0),
        (r"<think>\boxed{4} 4", 0.0),
        (r"<THINK>\boxed{4}</THINK> 4", 0.0),
        (r"\boxed{4} <think>or 5", 0.0),
        (r"\boxed{3} \boxed{4}", 0.0),
        (r"\boxed{4} \boxed{}", 0.0),
        (r"\boxed{} \boxed {4}", 0.0),
        (r"\boxed{4} \fbox{5}", 0.0),
        (r"\boxed{\boxed{4}}", 0.0),
        (r"<think>\boxed{3}</think> \boxed{4}", 0.0),
        (r"\fbox{4}", 0.0),
        (r"\boxed{4", 0.0),
        (r"\boxed 4", 0.0),
        (r"\boxed", 0.0),
        (r"\boxed{}4}", 0.0),
        *((rf"\boxed{{{blank}}}", 0.0) for blank in EMPTY),
        *((rf"\boxed{{{blank}}}", 0.0) for blank in BLANK),
        *((rf"\boxed{{{content}}}", 1.0) for content in CONTENT),
    ],
)  # fmt: skip
def test_boxed_wants_one_box_after_all_thinking(text: str, expected: float) -> None:
    assert shaping.boxed(text) == expected


def test_lengths() -> None:
    assert [shaping.short(range(n), budget=4) for n in (0, 4, 8)] == [1.0, 1.0, 0.5]
    assert [shaping.cosine(range(n), budget=4) for n in (0, 2, 4, 9)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert shaping.shortest(["", "", ""], [range(2), range(4), range(3)]) == [0.5, -0.5, 0.0]
    assert shaping.shortest(["", ""], [range(2), range(2)]) == [0.0, 0.0]


def test_repetition() -> None:
    assert shaping.repeated("a b c d") == 1.0
    assert shaping.repeated("a b c a b c a b c", words=3) == pytest.approx(3 / 7)
    assert shaping.repeated("a") == 1.0


@pytest.mark.parametrize("name", ["think_answer", "think", "boxed", "short", "shortest", "repeated", "cosine"])
def test_each_function_loads_as_a_reward(name: str) -> None:
    function = reward_function(f"rlora.rewards.shaping:{name}", getattr(shaping, name))
    scores = function(case("one", "two three"), range(2))
    assert all(score.value is not None for score in scores), scores
