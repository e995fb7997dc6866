"""Evaluation during training: which versions are due, what engines receive, and resuming."""

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
    """Stands in for the agent loop: records requests, and completes them when `answer` is called."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, Sampling, int, bool, Future[Group]]] = []
        self.scoring = SimpleNamespace(check_errors=lambda groups: None)

    def start(
        self, prompt: Prompt, sampling: Sampling, step: int, adapter: Adapter, background: bool
    ) -> SimpleNamespace:
        scored: Future[Group] = Future()
        self.requests.append((prompt.answer, sampling, adapter.number, background, scored))
        return SimpleNamespace(scored=scored, played=None)

    def answer(self, correct: int) -> None:
        """Complete all requests, `correct` of each set of four with a correct answer."""
        for number, sampling, _, _, scored in self.requests:
            status = "correct" if number <= correct else "wrong"
            episodes = [
                SimpleNamespace(status=status, reward=float(number <= correct)) for _ in range(sampling.group_size)
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
def make_held_out(config: Callable[..., Config], tmp_path: Path) -> Callable[..., tuple[HeldOut, Loop, Fleet]]:
    def make(lines: list[dict[str, Any]] | None = None, **evaluate: Any) -> tuple[HeldOut, Loop, Fleet]:
        (tmp_path / directory.METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines or []))
        settings = config(steps=10, evaluate={"every": 2} | evaluate)
        task: Any = SimpleNamespace(sets={"held_out": PROMPTS, "hard": PROMPTS})
        loop, fleet = Loop(), Fleet()
        return HeldOut(settings, UPath(tmp_path), task, 0, fleet, loop, print), loop, fleet  # type: ignore[arg-type]

    return make


def adapter(number: int) -> Adapter:
    return Adapter("run", number, b"{}", b"")


def test_due_versions_are_evaluated_during_training(make_held_out: Any, tmp_path: Path) -> None:
    held_out, loop, _ = make_held_out()
    directory.summarise(UPath(tmp_path), BEFORE)  # a resumed run
    for number in (0, 1):
        held_out.start(adapter(number))
    assert loop.requests == []
    held_out.start(adapter(2))
    held_out.start(adapter(2))  # a run that resumes at 2
    assert [request[:4] for request in loop.requests] == [
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
    assert [request[2] for request in loop.requests] == [2] * 8
    held_out.start(adapter(10))  # the last version: with priority
    assert {request[2:4] for request in loop.requests[8:]} == {(10, False)}


@pytest.mark.parametrize("every", [1, 2])
def test_each_evaluation_has_one_line_of_metrics(every: int, make_held_out: Any) -> None:
    """A line waits for a slow evaluation before the next one is due, and before the end."""
    held_out, loop, _ = make_held_out(every=every)
    versions = []
    for number in range(1, 11):
        answering = threading.Timer(0.02, loop.answer, [2])
        answering.start()
        versions.append(held_out.figures(number).get("accuracy/version"))
        answering.join()
        loop.requests.clear()
        held_out.start(adapter(number))
    assert [version for version in versions if version] == list(range(every, 10, every))
    assert held_out.version == 10


def test_a_resume_does_not_evaluate_twice(make_held_out: Any) -> None:
    lines = [{"step": 3, "accuracy/version": 2}, {"step": 4, "accuracy/version": 4}]
    held_out, loop, _ = make_held_out(lines)
    held_out.resume(4)
    held_out.start(adapter(4))
    assert loop.requests == []
    held_out, loop, _ = make_held_out(lines[:1])
    held_out.start(adapter(4))  # its evaluation was interrupted
    assert {request[2] for request in loop.requests} == {4}


def test_evaluations_before_and_after_training_are_waited_for(make_held_out: Any, tmp_path: Path) -> None:
    held_out, loop, _ = make_held_out(every=0, samples=2)
    held_out.start(adapter(0))
    assert loop.requests[0][1:4] == (Sampling(8, 1.0, 2), 0, False)  # with priority over training
    answering = threading.Timer(0.02, loop.answer, [2])
    answering.start()
    assert held_out.figures(1) == {}
    summary = directory.summary(UPath(tmp_path))
    assert summary["accuracy/before"] == summary["accuracy/hard/before"] == summary["reward/before"] == 0.5
    assert summary["accuracy/prompts"] == 4
    assert held_out.version is None
    loop.requests.clear()
    held_out.start(adapter(0))  # a run that was killed in its first step and is resumed
    assert loop.requests == []
    held_out.start(adapter(10))
    assert loop.requests[0][1:4] == (Sampling(8, 1.0, 2), 10, False)
    loop.answer(2)
    held_out.end()
    assert directory.summary(UPath(tmp_path))["accuracy/hard/after"] == 0.5


def test_the_first_line_has_the_accuracy_before(make_held_out: Any, tmp_path: Path) -> None:
    """Also in a run that was killed before it wrote that line."""
    held_out, loop, _ = make_held_out()
    held_out.start(adapter(0))
    loop.answer(3)
    figures = held_out.figures(1)
    assert (figures["accuracy/version"], figures["accuracy/hard"]) == (0, 0.75)
    directory.summarise(UPath(tmp_path), BEFORE)
    held_out, loop, _ = make_held_out()
    held_out.start(adapter(0))
    assert loop.requests == []
    figures = held_out.figures(1)
    assert figures["accuracy/version"] == 0
    assert (figures["accuracy/held_out/low"], figures["accuracy/hard/high"]) == (0.5, 0.5)
    assert (figures["accuracy/held_out/reward"], figures["accuracy/hard/reward"]) == (0.25, 0.75)
    assert held_out.figures(2) == {}


def test_rewards_that_fail_end_the_run(make_held_out: Any) -> None:
    held_out, loop, _ = make_held_out()

    def refuse(groups: Any) -> None:
        raise RewardError("8 of 8 episodes are in error")

    loop.scoring.check_errors = refuse
    held_out.start(adapter(2))
    loop.answer(0)
    assert held_out.figures(3) == {}  # the step's metrics and bundle are saved first
    with pytest.raises(RewardError, match="8 of 8"):
        held_out.check_rewards()


def test_a_damaged_bundle_is_not_evaluated(
    make_held_out: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out, loop, _ = make_held_out()
    (tmp_path / "bundles" / "2").mkdir(parents=True)
    held_out.resume(3)
    assert loop.requests == []
    assert "version 2 is not evaluated: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("evaluate", "checkpoint", "message"),
    [
        ({"sets": {"before": {}}}, {}, r"evaluate\.sets = .*before: use letters, digits and _ in names, and none of"),
        ({"sets": {"a/b": {}}}, {}, r"evaluate\.sets = .*a/b: use letters"),
        ({"sets": {"hard": {"prompts": 0}}}, {}, r"evaluate\.sets\.hard\.prompts = 0: .*Number of prompts"),
        ({"sets": {"hard": {"promts": 3}}}, {}, r"evaluate\.sets\.hard\.promts = 3: no such field"),
        ({"every": -1}, {}, r"evaluate\.every = -1"),
        ({}, {"best_by": "accuracy"}, r"checkpoint\.best_by = 'accuracy': .*evaluate\.every"),
        ({"every": 20}, {"best_by": "accuracy"}, r"checkpoint\.keep_last = 20: with evaluate\.every = 20"),
    ],
)
def test_invalid_settings_are_refused(
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
    assert all("*" in str(prompt.text) and prompt.evaluation_set == "times" for prompt in task.sets["times"])
    assert not any(prompt.evaluation_set for prompt in (*task.prompts, *task.held_out))
    assert max(int(str(word)) for word in str(task.sets["times"][0].text).rstrip("?").split() if word.isdigit()) <= 6
    for wrong, message in (
        ({"env": "gone.py:Env"}, r"evaluate\.sets\.bad\.env = 'gone\.py:Env': there is no file gone\.py"),
        (
            {"env_args": {"held_out_share": 0.0}},
            r"evaluate\.sets\.bad: none of the 0 prompts from its held_out\(\)",
        ),
        (
            {"env": "rlora.envs.calculator:Calculator"},
            r"evaluate\.sets\.bad\.env = .*it must be of the class of the run's env",
        ),
    ):
        with pytest.raises(RloraError, match=message):
            load_task(validate({**asdict(settings), "evaluate": {"sets": {"bad": wrong}}}))
