"""Reward functions of other frameworks, and in rlora's own styles."""

import asyncio
import copy
import functools
import json
import operator
import re
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import borrowed_rewards as borrowed
import numpy as np
import pytest
import torch
from conftest import case

from rlora.records import RloraError, Score
from rlora.scoring.signatures import reward_function

SPEC = "mine.py:f"


def scores(function: Callable[..., Any], *completions: str, answer: object = 4, **columns: object) -> list[Score]:
    return reward_function(SPEC, function)(case(*completions, answer=answer, **columns), range(len(completions)))


def values(scores: list[Score]) -> list[float | None]:
    assert all(score.status is None for score in scores), [score.detail for score in scores]
    return [score.value for score in scores]


def test_trls_functions_give_what_they_give_in_trl() -> None:
    assert values(scores(borrowed.reward_num_unique_chars, "aab", "")) == [2.0, 0.0]
    assert values(scores(borrowed.reward_len, "a" * 18, "")) == [-2.0, -20.0]
    assert values(scores(borrowed.reward_token_count, "aab", "")) == [3.0, 0.0]  # conftest: one token per character
    right = "<think>2 + 2</think><answer>4</answer>"
    assert values(scores(borrowed.format_reward_func, right, "4")) == [1.0, 0.0]  # messages from a plain-text prompt
    assert values(scores(borrowed.boxed_reward_func, r"\boxed{4}", r"\boxed{5}", "4")) == [1.0, 0.0, 0.0]
    assert values(scores(borrowed.math_reward_func, "4", "5", task="math")) == [1.0, -1.0]
    assert values(scores(borrowed.math_reward_func, "4", "5", task="coding")) == [None, None]
    assert values(scores(borrowed.async_reward_func, "1234", "12345")) == [4.0, 0.0]


def test_trls_functions_may_log_and_know_the_step() -> None:
    inputs = replace(case("it is 4", "it is 10", answer=4), step=7, steps=9)
    results = reward_function(SPEC, borrowed.logging_reward_func)(inputs, range(2))
    assert values(results) == [8.0, 7.0]
    assert [dict(score.extra) for score in results] == [
        {"accuracy": 0.5, "extracted_length": 1.0}, {"accuracy": 0.5, "extracted_length": 2.0},
    ]  # fmt: skip


def test_verls_functions_give_what_they_give_in_verl() -> None:
    assert values(scores(borrowed.my_reward_fn, "a" * 50)) == [0.5]
    assert values(scores(borrowed.compute_score, "so #### 4", "#### 5", "4")) == [1.0, 0.0, 0.0]
    results = scores(borrowed.compute_score_dict, "it is 4", "no")
    assert values(results) == [1.0, -1.0]
    assert [dict(score.extra) for score in results] == [{"acc": 1.0}, {"acc": 0.0}]  # numbers only
    assert values(scores(borrowed.compute_score_batched, "it is 4", "no")) == [1.0, 0.0]


def test_verl_and_openrlhf_see_all_turns() -> None:
    query = "<user>?</user>first sure? last</s>"
    inputs = replace(case("last", answer=4), responses=("first sure? last",), queries=(query,))
    assert values(reward_function(SPEC, borrowed.my_reward_fn)(inputs, [0])) == [0.16]
    assert values(reward_function(SPEC, borrowed.reward_func_of_lengths)(inputs, [0])) == pytest.approx(
        [-len(query) / 100]
    )


def test_openrlhfs_functions_give_what_they_give_in_openrlhf() -> None:
    prompt = "<user>?</user>"
    assert values(scores(borrowed.reward_func_of_lengths, "abc", "")) == pytest.approx(
        [-(len(prompt) + 3) / 100, -len(prompt) / 100]
    )
    for score in scores(borrowed.reward_func, "a", "b", "c"):
        assert score.value in (0.0, 1.0)
        assert dict(score.extra) == {"scores": score.value, "dummy_scores": score.value}


def test_openrlhfs_functions_get_lists_of_one() -> None:
    results = scores(borrowed.reward_func_of_first, "it is 4", "no", "44")
    assert values(results) == [1.0, 0.0, 1.0]
    assert [score.extra["length"] for score in results] == [7.0, 2.0, 2.0]


