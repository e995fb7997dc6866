"""The check before a run: it reports rewards that reward nothing or everything, and is silent about sound ones."""

# ruff: noqa: E501 - one case per line

import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from conftest import NEEDS_SHARED, ROOT, SHARED

from rlora.cli.arguments import Check
from rlora.cli.main import main
from rlora.cli.overrides import parse_source
from rlora.config import read
from rlora.records import RewardInput, RloraError, Score
from rlora.rollout import task
from rlora.rollout.check import Report
from rlora.rollout.golds import answer_texts, gold_faults
from rlora.scoring.pool import Pool
from rlora.scoring.worker import Setup, load_reward_functions
from rlora.settings import Config

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
    """Rewards a completion only if nothing precedes the tag."""
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

def hangs_on_nothing(completion, answer):
    while not completion:
        pass
    return float(completion == answer)

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


class InProcessPool:
    """A pool in this process, because processes take half a second to start. For functions that neither hang nor reply."""

    def __init__(self, setup: Setup, workers: int) -> None:
        self.functions = load_reward_functions(setup)
        self.names = [function.names for function in self.functions]

    def submit(self, group: RewardInput) -> Future[list[list[Score]]]:
        scored: Future[list[list[Score]]] = Future()
        scored.set_result([function(group, range(len(group.completions))) for function in self.functions])
        return scored

    def close(self) -> None:
        pass


