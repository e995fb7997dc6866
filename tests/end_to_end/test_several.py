"""Several engines, several learners, and several policies in one job."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, TOML, metrics, rlora
from conftest import ROOT, SHORT, exit_status
from upath import UPath

from rlora.records import Prompt, RloraError
from rlora.run import checkpoint
from rlora.run.health import RULES
from rlora.run.prepare import prepared
from rlora.run.source import resolve_config
from rlora.run.turns import Turns, first, rounds
from rlora.train import drive

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("nothing_stays_behind")]


def test_two_engines_and_two_learners_on_stale_episodes_with_a_users_reward(tmp_path: Path) -> None:
    """A reward in a file of the user's own, two engines, an update that two learners share, sampling beside it, with
    top-p; at a URL, where nothing is renamed or appended to."""
    (tmp_path / "brief.py").write_text("def brief(completion, answer):\n    return -float(len(completion))\n")
    run = tmp_path / "run"
    done = rlora(
        "train", TOML, "--reward", f"{tmp_path}/brief.py:brief", "--run-dir", run.as_uri(), "--steps", "3",
        "--engine.replicas", "2", "--engine.kv-cache-gib", "1", "--learner.replicas", "2", "--max-staleness", "1",
        "--sampling.top-p", "0.9", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = metrics(run)
    assert all(line["reward/mean"] < 0 and line["reward/informative_groups"] > 0.5 for line in lines)
    assert all(line["grad/norm"] > 0 for line in lines)
    assert [line["staleness"] for line in lines] == [0, 1, 1]
    assert lines[0]["kl/behaviour"] < 0.01  # probabilities over the whole vocabulary would be 5% smaller on average
    groups = checkpoint.read_version(UPath(run), 1).groups
    assert groups
    assert all(episode.kept for group in groups for episode in group.episodes)


@pytest.mark.parametrize("turns", [rounds, first])
def test_runs_that_train_together_are_runs_like_any_other(
    turns: Turns, shallow: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two policies of other ranks and algorithms on one engine, each with a learner of its own; one fails."""
    members: dict[str, dict[str, Any]] = {
        "low": {"learner": {"rank": 1, "concurrent": 2}, "steps": 3},
        "high": {"learner": {"rank": 8, "concurrent": 2}, "steps": 2, "algorithm": {"name": "grpo", "kl": 0.01}},
        "failing": {"learner": {"concurrent": 2}, "steps": 3, "reward": lambda completion, step: 1 / (1 - step)},
    }
    small: dict[str, Any] = {"prompts_per_step": 2, "group_size": 4, "evaluate": {"prompts": 4}}
    small |= {"model": shallow, "reward": SHORT}
    with ExitStack() as stack:
        configs = {name: resolve_config(ROOT / TOML, small | changes) for name, changes in members.items()}
        runs = [stack.enter_context(prepared(config, tmp_path / name)) for name, config in configs.items()]
        with pytest.raises(RloraError, match=r"1 of 3 runs failed:\nfailing, after 1 steps: .*ZeroDivisionError"):
            drive(runs, turns)
    for name, steps in (("low", 3), ("high", 2), ("failing", 1)):
        run = tmp_path / name
        assert [line["step"] for line in metrics(run)] == list(range(steps))
        assert checkpoint.versions(UPath(run)) == list(range(steps + 1))
        assert ("accuracy/after" in json.loads((run / "summary.json").read_text())) == (name != "failing")
    assert len((tmp_path / "failing" / "unscored.jsonl").read_text().splitlines()) == 8
    if turns is rounds:
        capsys.readouterr()
        assert exit_status("replay", str(tmp_path / "high")) == 0
        assert "2 of 2 updates bit for bit" in capsys.readouterr().out
        assert exit_status("train", "--resume", str(tmp_path / "low"), "--steps=4") == 0
        assert [line["step"] for line in metrics(tmp_path / "low")] == [0, 1, 2, 3]


