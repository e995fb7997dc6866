"""Finding the answer: choices, headings and checks, formats, scripts, long and empty golds."""

# ruff: noqa: E501, RUF001 - whole completions, and signs of other scripts

from typing import Any

import pytest

from rlora.records import RloraError
from rlora.rewards.equivalence import grade, math_answer
from rlora.rewards.math.answer import find_gold

RIGHT = {  # gold | completion; \n is a line break
    "a letter with decoration": r"""
        C | option C is correct
        C | Option C is correct.
        C | So the correct option is C.
        C | \boxed{\text{Option C}}
        C | \boxed{\text{option (C)}}
        C | \boxed{\text{Choice C}}
        C | \boxed{\text{Answer: C}}
        C | \boxed{\text{The correct answer is C}}
        C | \boxed{\textbf{(C)}}
        C | \boxed{\mathbf{(C)}}
        C | \boxed{\mathbf{C}}
        C | \boxed{\textbf{C}}
        C | \boxed{\textbf{(C)}\ 42}
        C | \boxed{\textbf{(C) } 42}
        C | \boxed{\mathrm{C}}
        C | \boxed{C)}
        C | \boxed{C:}
        C | \boxed{[C]}
        C | \boxed{C. 42}
        C | \boxed{C.\ 42}
        C | \boxed{C) 42}
        C | \boxed{C: 42}
        C | \boxed{\text{C: } 42}
        C | \boxed{C \text{ (42)}}
        C | \boxed{42 \text{ (C)}}
        C | \boxed{C. \text{Both A and B}}
        C | \boxed{(C)\ 3\pi}
        C | C
        C | (C)
        C | **C**
        C | `C`
        C | C) 42
        C | The answer is C.
        C | The answer is (C).
        C | The answer is **C**.
        C | The answer is $C$.
        C | The answer is $\text{(C)}$.
        C | The answer is option C.
        C | The correct answer is C. 42 apples are left.
        C | The best answer is choice (C).
        C | The answer must be C.
        C | I choose C.
        C | Therefore, I would go with option C.
        C | A is too small and B too large. Therefore, C.
        C | It follows that the statement holds. Hence, the answer is C: both A and B are true.
        C | Only C is correct.
        C | C is the correct answer.
        C | Answer: C\n\nOption A fails since 2 < 3, option B fails since 5 > 4.
        C | **Answer: C**
        C | **Answer:** C) 42
        C | Final answer: C
        C | x = 42, which is option C.
        C | The value is 42.\n\n(C) 42
        C | Ｃ
        C | 选项C
        C | 选C
        C | 选 C。
        C | 故选C。
        C | 故选：C.
        C | 综上，①③正确，故选 C.
        C | 所以选择C
        C | 答案是C
        C | 答案：C
        C | 正确答案是C。
        C | 正确答案为：C
        C | 因此正确选项是C。
        C | 故答案选C。
        C | C项正确
        C | 【答案】C
        C | 答えはC
        C | 答えは(C)です。
        C | 正解はCです。
        C | 選択肢C
        ウ | 答えはウ
        ウ | 答えはウです。
        ウ | 正解：ウ
        ウ | \boxed{ウ}
        ウ | 答えは(ウ)
        D | The needed condition is\n\[ \boxed{\langle H\rangle \ll \Delta E} \]\nso only the fourth statement holds.\n\n**Answer: D**
        D | So \boxed{x = 5}, and the correct option is D.
        D | 因此 $\boxed{x>5}$，故选D。
        B | Therefore \boxed{\frac{1}{2}}. The answer is (B).
        (C) | \boxed{C}
        \text{(C)} | The answer is C.
        C. 42 | \boxed{C}
        \textbf{(C)}\ 42 | \boxed{C}
        ACD | \boxed{A, C, D}
        ACD | \boxed{ACD}
        ACD | \boxed{\text{A, C, and D}}
        ACD | \boxed{A,C,D}
        ACD | \boxed{A\ C\ D}
        ACD | \boxed{D, C, A}
        ACD | \boxed{\text{(A), (C), (D)}}
        ACD | \boxed{A、C、D}
        ACD | The answer is A, C and D.
        ACD | 故选ACD。
        ACD | 故选A、C、D
        A, C, D | \boxed{ACD}
        A,C | \boxed{AC}
        AC | \boxed{A \text{ and } C}
        ②③ | Statements 2 and 3 are true, so the answer is $\boxed{2, 3}$.
        ②③ | \boxed{②③}
        ②③ | \boxed{②, ③}
        ②③ | \boxed{②、③}
        ②③ | \boxed{3, 2}
        ②③ | \boxed{2 \text{ and } 3}
        ②③ | \boxed{(2)(3)}
        ②③ | \boxed{(2), (3)}
        ②③ | 答案是②③。
        ①③④ | \boxed{①③④}
        ② | \boxed{2}
        2, 3 | \boxed{②③}
        A | \boxed{A}
        A | The answer is $A$.
        E | \boxed{E}
    """,
    "a heading or check behind": r"""
        12 | The answer is 12. To verify the answer: 12/3 = 4
        12 | The answer is 12. To verify the answer: 12/3 = 4, as required.
        12 | The answer is 12. Let me check the answer: 12 - 5 = 7.
        12 | The answer is 12.\n\n**Verification of the answer:** 12/3 = 4
        12 | The answer is 12.\n\nTo verify that the answer is correct: 12/3 = 4.
        12 | The answer is 12. The answer is correct because 12/3 = 4.
        12 | The answer is 12 (check: 12/3 = 4).
        12 | She has 12 left. Checking the answer: 12 - 5 = 7, which matches the first day.
        12 | She has 12 left. Checking: 12 - 5 = 7.
        12 | She has 12 left. Check: 12 - 5 = 7.
        12 | She has 12 left.\n\nCheck: 12 - 5 = 7. So it works.
        12 | She has 12 left.\n\nVerification:\n12 - 5 = 7 ✓
        12 | She has 12 left.\n\n**Verification:**\n\n12 - 5 = 7
        12 | She has 12 left. To verify: 12 - 5 = 7
        12 | She has 12 left. We can verify this: 12 - 5 = 7, as it should.
        12 | She has 12 left. Let's double-check: 12 - 5 = 7.
        12 | She has 12 left.\n\nProof: 12 - 5 = 7.
        12 | So x = 12.\n\n**Step 3: Verify**\n12/3 = 4
        12 | So x = 12.\n\n### Step 4: Check\n12/3 = 4, and 4 + 3 = 7.
        12 | So x = 12.\n\n#### 4. Verification\n12/3 = 4
        42 | #### 1. Set up\nLet x be the number of stamps.\n\n#### 2. Solve\nx + 4 = 46, so x = 42.\n\n#### 3. Final Answer\n**42**
        42 | #### 1. Set up\nx + 4 = 46\n\n#### 2. Solve\nx = 42
        42 | ### Step 1\nx + 4 = 46\n\n### Step 2\nx = 42
        42 | #### Step 1: Set up\nx + 4 = 46\n\n#### Step 2: Solve\nx = 42.
        42 | #### 3. Final Answer\n**42**
        42 | #### 3) Final answer\n\n$42$
        42 | #### **3. Final Answer**\n\nThe stamps number 42.
        42 | ### 3. Answer\n42
        42 | **3. Final Answer**\n\n42
        42 | ## 2. Conclusion\nThere are 42 stamps.
        42 | x + 4 = 46\n#### 42
        42 | x + 4 = 46\n#### 42 stamps
        42 | x + 4 = 46\n#### $42
        42 | x + 4 = 46\n#### **42**
        42 | x + 4 = 46\n\n#### 42\n\nHope that helps with question 3!
        42 | There are 42 stamps. Note that 43 would be too many.
        42 | There are 42 stamps.\n\nNote: 43 is odd.
        42 | There are 42 stamps.\n\nP.S. This took 3 steps.
        42 | We have 6 boxes. Note that each holds 7. The total is 42.
        42 | First 6 * 5 = 30. Let's check: 30 / 5 = 6. Now add 12: 30 + 12 = 42.
        42 | Let me check the options: 41 is odd, 43 is odd, 42 works. So it's 42.
    """,
    "formats of other trainers": r"""
        42 | <start_working_out>6 * 7 = 42<end_working_out><SOLUTION>42</SOLUTION>
        42 | <start_working_out>6 * 7 = 42, 3 more<end_working_out>\n<SOLUTION>\n42\n</SOLUTION>
        42 | <reasoning>6 * 7 = 42</reasoning>\n<answer>42</answer>
        42 | <reasoning>\n6 * 7 = 42\n</reasoning>\n<answer>\n42\n</answer>\n
        42 | <ANSWER>42</ANSWER>
        42 | <answer> $\boxed{42}$ </answer>
        42 | <answer>The answer is 42</answer>
        42 | <answer>42
        42 | <think>40</think><answer>42</answer>
        42 | <final_answer>42</final_answer>
        42 | <final answer>42</final answer>
        42 | <output>42</output>
        42 | <solution>42</solution>
        42 | <result>42</result>
        42 | <ans>42</ans>
        42 | <|begin_of_thought|>6 * 8 = 48<|end_of_thought|><|begin_of_solution|>6 * 7 = 42. The answer is 42.<|end_of_solution|>
        42 | <|begin_of_thought|>6 * 8 = 48<|end_of_thought|>\n\n<|begin_of_solution|>\n\n\boxed{42}\n\n<|end_of_solution|>
        42 | <|begin_of_solution|>42<|end_of_solution|>
        42 | <|channel|>analysis<|message|>6 * 8 = 48<|end|><|start|>assistant<|channel|>final<|message|>42<|return|>
        42 | 【答案】42
        42 | 【解答】6乘7等于42\n【答案】42
        42 | [ANSWER] 42 [/ANSWER]
        42 | [ANSWER]42[/ANSWER]
        42 | [[ ## answer ## ]]\n42\n\n[[ ## completed ## ]]
        42 | FINAL ANSWER: 42
        42 | Final Answer: The final answer is $42$. I hope it is correct.
        42 | The final answer is: $\boxed{42}$. I hope it is correct.
        42 | Answer - 42
        42 | Answer – 42
        42 | Answer = 42
        42 | Answer: -> 42
        42 | Ans: 42
        42 | **Final Answer:** 42
        42 | **Final Answer**: 42
        42 | **Final Answer**\n\n42\n\nLet me know if you need the 3 steps.
        42 | ### Answer\n42
        42 | ### Answer\n42\n\n### Notes\nThere are 3 ways.
        42 | ## Final Answer\n\n$$42$$
        42 | Final answer\n\n42
        42 | Final answer\n42 stamps\n\nThis used 2 steps.
        42 | {"reasoning": "6 * 7", "answer": 42}
        42 | {"answer": "42"}
        42 | ```json\n{"answer": "42", "steps": 3}\n```
        42 | 答:42
        42 | 答：42
        42 | 答案:42
        42 | 答案：42
        42 | **答案**：42
        42 | **答案：** 42
        42 | 最终答案是42。
        42 | 故答案为：42.
        42 | 答えは42です。
        42 | 答え：42
        42 | 【答え】42
        42 | 정답은 42입니다.
        42 | 답: 42
        42 | **Antwort:** 42
    """,
    "a number behind a character": r"""
        18 | 小明还剩下18元。
        36 | よって、求める数は36です。
        18 | 一共有18个苹果。
        18 | 所以还剩18人
        18 | 答：小明还剩18元。
        18 | 答案是18元。因为20-2=18，而3不是。
        500 | 合計で500円になります。
        1200 | 総額は1,200円です。
        3.5 | 每人分得3.5升。
        -5 | 所以x等于-5。
        -5 | 所以气温是−5度。
        1/3 | 概率是1/3。
        30000 | 一共是3万元。
        30000 | 答案是3万。
        3万 | \boxed{30000}
        35000 | 一共3万5千元。
        200000000 | 人口は2億人です。
        30\% | 占总数的30%。
        30\% | 增长了百分之30。
        1/3 | 確率は3分の1です。
        42 | 남은 사탕은 42개입니다.
        42 | 정답은42개
        1,2 | 所以方程的解是1和2。
    """,
    "prose": r"""
        26 | So Tom has 26 more marbles than Ann, who has 24 marbles.
        8 | Each of the 3 friends therefore gets 8 of the 24 sweets.
        7 | The answer is 7 apples.
        90 | The film takes 90 minutes or 1.5 hours, so the answer is 90.
        90 | The answer is 90 minutes or 1.5 hours.
        7 | The answer is 7, not 8.
    """,
}
WRONG = {
    "a letter with decoration": r"""
        B | \boxed{B. or C.}
        C | \boxed{B. or C.}
        A | \boxed{A: B: C:}
        B | \boxed{A: B: C:}
        B | A: B: C:
        B | \boxed{B) C) D)}
        B | \boxed{(B) (C) (D)}
        B | \boxed{B, C, D}
        B | \boxed{BCD}
        B | \boxed{B/C}
        B | \boxed{B \text{ or } C}
        C | \boxed{B \text{ or } C}
        B | \boxed{B. C}
        B | \boxed{B (or C)}
        B | \boxed{\text{B. maybe C}}
        B | \boxed{\text{Option B or option C}}
        B | \boxed{\text{Options B and C}}
        A | \boxed{A. 1 B. 2 C. 3}
        C | \boxed{A. 1 B. 2 C. 3}
        A | \boxed{\text{A) yes, B) no}}
        C | The answer is C. or D.
        D | The answer is C. or D.
        C | The answer is C. Or D.
        C | The answer is C or D.
        C | The answer is C/D.
        C | The answer is C, or maybe D.
        C | The answer is either C or D.
        C | The answer is C, D.
        C | The answer is (C) or (D).
        C | The answer is C. It could also be D.
        C | Answer: C. D.
        C | Answer: C) D)
        C | C. A\nC. B\nC. C
        A | A. A\nA. B\nA. C
        C | A. 1\nB. 2\nC. 3
        C | A\nB\nC
        C | A: 1\nB: 2\nC: 3
        A | A: 1\nB: 2\nC: 3
        C | option C is not correct
        C | Option C is wrong.
        C | The answer is not C.
        C | 不选C
        C | 选B或C
        B | 选B或C
        C | 故选B、C。
        B | 答案是B或者C
        C | 答えはBかC
        C | Options A, B and C are correct.
        C | \boxed{A}\n\nOption C is wrong.
        C | \boxed{B}. The answer is not C.
        C | \boxed{x = 5}. The answer is C or D.
        C | \boxed{x = 5}. Answer: B
        ACD | \boxed{A, C}
        ACD | \boxed{A, B, C, D}
        ACD | \boxed{A \text{ or } C \text{ or } D}
        AC | \boxed{A \text{ or } C}
        A, C | \boxed{A \text{ or } C}
        AC | \boxed{A}
        A, C | \boxed{A}
        AC | \boxed{A, A, C}
        ②③ | \boxed{23}
        ②③ | \boxed{2}
        ②③ | \boxed{6}
        ②③ | \boxed{①②③}
        23 | \boxed{②③}
        ② | \boxed{②③}
        A | \boxed{B}
        A | \boxed{A + B}
        A | \boxed{2A}
        ウ | 答えはイ
        ウ | 答えはイかウ
        ウ | \boxed{イ、ウ}
    """,
    "a heading or check behind": r"""
        4 | The answer is 12. To verify the answer: 12/3 = 4, as required.
        4 | The answer is 12. Let me check the answer: 12/3 = 4.
        4 | The answer is 12. To verify that the answer is correct: 12/3 = 4.
        4 | The answer is 12. The answer is correct because 12/3 = 4.
        4 | The answer is 12 (check: 12/3 = 4).
        4 | \boxed{12}. To verify the final answer: 12/3 = 4.
        7 | She has 12 left. Checking the answer: 12 - 5 = 7, which matches the first day.
        7 | She has 12 left. Checking: 12 - 5 = 7.
        7 | She has 12 left. Check: 12 - 5 = 7.
        7 | She has 12 left.\n\nCheck: 12 - 5 = 7. So 7 matches.
        7 | She has 12 left.\n\nVerification:\n\n12 - 5 = 7
        7 | She has 12 left. Let's verify: 12 - 5 = 7.
        7 | She has 12 left.\n\nProof: 12 - 5 = 7.
        4 | So x = 12.\n\n**Step 3: Verify**\n12/3 = 4
        4 | So x = 12.\n\n#### 4. Verification\n12/3 = 3
        3 | #### 1. Set up\nLet x be the number of stamps.\n\n#### 2. Solve\nx + 4 = 46, so x = 42.\n\n#### 3. Final Answer\n**42**
        2 | #### 1. Set up\nx + 4 = 46\n\n#### 2. Solve\nx = 42
        1 | #### 1. Set up
        1 | #### 1. Set up the equation x + 4 = 46
        2 | ### Step 1\nx + 4 = 46\n\n### Step 2
        2 | x = 42\n\n### Step 2
        2 | x = 42\n\n#### 2. Next steps
        2 | x = 42\n\n#### 2 Solve
        3 | **3. Final Answer**\n\n42
        43 | There are 42 stamps. Note that 43 would be too many.
        3 | There are 42 stamps.\n\nP.S. This took 3 steps.
        7 | The wrong answer is 7.
        7 | A common wrong answer: 7.
    """,
    "formats of other trainers": r"""
        41 | <SOLUTION>42</SOLUTION>
        40 | <start_working_out>40<end_working_out><SOLUTION>42</SOLUTION>
        42 | <SOLUTION></SOLUTION>
        42 | <start_working_out>42<end_working_out><SOLUTION></SOLUTION>
        42 | <answer></answer>
        42 | <answer>41 or 42</answer>
        42 | <answer>42</answer><answer>43</answer>
        48 | <|begin_of_thought|>6 * 8 = 48<|end_of_thought|><|begin_of_solution|>42<|end_of_solution|>
        3 | ### Answer\n42\n\n### Notes\nThere are 3 ways.
        42 | 【答案】43
        42 | Answer - 43
        -42 | Answer - 42
        42 | {"answer": "43", "steps": 42}
        42 | <output>42</output> So the answer is \boxed{43}.
    """,
    "a number behind a character": r"""
        3 | 一共是3万元。
        3 | 答案是3万。
        3 | \boxed{3万}
        5 | 一共3万5千元。
        1 | 確率は3分の1です。
        30 | 增长了百分之30。
        7 | 至少7个。
        7 | 不是7。
        7 | 答案不是7。
        7 | 7人以上です。
        7 | 最多有7个。
        8 | 答案是7或8。
        7 | 答案是7或8。
        8 | 有7个或8个。
        7 | 答案是7个或8个。
        8 | 7または8です。
        3 | 见第3步
        5 | 气温是零下5度。
        5 | 所以x是负5。
        18 | 小明还剩下180元。
    """,
    "prose": r"""
        24 | So Tom has 26 more marbles than Ann, who has 24 marbles.
        24 | Each of the 3 friends therefore gets 8 of the 24 sweets.
        7 | It is 7 or 8.
        8 | It is 7 or 8.
        8 | It is 7, or possibly 8.
        7 | The answer is 7, or possibly 8.
        7 | The answer is 7 apples or 8 apples.
        8 | She has 7 apples or 8 apples.
        7 | The answer is 7. Or 8.
        7 | The answer is either 7 or 8.
        7 | The answer is at least 7.
        7 | There are at least 7.
        7 | There are no fewer than 7.
        7 | It is at most 7.
        7 | The answer is 7 or more.
        7 | The answer is more than 7.
    """,
    "a gold that is a long sentence": r"""
        Every room of kind $A$ costs $240$ yuan a night and every room of kind $B$ costs $210$ yuan. | \boxed{210}
        Every room of kind $A$ costs $240$ yuan a night and every room of kind $B$ costs $210$ yuan. | \boxed{240}
        The first train arrives at the station after 12 minutes and the second one after 15 minutes | \boxed{15}
        There are 3 red balls in the first box, 4 blue balls in the second box and 5 in the third one | The answer is 5.
    """,
}