@pytest.fixture
def check_rows(tmp_path: Path, config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Checks rows of a data set. A reward is a name in REWARDS, or a full spec."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)

    def run(rows: list[dict[str, Any]], reward: str | list[str], **changes: Any) -> Report:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        functions = [reward] if isinstance(reward, str) else reward
        if "env" not in changes:
            changes |= {
                "env": "rlora.envs.table:Table",
                "env_args": {"path": "rows.jsonl"} | changes.get("env_args", {}),
            }
        changes.setdefault("sampling", {"max_tokens": 8, "max_prompt_tokens": 200})
        needs_process = changes["env"] != "rlora.envs.table:Table" or "deadline" in changes.get("scoring", {})
        monkeypatch.setattr(task, "Pool", Pool if needs_process else InProcessPool)
        specs = [name if ":" in name else f"mine.py:{name}" for name in functions]
        return task.load_task(config(reward=specs, **changes)).checked

    return run


def rows_of(*golds: Any, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {n}?", "answer": gold, **columns} for n, gold in enumerate(golds)]


NUMBERS = rows_of(*(str(7 * n % 41) for n in range(1, 20)))
WORDS = rows_of("Paris", "the Nile", "Ada Lovelace", "gold", "blue whale")
SOLUTIONS = [
    {"prompt": f"{n}?", "solution": f"We add {n} and {n}, so it is twice {n}.\n#### {2 * n}", "final": str(3 * n % 7)}
    for n in (5, 3, 9, 1)
]


@pytest.mark.parametrize(
    ("rows", "reward", "changes", "named"),
    [
        # gold answers that a reward can't read
        (rows_of("four", "five", "six"), INTEGER, {}, r"3 of 3 gold answers can't be scored by integer_answer\. Likely: env_args\.answer = 'answer'"),
        (rows_of("4 apples", "5 pears", "7 figs"), "graded", {}, r"3 of 3 gold answers are not rewarded by graded.*env_args\.answer"),
        (rows_of("4", "five", "7"), "number", {}, r"five"),
        # full solutions: a model writes the text after #### or in the box
        (rows_of("We add.\n#### 3", "We add.\n#### 4", "So.\n#### 5"), "exact", {}, r"3 of 3 gold answers are not rewarded by exact in any form.*full solution"),
        (rows_of("So $\\boxed{3}$.", "So $\\boxed{\\frac{1}{2}}$.", "So $\\boxed{5}$."), "exact", {}, r"3 of 3 gold answers are not rewarded by exact.*full solution"),
        (rows_of(*(f"First we add {n}. Then we look. {'It goes on. ' * 20}So it is {n}." for n in (3, 4, 5))), "contains", {}, r"3 of 3 gold answers are full texts, such as 'First we add 3"),
        # a different type
        (rows_of(4, 5, 6), "exact", {}, r"3 of 3 gold answers are not rewarded by exact.*env_args\.answer.*type int"),
        # a different column
        (SOLUTIONS, "graded", {"env_args": {"answer": "solution"}}, r"4 of 4 gold answers are not rewarded .*env_args\.answer = 'solution': the gold answer is a full solution; set env_args\.answer_after"),
        ([row | {"id": n} for n, row in enumerate(NUMBERS)], INTEGER, {"env_args": {"answer": "id"}}, r"env_args\.answer = 'id': .*the rows also have 'answer'"),
        ([{"prompt": f"{n}?", "key": f"q-{n:03}"} for n in range(12)], MATH, {"env_args": {"answer": "key"}}, r"env_args\.answer = 'key': the gold answers \(q-000, q-001, q-002, \.\.\.\) are row numbers"),
        ([{"prompt": f"{n}?", "n": n} for n in range(12)], INTEGER, {"env_args": {"answer": "n"}}, r"env_args\.answer = 'n': the gold answers \(0, 1, 2, \.\.\.\) are row numbers"),
        ([{"prompt": f"{n}?", "row_id": f"{n * 7919:x}"} for n in range(3, 8)], MATH, {"env_args": {"answer": "row_id"}}, r"env_args\.answer = 'row_id': the gold answers"),
        (WORDS, "exact", {"env_args": {"answer": "prompt"}}, r"env_args\.answer = 'prompt': each gold answer is the prompt itself"),
        ([{"prompt": "a cat"}, {"prompt": "a dog"}], "exact", {"env_args": {"answer": "prompt"}}, r"each gold answer is the prompt itself"),
        ([row | {"level": f"Level {n % 3}"} for n, row in enumerate(NUMBERS)], MATH, {"env_args": {"answer": "level"}}, r"env_args\.answer = 'level': .*the rows also have 'answer'"),
        ([row | {"answer_type": "integer"} for row in NUMBERS], MATH, {"env_args": {"answer": "answer_type"}}, r"env_args\.answer = 'answer_type': .*the rows also have 'answer'"),
        ([row | {"result_idx": str(n)} for n, row in enumerate(NUMBERS)], MATH, {"env_args": {"answer": "result_idx"}}, r"env_args\.answer = 'result_idx': .*the rows also have 'answer'"),
        # a different style
        (NUMBERS, "by_place", {"scoring": {"style": "verl"}}, r"scoring\.style = 'verl'"),
        (NUMBERS, "by_place", {"scoring": {"style": "trl"}}, r"scoring\.style = 'trl'"),
        (NUMBERS, "by_place", {"scoring": {"style": "openrlhf"}}, r"scoring\.style = 'openrlhf'"),
        # gold answers that hedge, and empty ones
        (rows_of("7 or 8", "3", "5"), MATH, {}, r"1 of 3 gold answers name several answers, such as '7 or 8'"),
        (rows_of("A or B", "C", "D"), MATH, {}, r"1 of 3 gold answers name several answers, such as 'A or B'"),
        (rows_of("(A) or (C)", "(B)"), "exact", {}, r"gold answers name several answers"),
        (rows_of("", "3", "5"), MATH, {}, r"env_args\.answer = 'answer': 1 of 3 gold answers are empty \(the first is '', of prompt 0\)"),
        (rows_of("4", "3", " \n"), INTEGER, {}, r"1 of 3 gold answers are empty"),
        (rows_of("", "", ""), "exact", {}, r"3 of 3 gold answers are empty"),
        (rows_of("4", "3"), "exact", {"env_args": {"answer": ""}}, r"2 of 2 gold answers are empty"),
        (rows_of("$7$ or $8$", "3"), MATH, {}, r"1 of 2 gold answers name several answers"),
        (rows_of("\\boxed{7} or \\boxed{8}", "3"), MATH, {}, r"1 of 2 gold answers name several answers"),
        (rows_of("7 或 8", "about 7", "3"), MATH, {}, r"2 of 3 gold answers name several answers"),
        # texts that must not be rewarded
        (NUMBERS, "everything", {}, r"an empty completion is rewarded for 16 of 16 prompts by everything"),
        (NUMBERS, "empty_too", {}, r"an empty completion is rewarded for 16 of 16 prompts by empty_too"),
        (NUMBERS, "long_enough", {}, r"another prompt's gold answer is rewarded for 16 of 16 prompts by long_enough.*reward"),
        # a requested form that is not rewarded
        ([row | {"prompt": row["prompt"] + " End with #### and the number."} for row in NUMBERS], "tagged", {}, r"prompts ask for ####, which tagged does not reward; this function rewards .<answer>. instead"),
        # functions that fail
        (NUMBERS, "raises", {}, r"mine\.py:\d+: raises raised ZeroDivisionError"),
        (NUMBERS, "number", {}, r"mine\.py:\d+: number raised ValueError"),
        (NUMBERS, [INTEGER, "raises"], {}, r"mine\.py:\d+: raises raised"),
        (NUMBERS, "sleeps", {"scoring": {"deadline": 0.3, "first_deadline": 0}}, r"scoring\.deadline = 0\.3: the first call of sleeps took longer"),
        (NUMBERS, "raises", {}, r"gold answers can't be scored by raises. Likely: reward = '.*:raises', which raised an error; or "),
        # rewards that are too low
        (NUMBERS, "half", {}, r"evaluate\.threshold = 1: gold answers are rewarded less, so no answer counts as correct"),
        # how prompts begin and end
        (NUMBERS, INTEGER, {"chat": {"template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"}}, r"a prompt ends with the stop token '<\|im_end\|>'"),
        (NUMBERS, INTEGER, {"chat": {"template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"}}, r"a prompt ends with the stop token '<\|im_end\|>'"),
        (NUMBERS, INTEGER, {"chat": {"template": f"<|im_start|>{PLAIN}"}}, r"a prompt begins with '<\|im_start\|>' twice"),
        # thinking
        (NUMBERS, "strict_think", {"chat": {"template": THINKS}}, r"chat\.template: strict_think does not reward .*\n(.*\n)*.*gold answers are not rewarded by strict_think.*Likely: chat\.template"),
        (NUMBERS, "strict_think", {"chat": {"prefill": "Sure! "}}, r"chat\.prefill = 'Sure! ': strict_think does not reward"),
        (NUMBERS, "rlora.rewards.shaping:think", {"chat": {"template": f"{PLAIN}<thought>\n"}}, r"chat\.think = .*ends with '<thought>'"),
        (NUMBERS, MATH, {"chat": {"template": f"{PLAIN}[THINK]"}}, r"chat\.think = .*ends with '\[THINK\]'"),
        (NUMBERS, MATH, {"chat": {"template": f"{PLAIN}<seed:think>\n"}}, r"chat\.think = .*ends with '<seed:think>'"),
        (NUMBERS, MATH, {"chat": {"template": f"{PLAIN}◁think▷"}}, r"chat\.think = .*ends with '◁think▷'"),
        (NUMBERS, MATH, {"chat": {"template": f"{PLAIN}<analysis>"}}, r"chat\.think = .*ends with '<analysis>'"),
        (NUMBERS, "rlora.rewards.shaping:think", {"chat": {"template": THINKS.replace("<think>", "<think>Well.\n<think>")}}, r"chat\.template: <think> occurs twice"),
        (NUMBERS, "rlora.rewards.shaping:think_answer", {"chat": {"template": THINKS.replace("<think>", "<|begin_of_thought|>")}}, r"chat\.think = "),
    ],
)  # fmt: skip
def test_a_fault_is_named(
    rows: list[dict[str, Any]],
    reward: str | list[str],
    changes: dict[str, Any],
    named: str,
    check_rows: Callable[..., Report],
) -> None:
    report = check_rows(rows, reward, **changes)
    assert report.faults
    assert re.search(named, str(report)), str(report)
    assert all(len(fault.examples) <= 3 for fault in report.faults)


def assert_sound(report: Report, *notes: str) -> None:
    """Assert that there are no faults, and exactly these notes."""
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
        (rows_of(*range(2, 40)), INTEGER, {}),  # sorted, as small data sets are
        ([{"prompt": f"{n}+1?", "sum": n + 1} for n in range(1, 30)], INTEGER, {"env_args": {"answer": "sum"}}),
        ([{"prompt": f"{n}?", "key": "ABCD"[n % 4]} for n in range(1, 30)], "exact", {"env_args": {"answer": "key"}}),
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
def test_sound_rewards_cause_no_warning(
    rows: list[dict[str, Any]], reward: str | list[str], changes: dict[str, Any], check_rows: Callable[..., Report]
) -> None:
    assert_sound(check_rows(rows, reward, **changes))


@pytest.mark.parametrize(
    ("rows", "reward", "changes", "note"),
    [
        (NUMBERS, "short", {}, "short: no function asks for the answer"),
        (NUMBERS, "trl_length", {}, "trl_length: no function asks for the answer"),
        (NUMBERS, "rlora.rewards.shaping:repeated", {}, "repeated: no function asks"),
        (NUMBERS, "rlora.rewards.shaping:think_answer", {"chat": {"template": THINKS}}, "no function asks"),
        (NUMBERS, "rlora.rewards.shaping:think", {"chat": {"template": PLAIN, "prefill": "<think>\n"}}, "no function asks"),
        ([row | {"solution": "4"} for row in NUMBERS], "skips", {"env_args": {"answer": ""}}, "skips: the function scored none"),
        (rows_of(*[24] * 12), INTEGER, {}, r"no other prompt's gold answer could be tried, because .* is the same for all prompts, 24"),
        (rows_of("4"), "short", {"env_args": {"answer": ""}}, "no gold answer could be tried"),
        (NUMBERS, "slow", {}, r"the reward functions are slow, and were tried on \d+ of 16 prompts"),
    ],
)  # fmt: skip
def test_what_can_not_be_tried_is_one_note(
    rows: list[dict[str, Any]], reward: str, changes: dict[str, Any], note: str, check_rows: Callable[..., Report]
) -> None:
    report = check_rows(rows, reward, **changes)
    assert not report.faults, str(report)
    assert len(report.notes) == 1, str(report)
    assert re.search(note, report.notes[0]), str(report)


BORROWED = str(ROOT / "tests" / "borrowed_rewards.py")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("reward_len", "note: reward_len: no function asks"),
        ("reward_num_unique_chars", "note: reward_num_unique_chars: no function asks"),
        ("boxed_reward_func", ""),
        ("async_reward_func", "note: async_reward_func: no function asks"),
        ("logging_reward_func", r"borrowed_rewards\.py:\d+: logging_reward_func raised IndexError"),  # on no text
        ("my_reward_fn", "note: my_reward_fn: no function asks"),
        ("compute_score", ""),
        ("compute_score_dict", ""),
        ("compute_score_batched", ""),
        ("reward_func", "note: reward_func: no function asks"),
        ("reward_func_of_lengths", "note: reward_func_of_lengths: no function asks"),
    ],
)
def test_functions_from_elsewhere(name: str, found: str, check_rows: Callable[..., Report]) -> None:
    report = check_rows(NUMBERS, f"{BORROWED}:{name}")
    assert re.search(found or r"\A\Z", str(report)), str(report)
    assert bool(report.faults) == ("raised" in found)


