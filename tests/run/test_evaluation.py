"""Evaluation beside training: what is due, what engines are asked, and what a death costs."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from upath import UPath

from rlora.config import validate
from rlora.records import Adapter, Group, Prompt, RewardError, RloraError, Sampling
from rlora.rollout.task import load_task
from rlora.run import directory
from rlora.run.evaluation import HeldOut
from rlora.settings import Config

PROMPTS = [Prompt("?", number, (number,)) for number in (1, 2, 3, 4)]


class Loop:
    """In place of the agent loop: keeps what it was asked, and answers when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Sampling, int, bool, Future[Group]]] = []
        self.scoring = SimpleNamespace(refuse_errors=lambda groups: None)

    def start(
        self, prompt: Prompt, sampling: Sampling, step: int, adapter: Adapter, background: bool
    ) -> SimpleNamespace:
        scored: Future[Group] = Future()
        self.asked.append((prompt.answer, sampling, adapter.number, background, scored))
        return SimpleNamespace(scored=scored, played=None)

    def answer(self, right: int) -> None:
        """Answer all that was asked, so many of each set of four rightly."""
        for number, sampling, _, _, scored in self.asked:
            status = "correct" if number <= right else "wrong"
            episodes = [
                SimpleNamespace(status=status, reward=float(number <= right)) for _ in range(sampling.group_size)
            ]
            if not scored.done():
                scored.set_result(SimpleNamespace(episodes=episodes))  # type: ignore[arg-type]


class Fleet:
    def __init__(self) -> None:
        self.swapped: list[int] = []

    def swap(self, adapter: Adapter, oldest: int = 0, kept: int | None = None) -> list[Any]:
        self.swapped.append(adapter.number)
        return []

    def check(self) -> None:
        raise AssertionError("nothing hangs")


BEFORE = {f"accuracy/{name}{end}": 0.5 for name in ("before", "hard/before") for end in ("", "/low", "/high")} | {
    "reward/before": 0.25, "reward/hard/before": 0.75,
}  # fmt: skip


@pytest.fixture
def made(config: Callable[..., Config], tmp_path: Path) -> Callable[..., tuple[HeldOut, Loop, Fleet]]:
    def make(lines: list[dict[str, Any]] | None = None, **evaluate: Any) -> tuple[HeldOut, Loop, Fleet]:
        (tmp_path / directory.METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines or []))
        settings = config(steps=10, evaluate={"every": 2} | evaluate)
        task: Any = SimpleNamespace(sets={"held_out": PROMPTS, "hard": PROMPTS})
        loop, fleet = Loop(), Fleet()
        return HeldOut(settings, UPath(tmp_path), task, 0, fleet, loop, print), loop, fleet  # type: ignore[arg-type]

    return make


def adapter(number: int) -> Adapter:
    return Adapter("run", number, b"{}", b"")


def test_versions_that_are_due_are_evaluated_beside_training(made: Any, tmp_path: Path) -> None:
    held_out, loop, _ = made()
    directory.summarise(UPath(tmp_path), BEFORE)  # a run that goes on
    for number in (0, 1):
        held_out.start(adapter(number))
    assert loop.asked == []
    held_out.start(adapter(2))
    held_out.start(adapter(2))  # a run that goes on at 2
    assert [asked[:4] for asked in loop.asked] == [
        (n, Sampling(8, 0.0, 1), 2, True) for _ in ("held_out", "hard") for n in (1, 2, 3, 4)
    ]
    assert held_out.version == 2
    assert held_out.figures(3) == {}
    loop.answer(3)
    figures = held_out.figures(3)
    assert figures["accuracy/version"] == 2
    assert figures["accuracy/held_out"] == figures["accuracy/hard"] == 0.75
    assert 0.3 < figures["accuracy/hard/low"] < 0.75 < figures["accuracy/hard/high"] < 1.0
    assert held_out.figures(3) == {}
    assert held_out.version is None
    assert directory.summary(UPath(tmp_path))["accuracy/hard"] == 0.75
    assert [asked[2] for asked in loop.asked] == [2] * 8
    held_out.start(adapter(10))  # the last one: before all else
    assert {asked[2:4] for asked in loop.asked[8:]} == {(10, False)}


@pytest.mark.parametrize("every", [1, 2])
def test_each_evaluation_is_told_in_one_line(every: int, made: Any) -> None:
    """Also where it is slow: a line waits for it before the next is due, and before the end."""
    held_out, loop, _ = made(every=every)
    told = []
    for number in range(1, 11):
        answering = threading.Timer(0.02, loop.answer, [2])
        answering.start()
        told.append(held_out.figures(number).get("accuracy/version"))
        answering.join()
        loop.asked.clear()
        held_out.start(adapter(number))
    assert [version for version in told if version] == list(range(every, 10, every))
    assert held_out.version == 10


def test_a_resume_does_not_evaluate_twice(made: Any) -> None:
    known = [{"step": 3, "accuracy/version": 2}, {"step": 4, "accuracy/version": 4}]
    held_out, loop, _ = made(known)
    held_out.resume(4)
    held_out.start(adapter(4))
    assert loop.asked == []
    held_out, loop, _ = made(known[:1])
    held_out.start(adapter(4))  # which was under way
    assert {asked[2] for asked in loop.asked} == {4}