def test_verls_functions_get_the_number_of_turns() -> None:
    messages = (
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    )
    inputs = replace(case("c", "d", level=10), messages=(messages, ()))
    assert values(reward_function(SPEC, borrowed.compute_score_of_turns)(inputs, range(2))) == [14.0, 12.0]
    assert values(reward_function(SPEC, borrowed.compute_score_of_turns_batched)(inputs, range(2))) == [14.0, 12.0]
    for info, expected in (({"level": 1, "num_turns": 9}, 3.0), (None, 2.0)):
        assert values(scores(borrowed.compute_score_of_turns, "a", extra_info=info)) == [expected]
    (score,) = scores(borrowed.compute_score_of_turns, "a", extra_info="level 1")
    assert "needs extra_info, and the prompt's column extra_info is 'level 1'; make the column a dict" in score.detail
    args = {"reward_router_address": "10.0.0.1:8000"}
    assert values(reward_function(SPEC, borrowed.compute_score_genrm, args=args)(case("4", answer=4), [0])) == [1.0]


def test_trls_functions_may_skip_by_nan_and_know_the_epoch() -> None:
    inputs = replace(case("a", "b?"), step=6, epoch=1.5)
    assert values(reward_function(SPEC, borrowed.skipping_reward_func)(inputs, range(2))) == [2.5, None]
    for skipped in (torch.tensor([float("nan")]), [Decimal("nan")], np.array([np.nan])):
        assert scores(lambda prompts, completions, **kwargs: skipped, "a") == [Score()]  # noqa: B023
    (score,) = scores(lambda prompts, completions, **kwargs: [float("inf")], "a")
    assert score.status == "error"


def test_trls_environments_are_an_agents_states() -> None:
    inputs = replace(case("a", "b"), states=({"counter": 3}, {"counter": 4}))
    assert values(reward_function(SPEC, borrowed.environment_reward_func, agent=True)(inputs, range(2))) == [3.0, 4.0]
    (score,) = reward_function(SPEC, borrowed.environment_reward_func, agent=True)(case("a"), [0])
    assert "the episode's state has no 'counter'; set state['counter'] in the env's reply()" in score.detail


def test_verifiers_functions_give_what_they_give_in_verifiers() -> None:
    assert values(scores(borrowed.correct_answer, "it is 4", "no")) == [1.0, 0.0]
    for info in ({"required_keywords": ["a", "b"]}, '{"required_keywords": ["a", "b"]}'):
        assert values(scores(borrowed.check_keywords, "A!", "ab", info=info)) == [0.5, 1.0]
    assert values(scores(borrowed.length_reward, "a" * 499, "a" * 500)) == [1.0, 0.5]
    assert values(scores(borrowed.diversity_bonus, "a", "b", "a")) == [0.0, 0.2, 0.0]
    assert values(scores(borrowed.by_a_helper, "4", "5", other=1)) == [1.0, 0.0]
    assert values(scores(borrowed.by_a_loop, "4", "", task="math")) == [1.0, 0.0]
    assert values(scores(borrowed.by_state, "4", "5")) == [1.0, 0.0]
    assert values(scores(borrowed.by_zip, "4", "5")) == [1.0, 0.0]
    (score,) = scores(borrowed.check_keywords, "a", info="[1]")
    assert "needs info, and the prompt's column info is '[1]'; make the column a dict" in score.detail


def test_verifiers_functions_see_all_turns() -> None:
    messages = (
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": ""},
    )
    inputs = replace(case("", answer="4"), messages=(messages,))
    assert values(reward_function(SPEC, borrowed.by_a_helper)(inputs, [0])) == [1.0]


