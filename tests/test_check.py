"""The check before a run: it names what pays nobody or everybody, and is silent about what is right."""

import json
import re
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from conftest import NEEDS_SHARED, ROOT, SHARED

from rlora.check import Report
from rlora.cli import main
from rlora.config import Config, read
from rlora.golds import faults_of_golds, written
from rlora.options import parse_check
from rlora.records import RloraError
from rlora.task import load_task

MakeConfig = Callable[..., Config]
MATH, INTEGER = "rlora.rewards.equivalence:math_answer", "rlora.rewards.integer:integer_answer"
THINKS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n<think>\n"
PLAIN = THINKS.removesuffix("<think>\n")

REWARDS = '''
import math, re, time

def exact(completion, answer):
    return float(completion.strip() == answer)

def exact_text(completion, answer):
    return float(completion.strip() == str(answer))

def by_place(text, truth):
    return float(text.strip() == truth)

def contains(completion, answer):
    return float(str(answer) in completion)

def close(completion, answer):
    numbers = re.findall(r"-?\\d+", completion)
    return 1 / (1 + abs(int(numbers[-1]) - int(answer))) if numbers else 0.0

def ten(completion, answer):
    return 10.0 if str(answer) in completion.split() else -1.0

def tagged(completion, answer):
    found = re.search(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return float(bool(found) and found[1].strip() == str(answer))

def strict_think(completion, answer):
    """Begins with the answer's tag: nothing may stand before it."""
    return float(completion.strip() == f"<answer>{answer}</answer>")

def everything(completion, answer):
    return 1.0

def long_enough(completion, answer):
    return float(len(completion) > 0)

def empty_too(completion, answer):
    return float(not completion or str(answer) in completion)

def graded(solution_str, ground_truth, data_source="", extra_info=None):
    found = re.findall(r"#### (-?[0-9.,]+)", solution_str)
    return 0.0 if not found else 1.0 if found[-1] == ground_truth else 0.1

def trl(completions, **kwargs):
    return [float(c.strip() == a) for c, a in zip(completions, kwargs["solution"])]

def trl_length(completions, **kwargs):
    return [-abs(20 - len(c)) for c in completions]

def skips(completions, solution, **kwargs):
    return [None for _ in completions]

def raises(completion, answer):
    return int(completion) / (len(answer) - len(answer))

def number(completion, answer):
    return float(int(completion) == int(answer))

def sleeps(completion, answer):
    time.sleep(30)

def slow(completion, answer):
    time.sleep(0.4)
    return float(str(answer) in completion)

def any_of(completion, answer):
    return float(completion in answer)

def half(completion, answer):
    return 0.5 * (completion == answer)

def wrong_is_punished(completion, answer):
    return 0.0 if answer in completion.split() else -1.0

def skips_others(completions, answer, level=None, **kwargs):
    return [None if level is None else 0.0 for _ in completions]

def short(completion_ids):
    return float(len(completion_ids) < 50)
'''