def test_dates_of_a_column_of_dates_are_named(check_rows: Callable[..., Report], tmp_path: Path) -> None:
    """As Parquet has them; in JSON they are text, and stay so."""
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    days = [date(2024, 1, day) for day in range(1, 9)]
    pq.write_table(pa.table({"prompt": [f"{n}?" for n in range(8)], "answer": days}), tmp_path / "days.parquet")
    report = check_rows([], "exact", env_args={"path": "days.parquet"})
    assert re.search(
        r"8 of 8 gold answers are not rewarded .*env_args\.answer = 'answer': the gold answer is a date", str(report)
    )
    assert_sound(check_rows(rows_of(*map(str, days)), "exact"))


def test_held_out_prompts_are_tried_too(check_rows: Callable[..., Report], tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of("four", "five", "six")))
    report = check_rows(NUMBERS, "graded", env_args={"held_out_path": "test.jsonl"})
    assert re.search(r"3 of 16 gold answers are not rewarded by graded", str(report))


def test_a_sample_is_tried_and_a_hang_costs_one_deadline(check_rows: Callable[..., Report]) -> None:
    assert check_rows(NUMBERS, "exact", check={"prompts": 5}).prompts == 5
    assert check_rows(NUMBERS, "exact", check={"prompts": 0}) == Report()
    report = check_rows(NUMBERS, "sleeps", scoring={"deadline": 0.3, "first_deadline": 0})
    assert report.seconds < 4
    assert len(report.faults) == 1
    report = check_rows(NUMBERS, "hangs_on_nothing", scoring={"deadline": 0.5, "first_deadline": 0})
    assert report.seconds < 9
    assert re.search(r"more than scoring\.deadline = 0\.5 s", str(report))


