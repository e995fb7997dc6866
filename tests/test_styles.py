"""Reward functions written for others, and in our own forms."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import borrowed_rewards as borrowed
import pytest
from conftest import case
from rlora.rewards.styles import plug

from rlora.records import RloraError, Score

SPEC = "mine.py:f"


def scores(function: Callable[..., Any], *completions: str, answer: object = 4, **columns: object) -> list[Score]:
    return plug(SPEC, function)(case(*completions, answer=answer, **columns), range(len(completions)))


def values(found: list[Score]) -> list[float | None]:
    assert all(score.status is None for score in found), [score.detail for score in found]
    return [score.value for score in found]


def test_trls_functions_give_what_they_give_in_trl() -> None:
    assert values(scores(borrowed.reward_num_unique_chars, "aab", "")) == [2.0, 0.0]
    assert values(scores(borrowed.reward_len, "a" * 18, "")) == [-2.0, -20.0]
    assert values(scores(borrowed.reward_token_count, "aab", "")) == [3.0, 0.0]  # conftest's has a token a character
    right = "<think>2 + 2</think><answer>4</answer>"
    assert values(scores(borrowed.format_reward_func, right, "4")) == [1.0, 0.0]  # it reads messages, of a plain prompt
    assert values(scores(borrowed.boxed_reward_func, r"\boxed{4}", r"\boxed{5}", "4")) == [1.0, 0.0, 0.0]
    assert values(scores(borrowed.math_reward_func, "4", "5", task="math")) == [1.0, -1.0]
    assert values(scores(borrowed.math_reward_func, "4", "5", task="coding")) == [None, None]
    assert values(scores(borrowed.async_reward_func, "1234", "12345")) == [4.0, 0.0]


def test_trls_functions_may_log_and_know_the_step() -> None:
    of = replace(case("it is 4", "it is 10", answer=4), step=7, steps=9)
    found = plug(SPEC, borrowed.logging_reward_func)(of, range(2))
    assert values(found) == [8.0, 7.0]
    assert [dict(score.extra) for score in found] == [
        {"accuracy": 0.5, "extracted_length": 1.0}, {"accuracy": 0.5, "extracted_length": 2.0},
    ]  # fmt: skip


def test_verls_functions_give_what_they_give_in_verl() -> None:
    assert values(scores(borrowed.my_reward_fn, "a" * 50)) == [0.5]
    assert values(scores(borrowed.compute_score, "so #### 4", "#### 5", "4")) == [1.0, 0.0, 0.0]
    found = scores(borrowed.compute_score_dict, "it is 4", "no")
    assert values(found) == [1.0, -1.0]
    assert [dict(score.extra) for score in found] == [{"acc": 1.0}, {"acc": 0.0}]  # what is no number is left out
    assert values(scores(borrowed.compute_score_batched, "it is 4", "no")) == [1.0, 0.0]


def test_verl_and_openrlhf_see_all_turns() -> None:
    query = "<user>?</user>first sure? last</s>"
    of = replace(case("last", answer=4), responses=("first sure? last",), queries=(query,))
    assert values(plug(SPEC, borrowed.my_reward_fn)(of, [0])) == [0.16]
    assert values(plug(SPEC, borrowed.reward_func_of_lengths)(of, [0])) == pytest.approx([-len(query) / 100])


def test_openrlhfs_functions_give_what_they_give_in_openrlhf() -> None:
    prompt = "<user>?</user>"
    assert values(scores(borrowed.reward_func_of_lengths, "abc", "")) == pytest.approx(
        [-(len(prompt) + 3) / 100, -len(prompt) / 100]
    )
    for score in scores(borrowed.reward_func, "a", "b", "c"):
        assert score.value in (0.0, 1.0)
        assert dict(score.extra) == {"scores": score.value, "dummy_scores": score.value}


def one(completion: str, answer: int) -> float:
    return float(completion == str(answer))


def of_group(completions: list[str], answers: list[int]) -> list[float]:
    return [len(completions) / answer for answer in answers]


def of_length(completion_ids: list[int], most: int = 2) -> bool:
    return len(completion_ids) <= most


def status_of(completion: str, answer: int, level: str) -> str | dict[str, object]:
    return "unparsable" if level == "hard" else {"score": 0.5, "status": "wrong", "distance": 3}


class Counting:
    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, completion: str, answer: int) -> float:
        self.start += 1
        return float(self.start)


@pytest.mark.parametrize(
    ("function", "style", "expected"),
    [
        (one, "completion", [1.0, 0.0]),
        (of_group, "group", [0.5, 0.5]),
        (of_length, "completion", [1.0, 0.0]),
        (Counting(3), "completion", [4.0, 5.0]),
        (functools.partial(of_length, most=5), "completion", [1.0, 1.0]),
        (borrowed.reward_token_count, "trl", [1.0, 3.0]),
        (borrowed.compute_score, "verl", [0.0, 0.0]),
        (borrowed.compute_score_batched, "verl-batch", [1.0, 0.0]),
        (borrowed.reward_func_of_lengths, "openrlhf", [-0.15, -0.17]),
    ],
)
def test_the_names_of_the_parameters_tell_the_form(
    function: Callable[..., Any], style: str, expected: list[float]
) -> None:
    made = plug(SPEC, function)
    assert made.style == style
    assert values(made(case("4", "...", answer=4), range(2))) == pytest.approx(expected)


def test_columns_are_given_by_name_and_a_function_may_give_a_status() -> None:
    assert [score.status for score in scores(status_of, "a", level="hard")] == ["unparsable"]
    (score,) = scores(status_of, "a", level="easy")
    assert (score.status, score.value, dict(score.extra)) == ("wrong", 0.5, {"distance": 3.0})
    (score,) = scores(status_of, "a")
    assert score.status == "error"
    assert "needs level, but the prompt's columns are ()" in score.detail


def test_the_configs_arguments_go_to_the_parameter_of_that_name() -> None:
    made = plug(SPEC, of_length, args={"most": 3, "other": 1})
    assert values(made(case("abc"), [0])) == [1.0]
    assert "most" in made.takes
    assert "other" not in made.takes
    assert values(plug(SPEC, Counting, args={"start": 10})(case("abc"), [0])) == [11.0]


def test_a_style_is_taken_by_position_where_no_name_tells_it() -> None:
    assert values(plug(SPEC, lambda text, gold: float(text == gold), "completion")(case("4", answer="4"), [0])) == [1.0]
    with pytest.raises(RloraError, match=r"reward = 'mine\.py:f': its parameters are \(text, gold\)\. Name them as"):
        plug(SPEC, lambda text, gold: 1.0)
    with pytest.raises(RloraError, match="there is no style 'tlr'"):
        plug(SPEC, one, "tlr")  # type: ignore[arg-type]


def by_place(completion: str, /, answer: int) -> float:
    return float(completion == str(answer))


def veiled(*args: Any, **kwargs: Any) -> float:
    return one(*args, **kwargs)


@functools.wraps(borrowed.async_reward_func)
def waited_for(*args: Any, **kwargs: Any) -> list[float]:
    return [1.0, 2.0]


def test_decorators_and_parameters_by_position() -> None:
    assert values(scores(by_place, "4", "5")) == [1.0, 0.0]
    assert values(plug(SPEC, veiled, "completion")(case("4", "5", answer=4), range(2))) == [1.0, 0.0]
    assert not plug(SPEC, waited_for).asynchronous  # what it wraps is, and it is not
    assert values(scores(waited_for, "4", "5")) == [1.0, 2.0]


def raises(completion: str, answer: int) -> float:
    return 1 / (len(completion) - 1)


@pytest.mark.parametrize(
    ("function", "detail"),
    [
        (raises, r"test_styles\.py:\d+: f raised ZeroDivisionError: division by zero; mend it there"),
        (lambda completion: float("nan"), r"test_styles\.py:\d+: f returned nan; let it return a finite number"),
        (lambda completion: "right", r"f returned 'right'; let it return .* one of correct, wrong"),
        (lambda completion: {"points": 1}, r"f returned a dict without \"score\""),
    ],
)
def test_what_fails_is_an_error_that_names_the_users_file_and_line(function: Callable[..., Any], detail: str) -> None:
    (score,) = scores(function, "a")
    assert (score.status, score.value) == ("error", None)
    assert re.search(detail, score.detail)


def test_the_innermost_line_of_the_users_own_file_is_named() -> None:
    def calls(completion: str) -> float:
        return float(re.compile("(").search(completion) is not None)

    (score,) = scores(calls, "a")
    line = calls.__code__.co_firstlineno + 1
    assert re.search(rf"test_styles\.py:{line}: f raised (re\.)?(error|PatternError): ", score.detail)


def test_what_a_function_does_to_its_arguments_is_its_own_affair() -> None:
    def spoils(completions: list[str], answers: list[dict[str, int]]) -> list[float]:
        completions.clear()
        answers[0]["it"] = 5
        return [1.0, 2.0]

    of = case("a", "b", answer={"it": 4})
    made = plug(SPEC, spoils)
    assert values(made(of, range(2))) == values(made(of, range(2))) == [1.0, 2.0]
    assert of.answer == {"it": 4}