def test_before_and_after_are_waited_for(made: Any, tmp_path: Path) -> None:
    held_out, loop, _ = made(every=0, samples=2)
    held_out.start(adapter(0))
    assert loop.asked[0][1:4] == (Sampling(8, 1.0, 2), 0, False)  # before what training asks for
    answering = threading.Timer(0.02, loop.answer, [2])
    answering.start()
    assert held_out.figures(1) == {}
    summary = directory.summary(UPath(tmp_path))
    assert summary["accuracy/before"] == summary["accuracy/hard/before"] == summary["reward/before"] == 0.5
    assert summary["accuracy/prompts"] == 4
    assert held_out.version is None
    loop.asked.clear()
    held_out.start(adapter(0))  # a run that was killed in its first step and goes on
    assert loop.asked == []
    held_out.start(adapter(10))
    assert loop.asked[0][1:4] == (Sampling(8, 1.0, 2), 10, False)
    loop.answer(2)
    held_out.end()
    assert directory.summary(UPath(tmp_path))["accuracy/hard/after"] == 0.5


def test_the_first_line_has_the_accuracy_before(made: Any, tmp_path: Path) -> None:
    """Where versions are evaluated beside training; also of a run that was killed before it had that line."""
    held_out, loop, _ = made()
    held_out.start(adapter(0))
    loop.answer(3)
    figures = held_out.figures(1)
    assert (figures["accuracy/version"], figures["accuracy/hard"]) == (0, 0.75)
    directory.summarise(UPath(tmp_path), BEFORE)
    held_out, loop, _ = made()
    held_out.start(adapter(0))
    assert loop.asked == []
    figures = held_out.figures(1)
    assert figures["accuracy/version"] == 0
    assert (figures["accuracy/held_out/low"], figures["accuracy/hard/high"]) == (0.5, 0.5)
    assert (figures["accuracy/held_out/reward"], figures["accuracy/hard/reward"]) == (0.25, 0.75)
    assert held_out.figures(2) == {}


def test_rewards_that_fail_end_the_run(made: Any) -> None:
    held_out, loop, _ = made()

    def refuse(groups: Any) -> None:
        raise RewardError("8 of 8 episodes are in error")

    loop.scoring.refuse_errors = refuse
    held_out.start(adapter(2))
    loop.answer(0)
    assert held_out.figures(3) == {}  # the step's own figures and its bundle are saved first
    with pytest.raises(RewardError, match="8 of 8"):
        held_out.refuse()


def test_a_damaged_bundle_is_not_evaluated(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out, loop, _ = made()
    (tmp_path / "bundles" / "2").mkdir(parents=True)
    held_out.resume(3)
    assert loop.asked == []
    assert "version 2 is not evaluated: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("evaluate", "checkpoint", "message"),
    [
        ({"sets": {"before": {}}}, {}, r"evaluate\.sets = .*before: use letters, digits and _, and none of held_out"),
        ({"sets": {"a/b": {}}}, {}, r"evaluate\.sets = .*a/b: use letters"),
        ({"sets": {"hard": {"prompts": 0}}}, {}, r"evaluate\.sets\.hard\.prompts = 0: .*The number of prompts"),
        ({"sets": {"hard": {"promts": 3}}}, {}, r"evaluate\.sets\.hard\.promts = 3: no such field"),
        ({"every": -1}, {}, r"evaluate\.every = -1"),
        ({}, {"best_by": "accuracy"}, r"checkpoint\.best_by = 'accuracy': .*evaluate\.every"),
        ({"every": 20}, {"best_by": "accuracy"}, r"checkpoint\.keep_last = 20: with evaluate\.every = 20"),
    ],
)
def test_what_makes_no_sense_is_refused(
    evaluate: dict[str, Any], checkpoint: dict[str, Any], message: str, config: Callable[..., Config]
) -> None:
    with pytest.raises(RloraError, match=message):
        config(evaluate=evaluate, checkpoint=checkpoint)


def test_sets_have_prompts_of_their_own(config: Callable[..., Config]) -> None:
    sets: dict[str, Any] = {
        "times": {"env_args": {"operator": "*"}, "prompts": 5},
        "same": {"env": "rlora.envs.arithmetic:Arithmetic"},
    }
    settings = config(env_args={"high": 6}, evaluate={"sets": sets, "prompts": 3})
    task = load_task(settings)
    assert {name: len(prompts) for name, prompts in task.sets.items()} == {"held_out": 3, "times": 5, "same": 98}
    assert all("*" in str(prompt.text) for prompt in task.sets["times"])
    assert max(int(str(word)) for word in str(task.sets["times"][0].text).rstrip("?").split() if word.isdigit()) <= 6
    for wrong, message in (
        ({"env": "gone.py:Env"}, r"evaluate\.sets\.bad\.env = 'gone\.py:Env': there is no file gone\.py"),
        (
            {"env_args": {"held_out_share": 0.0}},
            r"evaluate\.sets\.bad: none of the 0 prompts that its held_out\(\) gives",
        ),
        ({"env": "rlora.envs.calculator:Calculator"}, r"evaluate\.sets\.bad\.env = .*replies in all sets or in none"),
    ):
        with pytest.raises(RloraError, match=message):
            load_task(validate({**asdict(settings), "evaluate": {"sets": {"bad": wrong}}}))