def test_strict_is_an_error(check_rows: Callable[..., Report]) -> None:
    assert_sound(check_rows(NUMBERS, "exact", check={"strict": True}))
    with pytest.raises(
        RloraError, match=r"check\.strict = true: .*\nwarning: 3 of 3 gold answers are not rewarded by exact"
    ):
        check_rows(rows_of(1, 2, 3), "exact", check={"strict": True})


OWN = """
from rlora.records import Prompt

class Own:
    def __init__(self, kind="right"):
        self.kind = kind
    def train(self):
        return [Prompt(f"Make {n}.", answer={"make": n}, columns={"n": n}) for n in range(2, 9)]
    def held_out(self):
        return []

class Solved(Own):
    def solution(self, prompt):
        if self.kind == "raises":
            raise KeyError("none")
        return None if self.kind == "none" else f"{prompt.columns['n'] - (self.kind == 'right')} + 1"

class Agent(Own):
    def reply(self, prompt, message, state):
        state["message"] = message.removeprefix("say ")
        if self.kind == "raises":
            raise ValueError("no such move")
        return "go on" if self.kind == "talks" else None

class Speaking(Agent):
    def solution(self, prompt):
        return f"say {prompt.columns['n']}"

def sums_up(completion, answer):
    left, plus, right = completion.partition(" + ")
    return float(plus == " + " and int(left) + int(right) == answer["make"])

def says_answer(answer, state):
    return float(state["message"] == str(answer["make"]))
"""


