import pytest

from rlora.envs.gym import ReasoningGym
from rlora.records import RloraError
from rlora.rewards.gym import gym_answer


@pytest.mark.parametrize(
    ("answer", "completion", "status"),
    [
        ("12", "<answer>12</answer>", "correct"),
        ("12", "I think <answer>11</answer>, no: <answer> 12.0 </answer>", "correct"),
        ("1234.5", "<answer>1,234.50</answer>", "correct"),
        ("12", "<answer>1,2</answer>", "wrong"),
        ("12", "12", "unparsable"),
        ("12", "<answer></answer>", "unparsable"),
        ("12", "<think><answer>12</answer>", "unparsable"),
        ("12", "<think><answer>12</answer></think> none", "unparsable"),
        ("12", "<answer>10 + 2</answer>", "wrong"),
        ("12", "<answer>12 13 14</answer>", "wrong"),
        ("1/2", "<answer>2/4</answer>", "wrong"),  # not reduced
        ("True", "<answer>true</answer>", "correct"),
        ("1 0\n0 1", "<answer>1 0\n 0 1\n</answer>", "correct"),
        ("1 0\n0 1", "<answer>1 0 0 0</answer>", "wrong"),
        ("[[1,2],[3,4]]", "<answer>[[1, 2], [3, 4]]</answer>", "correct"),
        ("12", "<answer>" * 50_000, "unparsable"),
        ("12", f"<answer>{'9' * 100_000}</answer>", "unparsable"),
    ],
)
def test_gym_answer(answer: str, completion: str, status: str) -> None:
    assert gym_answer(completion, answer) == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": "gcd,n_queens"}, "'n_queens' can't be graded: its problems can have several correct answers"),
        ({"tasks": "simple_integration"}, "can be written in several ways"),
        ({"tasks": "gdc"}, "there is no such task; use some of ab, acre"),
        ({"tasks": ""}, "there is no such task"),
        ({"tasks": "gcd", "size": 0}, "size = 0"),
    ],
)
def test_gym_refuses_tasks_that_it_can_not_grade(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RloraError, match=message):
        ReasoningGym(**arguments)  # type: ignore[arg-type]


def test_gym_generates_problems_by_name_and_holds_some_out() -> None:
    pytest.importorskip("reasoning_gym")
    env = ReasoningGym("gcd,lcm", size=30, held_out_size=10)
    train, held_out = list(env.train()), list(env.held_out())
    assert [prompt.columns["task"] for prompt in held_out] == ["gcd", "lcm"] * 5
    assert len(train) == 30
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}
    assert [prompt.text for prompt in ReasoningGym("gcd,lcm", size=30, held_out_size=10).train()] == [
        prompt.text for prompt in train
    ]
    assert all(gym_answer(f"<answer>{prompt.answer}</answer>", prompt.answer) == "correct" for prompt in train)
    assert "Give the final answer in <answer> </answer>." in str(train[0].text)


def test_gym_names_arguments_that_a_task_does_not_accept() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(RloraError, match=r"env_args\.tasks: gcd do not accept {'digits': 3}"):
        list(ReasoningGym("gcd", digits=3).train())
