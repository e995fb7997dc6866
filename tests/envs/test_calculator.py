import re

import pytest

from rlora.envs.calculator import Calculator, calculate
from rlora.records import Prompt, RloraError
from rlora.rewards.calculator import answered

PROMPT = Prompt("?")


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("347*28", "9716"),
        (" 41 * 16 + 9 ", "665"),
        ("(2+3)*-4", "-20"),
        ("1/3", "0.333333"),
        ("6/3", "2"),
        ("0.5*4", "2"),
        ("1/0", "error"),
        ("", "error"),
        ("2**9", "error"),
        ("7//2", "error"),
        ("(1", "error"),
        ("2(3)", "error"),
        ("9" * 100, "9" * 100),
        ("(" * 99 + "1", "error"),
        ("1" + "0" * 96 + "/7", "1.42857e+95"),
    ],
)
def test_calculate(text: str, result: str) -> None:
    assert calculate(text) == result


def test_a_call_gets_its_result_and_the_last_message_gets_nothing() -> None:
    env, state = Calculator(max_calls=2), {}
    assert env.reply(PROMPT, "Let me see: <<347*28=", state) == "9716>>"
    assert env.reply(PROMPT, " and <<9716+1 =", state) == "9717>>"
    assert state == {"calls": 2}
    assert env.reply(PROMPT, " and <<1+1=", state) is None  # one call too many
    assert Calculator().reply(PROMPT, " The answer is 9716.", {}) is None
    assert Calculator().reply(PROMPT, "347 * 28 =", {}) is None
    assert Calculator().reply(PROMPT, "<<__import__('os')=", {}) is None
    assert Calculator().reply(PROMPT, "<<" + "9" * 101 + "=", {}) is None
    assert Calculator().reply(PROMPT, "<<1/0=", {}) == "error>>"


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        ("<<347*28=9716>> The answer is 9716.", "correct"),
        ("The answer is 9716.", "correct"),
        ("<<347*28=9716>> The answer is 9717.", "wrong"),
        ("<<347*28=9716>>", "unparsable"),  # the tool's answer is not the policy's
        ("<<347*28=9716>> The answer is", "unparsable"),
        ("The answer is 9716. <<1+1=2>>", "unparsable"),
        ("<<9716=", "unparsable"),
        ("", "unparsable"),
    ],
)
def test_answered(completion: str, status: str) -> None:
    assert answered(completion, 9716) == status


def test_problems_have_the_answers_that_the_tool_gives() -> None:
    prompts = Calculator(levels="1,2", size=200).train()
    for prompt in prompts:
        call = re.sub(r"What is (.*)\?", r"\1", prompt.columns["question"])
        assert calculate(call) == str(prompt.answer)
    assert {prompt.columns["level"] for prompt in prompts} == {1, 2}


def test_examples_stand_before_the_problem() -> None:
    (prompt,) = Calculator(levels=3, shots=2, size=1).train()
    roles = [turn["role"] for turn in prompt.text]  # type: ignore[index, union-attr]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert prompt.text[2]["content"] == "<<347*28=9716>> The answer is 9716."  # type: ignore[index]
    assert prompt.text[-1]["content"] == prompt.columns["question"]  # type: ignore[index]


def test_stories_have_the_right_answer() -> None:
    checked = 0
    for prompt in Calculator(levels="3,4", size=200).train():
        box = re.fullmatch(
            r"A box holds (\d+) pens. How many pens are in (\d+) boxes(?: and (\d+) loose ones)?\?",
            prompt.columns["question"],
        )
        if box:
            checked += 1
            assert prompt.answer == int(box[1]) * int(box[2]) + int(box[3] or 0)
    assert checked > 20


def test_held_out_problems_are_different() -> None:
    env = Calculator(size=100, held_out_size=20)
    train, held_out = ({prompt.columns["question"] for prompt in part} for part in (env.train(), env.held_out()))
    assert (len(train), len(held_out), len(train & held_out)) == (100, 20, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"levels": "5"}, "levels = '5'"), ({"shots": 4}, "shots = 4"), ({"max_calls": 0}, "max_calls = 0"),
     ({"size": 0}, "size = 0")],
)  # fmt: skip
def test_calculator_refuses_invalid_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RloraError, match=message):
        Calculator(**arguments).train()  # type: ignore[arg-type]