@pytest.mark.parametrize(
    ("env", "kind", "reward", "found"),
    [
        ("Own", "right", "sums_up", r"7 of 7 gold answers are not rewarded by sums_up.*solution\(prompt\)"),
        ("Solved", "right", "sums_up", ""),
        ("Solved", "wrong", "sums_up", "7 of 7 gold answers are not rewarded by sums_up"),
        ("Solved", "none", "sums_up", "note: no gold answer could be tried"),
        ("Solved", "raises", "sums_up", r"own\.py:\d+: env = .*: its solution raised KeyError: 'none'"),
        ("Agent", "right", "says_answer", r"7 of 7 gold answers are not rewarded by says_answer.*solution\(prompt\)"),
        ("Speaking", "right", "says_answer", ""),
        ("Speaking", "talks", "says_answer", ""),
        ("Speaking", "raises", "says_answer", r"reply\(\) raised ValueError: no such move"),
    ],
)
def test_an_env_may_provide_solutions(
    env: str, kind: str, reward: str, found: str, check_rows: Callable[..., Report], tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    report = check_rows([], f"own.py:{reward}", env=f"own.py:{env}", env_args={"kind": kind})
    assert re.search(found or r"\A\Z", str(report)), str(report)


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic-ppo", "calculator", "stories", "countdown"])
def test_launch_files_have_no_fault(name: str) -> None:
    report = task.load_task(read(ROOT / "launch" / f"{name}.toml")).checked
    assert_sound(report)
    assert (report.prompts, report.seconds < 5) == (16, True)


@NEEDS_SHARED
@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("gsm8k", {"path": "gsm8k"}),
        ("python-tool", {"path": "gsm8k"}),
        ("competition-math", {"path": "math_train", "held-out-path": "math500"}),
    ],
)
def test_launch_files_over_data_sets_have_no_fault(name: str, paths: dict[str, str]) -> None:
    arguments = [part for key, path in paths.items() for part in (f"--env-args.{key}", str(SHARED / "data" / path))]
    options = parse_source(Check, "rlora check", [str(ROOT / "launch" / f"{name}.toml"), *arguments])
    report = task.load_task(options.config).checked
    assert_sound(report)
    assert (report.prompts, report.seconds < 5) == (16, True)