@pytest.fixture
def checked(tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The report on rows of a data set, with a reward by its name above or in full."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)

    def run(rows: list[dict[str, Any]], reward: str | list[str], **changes: Any) -> Report:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        specs = [f"mine.py:{each}" if ":" not in each else each for each in ([reward] if isinstance(reward, str) else reward)]
        settings: dict[str, Any] = {"env": "rlora.envs.table:Table", "sampling": {"max_tokens": 8, "max_prompt_tokens": 200}}
        settings["env_args"] = {"path": "rows.jsonl", **changes.pop("env_args", {})}
        return load_task(config(**settings | {"reward": specs} | changes)).checked

    return run


def rows_of(*golds: Any, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {n}?", "answer": gold, **columns} for n, gold in enumerate(golds)]


NUMBERS = rows_of(*(str(7 * n % 41) for n in range(1, 20)))
WORDS = rows_of("Paris", "the Nile", "Ada Lovelace", "gold", "blue whale")
SOLUTIONS = [{"prompt": f"{n}?", "solution": f"We add {n} and {n}, so it is twice {n}.\n#### {2 * n}", "final": str(3 * n % 7)} for n in (5, 3, 9, 1)]


@pytest.mark.parametrize(
    ("rows", "reward", "changes", "named"),
    [
        # golds that a reward can't read
        (rows_of("four", "five", "six"), INTEGER, {}, r"3 of 3 golds are not paid .*Likely: env_args\.answer = 'answer'|integer_answer"),
        (rows_of("4 apples", "5 pears", "7 figs"), "graded", {}, r"3 of 3 golds are not paid by graded.*env_args\.answer"),
        (rows_of("4", "five", "7"), "number", {}, r"five"),
        # another type
        (rows_of(4, 5, 6), "exact", {}, r"3 of 3 golds are not paid by exact.*env_args\.answer.*type int"),
        # another column
        (SOLUTIONS, "graded", {"env_args": {"answer": "solution"}}, r"4 of 4 golds are not paid .*env_args\.answer = 'solution': the gold is a whole solution; env_args\.answer_after"),
        ([row | {"id": n} for n, row in enumerate(NUMBERS)], INTEGER, {"env_args": {"answer": "id"}}, r"env_args\.answer = 'id': .*the rows have 'answer'"),
        ([{"prompt": f"{n}?", "key": f"q-{n:03}"} for n in range(12)], MATH, {"env_args": {"answer": "key"}}, r"env_args\.answer = 'key': golds count up"),
        (WORDS, "exact", {"env_args": {"answer": "prompt"}}, r"env_args\.answer = 'prompt': .*the rows have 'answer'"),
        ([{"prompt": "a cat"}, {"prompt": "a dog"}], "exact", {"env_args": {"answer": "prompt"}}, r"each gold is the prompt itself"),
        ([row | {"level": f"Level {n % 3}"} for n, row in enumerate(NUMBERS)], MATH, {"env_args": {"answer": "level"}}, r"env_args\.answer = 'level': .*the rows have 'answer'"),
        # another style
        (NUMBERS, "by_place", {"scoring": {"style": "verl"}}, r"scoring\.style = 'verl'"),
        (NUMBERS, "by_place", {"scoring": {"style": "trl"}}, r"scoring\.style = 'trl'"),
        (NUMBERS, "by_place", {"scoring": {"style": "openrlhf"}}, r"scoring\.style = 'openrlhf'"),
        # golds that hedge, and none
        (rows_of("7 or 8", "3", "5"), MATH, {}, r"1 of 3 golds give several answers, as '7 or 8'"),
        (rows_of("A or B", "C", "D"), MATH, {}, r"1 of 3 golds give several answers, as 'A or B'"),
        (rows_of("(A) or (C)", "(B)"), "exact", {}, r"golds give several answers"),
        (rows_of("", "3", "5"), MATH, {}, r"env_args\.answer = 'answer': 1 of 3 golds are empty \(the first is '', of prompt 0\)"),
        (rows_of("4", "3", " \n"), INTEGER, {}, r"1 of 3 golds are empty"),
        (rows_of("", "", ""), "exact", {}, r"3 of 3 golds are empty"),
        (rows_of("4", "3"), "exact", {"env_args": {"answer": ""}}, r"2 of 2 golds are empty"),
        # what is paid too
        (NUMBERS, "everything", {}, r"an empty completion is paid for 16 of 16 prompts by everything"),
        (NUMBERS, "empty_too", {}, r"an empty completion is paid for 16 of 16 prompts by empty_too"),
        (NUMBERS, "long_enough", {}, r"another prompt's gold is paid for 16 of 16 prompts by long_enough.*reward"),
        # a form that is not paid
        ([row | {"prompt": row["prompt"] + " End with #### and the number."} for row in NUMBERS], "tagged", {}, r"prompts ask for ####, which tagged does not pay, but for '<answer>'"),
        # what fails
        (NUMBERS, "raises", {}, r"mine\.py:\d+: raises raised ZeroDivisionError"),
        (NUMBERS, "number", {}, r"mine\.py:\d+: number raised ValueError"),
        (NUMBERS, [INTEGER, "raises"], {}, r"mine\.py:\d+: raises raised"),
        (NUMBERS, "sleeps", {"scoring": {"deadline": 0.3}}, r"scoring\.deadline = 0\.3: the first call of sleeps took longer"),
        # how prompts begin and end
        (NUMBERS, INTEGER, {"chat": {"template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"}}, r"a prompt ends with the stop token '<\|im_end\|>'"),
        (NUMBERS, INTEGER, {"chat": {"template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"}}, r"a prompt ends with the stop token '<\|im_end\|>'"),
        (NUMBERS, INTEGER, {"chat": {"template": f"<|im_start|>{PLAIN}"}}, r"a prompt begins with '<\|im_start\|>' twice"),
        # thinking
        (NUMBERS, "strict_think", {"chat": {"template": THINKS}}, r"chat\.template: strict_think does not pay .*\n(.*\n)*.*golds are not paid by strict_think.*Likely: chat\.template"),
        (NUMBERS, "strict_think", {"chat": {"prefill": "Sure! "}}, r"chat\.prefill = 'Sure! ': strict_think does not pay"),
        (NUMBERS, "rlora.rewards.shaping:think", {"chat": {"template": f"{PLAIN}<thought>\n"}}, r"chat\.think = .*ends with '<thought>'"),
        (NUMBERS, "rlora.rewards.shaping:think_answer", {"chat": {"template": THINKS.replace("<think>", "<|begin_of_thought|>")}}, r"chat\.think = "),
    ],
)  # fmt: skip
def test_a_fault_is_named(
    rows: list[dict[str, Any]], reward: str | list[str], changes: dict[str, Any], named: str, checked: Callable[..., Report]
) -> None:
    report = checked(rows, reward, **changes)
    assert report.faults
    assert re.search(named, str(report)), str(report)
    assert all(len(fault.examples) <= 3 for fault in report.faults)


def enough(report: Report, *notes: str) -> None:
    """No fault, and the notes that are expected."""
    assert not report.faults, str(report)
    assert len(report.notes) == len(notes), str(report)
    assert all(re.search(*pair) for pair in zip(notes, report.notes, strict=True)), str(report)
    assert report.prompts > 0


CHOICES = rows_of(*"ABCDABDCABDD")
TAGGED = [row | {"prompt": row["prompt"] + " Give the answer in <answer> </answer>."} for row in NUMBERS]


@pytest.mark.parametrize(
    ("rows", "reward", "changes"),
    [
        (NUMBERS, "exact", {}),
        (NUMBERS, "exact_text", {}),
        (rows_of(4, 5.0, 6.5, -3), "exact_text", {}),
        (rows_of(4, 5, 12, 2, 20, 34, 17), INTEGER, {}),
        (rows_of(True, False, False), "exact_text", {}),
        (rows_of(["Paris", "paris"], ["Rome"], ["Oslo", "OSLO"]), "any_of", {}),
        (NUMBERS, "close", {}),
        (NUMBERS, "ten", {}),
        (NUMBERS, "contains", {}),
        (TAGGED, "tagged", {}),
        (NUMBERS, "tagged", {}),
        (TAGGED, "strict_think", {"chat": {"template": PLAIN}}),
        (NUMBERS, "by_place", {"scoring": {"style": "completion"}}),
        ([row | {"prompt": row["prompt"] + " Answer after ####."} for row in NUMBERS], "graded", {}),
        ([{"prompt": row["prompt"], "solution": row["answer"]} for row in NUMBERS], "trl", {"env_args": {"answer": ""}}),
        ([row | {"solution": row["answer"], "answer": "see there"} for row in NUMBERS], "trl", {}),
        ([row | {"extra": {"answer": row["answer"]}} for row in NUMBERS], "graded", {"env_args": {"answer": "extra.answer"}}),
        (SOLUTIONS, "graded", {"env_args": {"answer": "solution", "answer_after": "####"}}),
        (SOLUTIONS, MATH, {"env_args": {"answer": "solution"}}),
        (SOLUTIONS, "exact_text", {"env_args": {"answer": "final"}}),
        (WORDS, MATH, {}),
        (CHOICES, MATH, {}),
        (rows_of(r"x \ne 2", r"\frac{1}{2}", r"(3, \infty)", r"\{1, 2\}", "3/7", r"x = 1 \text{ or } x = 3"), MATH, {}),
        (rows_of("Truth or Dare", "Trick or Treat", "yes"), "exact", {}),
        (NUMBERS, MATH, {"chat": {"prefill": "\\boxed{"}}),
        (NUMBERS, MATH, {"chat": {"prefill": "The answer is "}}),
        (NUMBERS, MATH, {"chat": {"template": THINKS}}),
        (NUMBERS, MATH, {"chat": {"template": PLAIN, "prefill": "<think>\n"}}),
        (NUMBERS, MATH, {"chat": {"template": THINKS.replace("<think>", "<thought>"), "think": ["<thought>", "</thought>"]}}),
        (NUMBERS, ["exact", "rlora.rewards.shaping:short", "rlora.rewards.shaping:shortest"], {}),
        (NUMBERS, ["rlora.rewards.shaping:think_answer", MATH], {"chat": {"template": THINKS}}),
        (NUMBERS, ["rlora.rewards.shaping:think", "tagged"], {"chat": {"template": PLAIN}}),
        (NUMBERS, ["skips_others", MATH], {}),
        (NUMBERS, "wrong_is_punished", {"evaluate": {"threshold": 0.0}}),
        (NUMBERS, MATH, {"scoring": {"correct": 0.0, "wrong": -1.0, "unparsable": -2.0}}),
    ],
)  # fmt: skip
def test_what_is_right_is_not_warned_of(
    rows: list[dict[str, Any]], reward: str | list[str], changes: dict[str, Any], checked: Callable[..., Report]
) -> None:
    enough(checked(rows, reward, **changes))


@pytest.mark.parametrize(
    ("rows", "reward", "changes", "note"),
    [
        (NUMBERS, "short", {}, "short: no function asks for the answer"),
        (NUMBERS, "trl_length", {}, "trl_length: no function asks for the answer"),
        (NUMBERS, "rlora.rewards.shaping:repeated", {}, "repeated: no function asks"),
        (NUMBERS, "rlora.rewards.shaping:think_answer", {"chat": {"template": THINKS}}, "no function asks"),
        (NUMBERS, "rlora.rewards.shaping:think", {"chat": {"template": PLAIN, "prefill": "<think>\n"}}, "no function asks"),
        ([row | {"solution": "4"} for row in NUMBERS], "skips", {"env_args": {"answer": ""}}, "skips: it says nothing"),
        (rows_of(*[24] * 12), INTEGER, {}, r"no other prompt's gold could be tried, for .* gives each prompt the same, 24"),
        (rows_of("4"), "short", {"env_args": {"answer": ""}}, "no gold could be tried"),
        (NUMBERS, "half", {}, r"evaluate\.threshold = 1: golds are paid less"),
        (NUMBERS, "slow", {}, r"the rewards are slow, and were tried on \d+ of 16 prompts"),
    ],
)  # fmt: skip
def test_what_can_not_be_tried_is_told_in_a_line(
    rows: list[dict[str, Any]], reward: str, changes: dict[str, Any], note: str, checked: Callable[..., Report]
) -> None:
    report = checked(rows, reward, **changes)
    assert not report.faults, str(report)
    assert len(report.notes) == 1, str(report)
    assert re.search(note, report.notes[0]), str(report)