class Sums:
    """Prompts to train on, which have no answer, and the same to hold out, which have one."""

    def train(self) -> list[Prompt]:
        return [Prompt(f"What is {a} + {b}?") for a in range(1, 9) for b in range(1, 9)]

    def held_out(self) -> list[Prompt]:
        return [replace(prompt, answer=0) for prompt in self.train()]


def test_each_rule_of_health_holds_in_a_run_that_is_ill_in_its_way(
    shallow: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them over one engine and one learner; each also says what to do."""

    def terse(completion: str, answer: Any) -> float:  # where there is no answer; the opposite where there is one
        return 0.9 / (1 + len(completion)) if answer is None else float(len(completion) > 30)

    ill: dict[str, dict[str, Any]] = {
        "floor": {"reward": lambda completion: 0.0, "steps": 9, "health": {"steps": 2, "stop": ["floor"]}},
        "solved": {"reward": lambda completion: 1.0, "steps": 3},
        "truncated": {"sampling": {"max_tokens": 1}, "steps": 3},
        "failing_rewards": {
            "reward": lambda completion: 1 / (len(completion) % 2), "scoring": {"max_errors": 1.0}, "steps": 3,
        },
        "dead_part": {"reward": [SHORT, "rlora.rewards.shaping:boxed"], "steps": 3},
        "no_signal": {"reward": lambda completion, answer: answer / 100, "steps": 3},
        "masked": {
            "reward": lambda completion: 1 / (1 + len(completion)), "steps": 3, "algorithm": {"geometric_mask": 1e-9},
        },
        "skipped": {
            "reward": lambda completion: 1 / (1 + len(completion)), "steps": 3, "learner": {"max_bad_updates": 9},
            "algorithm": {"name": f"{ROOT}/tests/ill_objectives.py:Broken"},
        },
        "entropy_collapsed": {
            "algorithm": {"name": f"{ROOT}/tests/ill_objectives.py:Sharper"}, "steps": 10,
            "reward": lambda completion: 0.9 / (1 + len(completion)), "learner": {"lr": 2e-3},
        },
        "overfitting": {
            "env": Sums, "env_args": {}, "reward": terse, "learner": {"lr": 5e-3}, "steps": 5,
            "evaluate": {"every": 1, "prompts": 64},
        },
        "engine_learner_apart": {
            "algorithm": {"name": f"{ROOT}/tests/ill_objectives.py:Late"}, "max_staleness": 1, "steps": 8,
            "learner": {"lr": 5e-3, "lr_schedule": "constant"},
        },
    }  # fmt: skip
    small: dict[str, Any] = {
        "prompts_per_step": 4, "group_size": 4, "evaluate": {"prompts": 0}, "health": {"steps": 2},
        "check": {"prompts": 0}, "model": shallow,
    }  # fmt: skip
    assert ill.keys() == RULES.keys()
    with ExitStack() as stack:
        for name, changes in ill.items():
            learner = {"threads": 2} | changes.get("learner", {})
            config = resolve_config(ROOT / TOML, small | changes | {"learner": learner})
            ill[name]["run"] = stack.enter_context(prepared(config, tmp_path / name))
        with pytest.raises(RloraError, match=r"1 of 11 runs failed:\nfloor, after 2 steps: health\.stop = \['floor'\]"):
            drive([changes["run"] for changes in ill.values()])
    told = capsys.readouterr().err
    for name in ill:
        lines = metrics(tmp_path / name)
        held = [line["step"] for line in lines if f"health/{name}" in line]
        assert held, f"{name}: {lines[-1]}"
        assert json.loads((tmp_path / name / "summary.json").read_text())["health"][name] == held[0]
        assert f"{name}, step {held[0] + 1}: {name}: {RULES[name].remedy[:40]}" in told  # type: ignore[index]
    assert checkpoint.versions(UPath(tmp_path / "floor")) == [0, 1, 2]