def test_the_command_prints_faults_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["rlora", "check", str(ROOT / "launch" / "arithmetic.toml"), *arguments])
        try:
            main()
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)
    assert run() == 0
    assert re.search(r"^16 prompts tried in [\d.]+ s with .*integer_answer: no faults$", capsys.readouterr().out, re.M)
    assert run("--reward", "mine.py:exact") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("with mine.py:exact: 1 fault")
    assert lines[1].startswith("warning: 16 of 16 gold answers are not rewarded by exact in any form. Likely: env = ")
    assert len(lines) == 5
    assert re.search(r"prompt 'What is \d+ \+ \d+\?', gold \d+, completion '\d+': 0$", lines[2])
    assert run("--reward", "mine.py:exact", "--check.strict") == 1
    assert "rlora: check.strict = true" in capsys.readouterr().err
    assert run("--check.prompts", "0") == 1
    assert "check.prompts = 0" in capsys.readouterr().err


def test_a_gold_with_half_of_a_character_does_not_end_the_check(
    check_rows: Callable[..., Report], tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(
        "from rlora.records import Prompt\n\nclass Own:\n    def train(self):\n"
        '        return [Prompt("one?", answer="x \\ud83d"), Prompt("two?", answer="y")]\n'
        "    def held_out(self):\n        return []\n"
    )
    report = check_rows([], "exact", env="own.py:Own")
    assert "1 of 2 gold answers are not rewarded by exact" in str(report)


def test_texts_of_gold_answers_and_hedges() -> None:
    assert [answer_texts(gold) for gold in (4, 4.0, " 4 ", None, " ", float("nan"), [], ["a", "b"])] == [
        ["4"], ["4.0", "4"], ["4"], [], [], [], [], ["a", "b"],
    ]  # fmt: skip
    hedged = ["7 or 8", "A or B", "(A) or (B)", "option A or option C", "A/B", "4 apples or 5 apples", "yes or no",
              "either 3 or 4", "maybe 7", "7, 8, or 9", "four or five", "7 (or 8)", "-1 or 1.5", "about 7", "$7$ or $8$",
              "7或8"]  # fmt: skip
    sound = ["Truth or Dare", "7", "1/2", "A", "1, 2", "[7, 8]", r"x = 1 \text{ or } x = 2", "x=1 or x=2", "and/or", "a or b or c?",
             "oregano", "AB/CD", "x > 3 or x < 1", "A|B"]  # fmt: skip
    assert not [gold for gold in hedged if not [*gold_faults([gold], "")]]
    assert not [gold for gold in sound if [*gold_faults([gold], "")]]