def rows(tables: dict[str, str]) -> list[object]:
    return [
        pytest.param(
            *(side.strip().replace(r"\n", "\n") for side in line.split(" | ", 1)), id=f"{name}: {line.strip()}"
        )
        for name, table in tables.items()
        for line in table.strip().splitlines()
    ]


@pytest.mark.parametrize(("gold", "completion"), rows(RIGHT))
def test_the_answer_is_found(gold: str, completion: str) -> None:
    assert grade(gold, completion) == "correct"


@pytest.mark.parametrize(("gold", "completion"), rows(WRONG))
def test_no_other_value_is_found(gold: str, completion: str) -> None:
    assert grade(gold, completion) != "correct"


SENTENCE = "Every room of kind $A$ costs $240$ yuan a night and every room of kind $B$ costs $210$ yuan."


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("We add the first two and subtract the third one, so that in the end there are " + r"$\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("We add the first two and then subtract the third one of them. The answer is 42.", "42"),
        ("We add the first two and then subtract the third one of them. Final Answer: 42", "42"),
        ("<think>We add the first two, and subtract the third one of them</think><answer>42</answer>", "42"),
        (SENTENCE, SENTENCE),
        (r"\frac{1}{2}x^2 + \frac{1}{3}x^3 + \frac{1}{4}x^4 + \frac{1}{5}x^5 + \frac{1}{6}x^6 + C", None),
    ],
)  # fmt: skip
def test_a_long_gold_gives_its_marked_answer_or_itself(gold: str, text: str | None) -> None:
    assert find_gold(gold).text == (text or gold)