def test_areals_functions_give_what_they_give_in_areal() -> None:
    assert values(scores(borrowed.exact_match_reward_fn, "it is 4", "no")) == [1.0, 0.0]
    inputs = replace(case("abc", answer=4), prompt_ids=(1, 2))
    assert values(reward_function(SPEC, borrowed.my_reward_model_fn)(inputs, [0])) == [
        len(inputs.prompt_text) + 3 - 2 - 3
    ]
    assert values(scores(borrowed.positional_reward_fn, "7", "8", answer=7, numbers=[3, 4])) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            borrowed.judge_correctness,
            r"rlora has no value for its parameter judge; create the object in the function's file, and remove the "
            r"parameter or give the parameter a default",
        ),
        (borrowed.by_a_parser, r"rlora has no value for its parameter parser; create the object in the function's"),
        (borrowed.compute_score_genrm, r".* parameter reward_router_address; set reward_args\.reward_router_address"),
        (borrowed.environment_reward_func, r"rlora has no value for its parameter environments; use an agent"),
        (lambda completion: (yield 1.0), r"the function is a generator; replace yield by return"),
    ],
)
def test_a_function_that_needs_a_missing_value_is_refused_at_once(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(RloraError, match=rf"^reward = 'mine\.py:f': {message}"):
        reward_function(SPEC, function)


def text_of_json(completion: str) -> float:
    return float(json.loads(completion)["content"] == "4")


def of_prompt(completion: str, prompt: list[dict[str, str]]) -> float:
    return float(prompt[-1]["content"] in completion)


def of_messages(completion: str, messages: list[dict[str, str]]) -> float:
    return float(messages[-1]["content"] == completion)


def of_either(completion: Any) -> float:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return float(isinstance(completion, str) and text == "4")


def of_letters(completion: str) -> float:
    return float(max(completion[-1], completion[0]) == "4" and all(c.isdigit() for c in completion))


def of_a_groups_text(completions: list[str], answers: list[int]) -> list[float]:
    return [float(c[-1] == str(a)) for c, a in zip(completions, answers, strict=True)]


@pytest.mark.parametrize(
    ("function", "completion", "style"),
    [
        (text_of_json, '{"content": "4"}', "completion"),
        (of_messages, "4", "completion"),
        (of_either, "4", "completion"),
        (of_letters, "4", "completion"),
        (of_a_groups_text, "4", "group"),
        (lambda completion: float(completion[-1]["content"] == "4"), "4", "verifiers"),
        (lambda completion: float([m.get("content") for m in completion][-1] == "4"), "4", "verifiers"),
        (lambda completions: [float(c[0]["content"] == "4") for c in completions], "4", "verifiers-group"),
        (lambda completions: [*map(lambda c: float(c[0]["content"] == "4"), completions)], "4", "verifiers-group"),  # noqa: C417
        (lambda prompts, completions, **_: [float(c[0]["content"] == "4") for c in completions], "4", "trl"),
    ],
)
def test_the_source_decides_between_text_and_messages(
    function: Callable[..., Any], completion: str, style: str
) -> None:
    prepared = reward_function(SPEC, function)
    assert prepared.style == style
    assert values(prepared(case(completion, answer=4), [0])) == [1.0]


KEY = "content"
CONTENT = operator.itemgetter("content")


def by_match(completion: Any) -> float:
    match completion[-1]:
        case {"content": text}:
            return float(text == "4")
    return 0.0


def by_match_of_all(completion: Any) -> float:
    match completion:
        case [*_, {"role": "assistant", "content": text}]:
            return float(text == "4")
    return 0.0


def by_unpacking(completion: Any) -> float:
    *_, last = completion
    return float(last["content"] == "4")


def by_state(state: Any) -> float:
    if not (messages := state.get("completion")):
        return 0.0
    return float(messages[-1]["content"] == "4")


def by_alias(state: Any, **kwargs: Any) -> float:
    rollout = state
    return float(rollout["completion"][-1]["content"] == "4")


def by_keys(completion: Any) -> float:
    for key in ("role", "content"):
        text = completion[-1][key]
    return float(text == "4")


def by_appending(completion: Any) -> float:
    assistant = []
    for message in completion:
        assistant.append(message)
    return float(assistant[-1]["content"] == "4")


def by_pairs(completion: Any) -> float:
    pairs = list(enumerate(completion))
    return float(pairs[-1][1]["content"] == "4")


def by_trying(completion: Any) -> float:
    try:
        last = completion[-1]
    except IndexError:
        return 0.0
    return float(last["content"] == "4")


def by_values(completion: Any) -> float:
    return float("4" in [value for message in completion for value in message.values()])


def by_inner(completion: Any) -> float:
    def text(message: Any, key: str = "content") -> Any:
        return message[key]

    return float(text(completion[-1]) == "4")


def last_of(messages: Any) -> Any:
    return messages[-1]


def by_returned(completion: Any) -> float:
    return float(last_of(completion)["content"] == "4")


def text_of(messages: Any) -> Any:
    return messages if isinstance(messages, str) else messages[-1]["content"]


def by_parts(completion: Any) -> float:
    content = completion[-1]["content"]
    return float(isinstance(content, str) and content == "4" and text_of(completion) == "4")


def closed_over() -> Callable[..., float]:
    key = "content"

    def of_key(completion: Any) -> float:
        return float(completion[-1][key] == "4")

    return of_key


class Judge:
    def text(self, messages: Any) -> Any:
        return messages[-1]["content"]

    @staticmethod
    def last(messages: Any) -> Any:
        return messages[-1]

    def score(self, completion: Any) -> float:
        return float(self.last(completion).content == "4")


class Caller(Judge):
    def __call__(self, completion: Any) -> float:
        return float(self.text(completion) == "4")


async def by_thread(completion: Any) -> float:
    return float(await asyncio.to_thread(Judge().text, completion) == "4")


@pytest.mark.parametrize(
    "function",
    [
        by_match,
        by_match_of_all,
        by_unpacking,
        by_state,
        by_alias,
        by_keys,
        by_appending,
        by_pairs,
        by_trying,
        by_values,
        by_inner,
        by_returned,
        by_parts,
        by_thread,
        closed_over(),
        Caller(),
        Caller,
        Judge().score,
        lambda completion: float([*completion][-1]["content"] == "4"),
        lambda completion: float(completion.copy().pop()["content"] == "4"),
        lambda completion: float(operator.itemgetter("content")(completion[-1]) == "4"),
        lambda completion: float(operator.itemgetter(-1)(completion)["content"] == "4"),
        lambda completion: float([*map(CONTENT, completion)] == ["4"]),
        lambda completion: float(completion[-1][KEY] == "4"),
        lambda completion: float(completion[-1].content == "4" and completion[-1].role == "assistant"),
        lambda completion: float(completion[-1].get("content") == "4"),
        lambda completion: float(getattr(completion[-1], "content") == "4"),  # noqa: B009
        lambda completion: float({**completion[-1]}["content"] == "4"),
        lambda completion: float(copy.deepcopy(completion)[-1]["content"] == "4"),
        lambda completion: float([*filter(lambda m: m["role"] == "assistant", completion)] == completion),
        lambda completion: float(max(completion, key=lambda m: len(m["content"])) == completion[0]),
        lambda completion, prompt: float((prompt + completion)[-1]["content"] == "4" and prompt[0].content == "?"),
        lambda state: float(state["completion"][-1].content == "4"),
        lambda completion, state: float([*state.values()][1][0].content == "4" == completion[0].content),
    ],
)
def test_messages_may_be_read_in_any_way(function: Any) -> None:
    prepared = reward_function(SPEC, function)
    assert prepared.style == "verifiers"
    assert values(prepared(case("4", answer=4), [0])) == [1.0]


def test_groups_of_messages_may_be_read_in_any_way() -> None:
    def by_states(states: Any) -> list[float]:
        return [float(state["completion"][-1]["content"] == "4") for state in states]

    def by_attributes(completions: Any, answers: Any) -> list[float]:
        return [float(last.content == answer) for (*_, last), answer in zip(completions, answers, strict=True)]

    for function in (by_states, by_attributes):
        prepared = reward_function(SPEC, function)
        assert prepared.style == "verifiers-group"
        assert values(prepared(case("4", "5", answer=4), range(2))) == [1.0, 0.0]


def of_rebound(completion: Any) -> float:
    completion = json.loads(completion)
    return float(completion["content"] == "4")


def of_guarded(completion: Any) -> float:
    match completion:
        case str():
            return float(completion == '{"content": "4"}')
    return float(completion[-1]["content"])


def of_tried(completion: Any, info: Any = None) -> float:
    parsed = re.search(r'"(?P<content>\d)"', completion)
    return float(parsed is not None and parsed["content"] == "4" and [*completion][-1] == "}")


def of_own_message(completion: Any) -> float:
    messages = [{"role": "user", "content": completion}]
    messages.append({"role": "assistant", "content": completion})
    return float(messages[-1]["content"] == json.dumps({"content": "4"}) == text_of(completion))


def of_characters(completion: Any) -> float:
    characters = list(completion)
    return float(characters.pop() == "}" and completion.split()[0].strip().startswith("{"))


@pytest.mark.parametrize(
    "function",
    [
        of_rebound,
        of_guarded,
        of_tried,
        of_own_message,
        of_characters,
        lambda completion: float("content" in completion),
        lambda completion: float(type(completion) is str and completion[-1] == "}"),
        lambda completion: float(next(c["content"] for c in [{"content": c} for c in completion]) == "{"),
        lambda completion, prompt: float(completion[0] == "{" and prompt == "?"),
    ],
)  # fmt: skip
def test_text_is_not_mistaken_for_messages(function: Any) -> None:
    prepared = reward_function(SPEC, function)
    assert prepared.style == "completion"
    assert values(prepared(case('{"content": "4"}', answer=4), [0])) == [1.0]


def trl_of_word(completions: Any, **kwargs: Any) -> list[float]:
    return [float("content" in c) for c in completions]


def trl_of_column(completions: Any, **kwargs: Any) -> list[float]:
    return [float(c.startswith(wanted)) for c, wanted in zip(completions, kwargs["content"], strict=True)]


def trl_of_dicts(completions: Any, meta: Any, **kwargs: Any) -> list[float]:
    return [float(c.startswith(m["content"])) for c, m in zip(completions, meta, strict=True)]


def trl_of_either(completions: Any, **kwargs: Any) -> list[float]:
    return [float((c if isinstance(c, str) else c[0]["content"]) == "content") for c in completions]


def trl_of_prompts(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
    return [float(p[-1]["content"] == "?" and isinstance(c, list)) for p, c in zip(prompts, completions, strict=True)]


def trl_of_anything(prompts: Any, **kwargs: Any) -> list[float]:
    return [float(c[0]["content"] == "content") for c in kwargs["completions"]]


def trl_of_contents(completions: Any, **kwargs: Any) -> list[float]:
    contents = [completion[0].get("content") for completion in completions]
    return [float(text == "content") for text in contents]


class TrlOfMethod:
    def __call__(self, completions: Any, **kwargs: Any) -> list[float]:
        return [*map(self.one, completions)]

    def one(self, completion: Any) -> float:
        return float(completion[-1]["content"] == "content")


@pytest.mark.parametrize(
    ("function", "chat"),
    [
        (trl_of_word, False),
        (trl_of_column, False),
        (trl_of_dicts, False),
        (trl_of_either, False),
        (trl_of_prompts, True),
        (trl_of_anything, True),
        (trl_of_contents, True),
        (TrlOfMethod(), True),
    ],
)
def test_trls_functions_get_messages_if_they_read_messages(function: Any, chat: bool) -> None:
    prepared = reward_function(SPEC, function)
    assert (prepared.style, prepared.chat) == ("trl", chat)
    inputs = case("content", answer=4, content="con", meta={"content": "con"})
    assert values(prepared(inputs, [0])) == [1.0]


def test_a_trl_function_may_take_messages_by_position() -> None:
    prepared = reward_function(SPEC, lambda q, texts: [float(t[0]["content"] == "4") for t in texts], "trl")
    assert values(prepared(case("4", "5", answer=4), range(2))) == [1.0, 0.0]


def test_a_prompt_of_messages_does_not_make_the_completion_messages() -> None:
    inputs = replace(case("so: 4?", answer=4), prompt=[{"role": "user", "content": "4?"}])
    assert reward_function(SPEC, of_prompt).style == "completion"
    assert values(reward_function(SPEC, of_prompt)(inputs, [0])) == [1.0]


def test_a_style_may_be_forced_and_an_error_names_the_completions_type() -> None:
    inputs = case("4", answer=4)
    prepared = reward_function(SPEC, lambda messages: float(messages[0]["role"] == "assistant"), "verifiers")
    assert values(prepared(inputs, [0])) == [1.0]
    assert values(reward_function(SPEC, lambda q, text, a, b: float(text == "4"), "areal")(inputs, [0])) == [1.0]
    (score,) = reward_function(SPEC, borrowed.length_reward, "completion")(inputs, [0])
    assert "(the completion was a string; scoring.style sets a different form)" in score.detail
    (score,) = reward_function(SPEC, lambda completion: completion.strip(), "verifiers")(inputs, [0])
    assert "(the completion was a list of messages; scoring.style sets a different form)" in score.detail


def equals(completion: str, answer: int) -> float:
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
        (equals, "completion", [1.0, 0.0]),
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
def test_the_style_is_detected_by_the_parameters_names(
    function: Callable[..., Any], style: str, expected: list[float]
) -> None:
    prepared = reward_function(SPEC, function)
    assert prepared.style == style
    assert values(prepared(case("4", "...", answer=4), range(2))) == pytest.approx(expected)


def test_columns_are_passed_by_name_and_a_function_may_return_a_status() -> None:
    assert [score.status for score in scores(status_of, "a", level="hard")] == ["unparsable"]
    (score,) = scores(status_of, "a", level="easy")
    assert (score.status, score.value, dict(score.extra)) == ("wrong", 0.5, {"distance": 3.0})
    (score,) = scores(status_of, "a")
    assert score.status == "error"
    assert "needs level, but the prompt's columns are ()" in score.detail


def test_the_configs_arguments_go_to_the_parameter_of_that_name() -> None:
    prepared = reward_function(SPEC, of_length, args={"most": 3, "other": 1})
    assert values(prepared(case("abc"), [0])) == [1.0]
    assert "most" in prepared.arg_names
    assert "other" not in prepared.arg_names
    assert values(reward_function(SPEC, Counting, args={"start": 10})(case("abc"), [0])) == [11.0]


def test_a_style_is_taken_by_position_if_no_name_matches() -> None:
    assert values(
        reward_function(SPEC, lambda text, gold: float(text == gold), "completion")(case("4", answer="4"), [0])
    ) == [1.0]
    with pytest.raises(
        RloraError, match=r"reward = 'mine\.py:f': its parameters \(text, gold\) match no style; rename"
    ):
        reward_function(SPEC, lambda text, gold: 1.0)
    with pytest.raises(RloraError, match="there is no style 'tlr'"):
        reward_function(SPEC, equals, "tlr")  # type: ignore[arg-type]


def by_position(completion: str, /, answer: int) -> float:
    return float(completion == str(answer))


def hidden(*args: Any, **kwargs: Any) -> float:
    return equals(*args, **kwargs)


@functools.wraps(borrowed.async_reward_func)
def not_awaited(*args: Any, **kwargs: Any) -> list[float]:
    return [1.0, 2.0]


def test_decorators_and_parameters_by_position() -> None:
    assert values(scores(by_position, "4", "5")) == [1.0, 0.0]
    assert values(reward_function(SPEC, hidden, "completion")(case("4", "5", answer=4), range(2))) == [1.0, 0.0]
    assert not reward_function(SPEC, not_awaited).asynchronous  # though the function that it wraps is
    assert values(scores(not_awaited, "4", "5")) == [1.0, 2.0]


def raises(completion: str, answer: int) -> float:
    return 1 / (len(completion) - 1)


@pytest.mark.parametrize(
    ("function", "detail"),
    [
        (raises, r"test_signatures\.py:\d+: f raised ZeroDivisionError: division by zero; fix the function"),
        (lambda completion: float("nan"), r"test_signatures\.py:\d+: f returned nan; return a finite number"),
        (lambda completion: "right", r"f returned 'right'; return .* one of correct, wrong"),
        (lambda completion: {"points": 1}, r"f returned a dict without \"score\""),
    ],
)
def test_a_failure_is_an_error_that_names_the_users_file_and_line(function: Callable[..., Any], detail: str) -> None:
    (score,) = scores(function, "a")
    assert (score.status, score.value) == ("error", None)
    assert re.search(detail, score.detail)


def test_the_innermost_line_of_the_users_own_file_is_named() -> None:
    def calls(completion: str) -> float:
        return float(re.compile("(").search(completion) is not None)

    (score,) = scores(calls, "a")
    line = calls.__code__.co_firstlineno + 1
    assert re.search(rf"test_signatures\.py:{line}: f raised (re\.)?(error|PatternError): ", score.detail)


def test_a_function_may_modify_its_arguments() -> None:
    def spoils(completions: list[str], answers: list[dict[str, int]], words: list[str]) -> list[float]:
        completions.clear()
        answers[0]["it"] = 5
        return [1.0, 2.0] if words.pop() == "last" else [0.0, 0.0]

    inputs = case("a", "b", answer={"it": 4})
    prepared = reward_function(SPEC, spoils, args={"words": ["first", "last"]})
    assert values(prepared(inputs, range(2))) == values(prepared(inputs, range(2))) == [1.0, 2.0]
    assert inputs.answer == {"it": 4}