def test_a_long_sentence_equals_itself() -> None:
    assert grade(SENTENCE, rf"\boxed{{\text{{{SENTENCE}}}}}") == "correct"


EMPTY: list[Any] = [
    "",
    " ",
    "\n",
    r"\boxed{}",
    r"\boxed{ }",
    "$$",
    "$ $",
    r"\text{}",
    r"\boxed{\text{}}",
    "{}",
    "()",
    "[]",
    ".",
    "...",
    "?",
    "-",
]
EMPTY += ["#### ", r"\(\)", r"\[ \]", r"\quad", r"\,", "\u200b", "。", "''", '""', "**", "****", None, float("nan"), [], {}, ()]  # fmt: skip


@pytest.mark.parametrize("gold", EMPTY)
def test_an_empty_gold_pays_nobody_and_is_an_error(gold: Any) -> None:
    for completion in (
        "",
        r"\boxed{}",
        r"\boxed{\text{}}",
        str(gold),
        rf"\boxed{{{gold}}}",
        f"The answer is {gold}",
        "0",
    ):
        assert grade(gold, completion) != "correct"
        with pytest.raises(RloraError, match="empty"):
            math_answer(completion, gold)


@pytest.mark.parametrize(
    "gold", ["0", 0, "+", "<", ">", "=", r"\{\}", r"\emptyset", r"\infty", r"\pi", "x", "是", "None", False]
)
def test_short_golds_are_not_empty(gold: Any) -> None:
    assert math_answer(rf"\boxed{{{gold}}}", gold) == "correct"
