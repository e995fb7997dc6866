"""The Python interface: objects in place of names, `rlora.train`, and the primitives."""

import json
import linecache
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from conftest import ROOT, episode, group

import rlora
from rlora import plugin
from rlora.core.learner import Learner
from rlora.core.setup import Setup as Policy
from rlora.records import Prompt, RewardInput, RloraError
from rlora.rewards.integer import integer_answer
from rlora.rollout.task import load_task, setup_of
from rlora.run.source import resolve_config
from rlora.scoring.pool import Pool
from rlora.scoring.worker import Setup, load_reward_functions
from rlora.settings import Config

TABLE = {"model": "-", "env": "-", "reward": "-"}
CASE = RewardInput("?", "?", 4, {}, ("4", "44"), ((), ()), ((1,), (2,)), ({}, {}))


class Fours:
    """An env to pass as an instance."""

    def __init__(self, count: int) -> None:
        self.count = count

    def train(self) -> list[Prompt]:
        return [Prompt("What is 2 + 2?", 4)] * self.count

    def held_out(self) -> list[Prompt]:
        return []


def test_fields_are_changed_by_keywords() -> None:
    config = resolve_config(TABLE | {"learner": {"rank": 2, "lr": 1e-3}}, {"learner": {"rank": 4}, "steps": 7})
    assert (config.learner.rank, config.learner.lr, config.steps) == (4, 1e-3, 7)
    assert resolve_config(config, {"steps": 9}).learner.rank == 4
    grpo = resolve_config(TABLE, {"algorithm": {"name": "grpo", "kl": 0.1}})
    assert (grpo.algorithm.loss, grpo.algorithm.kl) == ("clip", 0.1)
    assert resolve_config(grpo, {"algorithm": {"name": "rloo"}}).algorithm.loss == "reinforce"
    file = resolve_config(ROOT / "launch" / "arithmetic.toml", {"env_args": {"high": 5}, "reward": "x:y"})
    assert file.env_args["low"] == 1
    assert file.env_args["high"] == 5
    previous = resolve_config(TABLE, {"reward_args": {"limit": 3}})
    assert resolve_config(previous, {"reward": "other:f"}).reward_args == {}  # they belonged to the previous function
    assert resolve_config(previous, {"reward": "other:f", "reward_args": {"least": 1}}).reward_args == {"least": 1}


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (TABLE, {"lerner": {"rank": 1}}, r"lerner = .*no such field; did you mean learner or"),
        (TABLE, {"learner": {"rnak": 1}}, r"learner\.rnak = 1: no such field; did you mean learner\.rank or"),
        (TABLE, {"learner": 3}, r"learner = 3"),
        (TABLE, {"steps": {"n": 3}}, r"steps = \{'n': 3\}"),
        (TABLE, {"reward": []}, r"reward = .*name at least one reward function"),
        ({"model": "-"}, {}, r"env: not set"),
        ("gone.toml", {}, r"gone\.toml: can't be read"),
    ],
)
def test_a_wrong_field_is_named(source: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RloraError, match=message):
        resolve_config(source, changes)


def test_a_run_brings_its_own_config() -> None:
    with pytest.raises(RloraError, match="use only one of config, resume and fork"):
        resolve_config(TABLE, {}, resume="runs/x")
    with pytest.raises(RloraError, match=r"runs/gone: not the directory of a run"):
        resolve_config(None, {}, resume="runs/gone")


def test_objects_are_named() -> None:
    double = lambda completion: 2.0  # noqa: E731
    single = lambda completion: 1.0  # noqa: E731
    config = resolve_config(TABLE, {"reward": [integer_answer, double, single], "env": Fours(3)})
    assert config.reward[0] == "rlora.rewards.integer:integer_answer"
    assert all(re.fullmatch(r"python:lambda(_\d+)?", spec) for spec in config.reward[1:])
    assert [plugin.load("reward", spec) for spec in config.reward[1:]] == [double, single]
    assert plugin.load("env", config.env).count == 3
    assert resolve_config(TABLE, {"reward": double}).reward == config.reward[1]  # the same object
    assert resolve_config({**TABLE, "reward": single}, {}).reward == config.reward[2]
    both = resolve_config({**TABLE, "env": partial(Fours, 2)}, {"reward": partial(integer_answer)})
    assert both.env != both.reward
    mine = resolve_config(TABLE, {"algorithm": {"name": partial(Fours)}})
    assert mine.algorithm.name.startswith("python:partial")


def test_a_resumed_run_needs_its_objects_again(tmp_path: Path) -> None:
    first = lambda completion: 2.0  # noqa: E731
    again = lambda completion: 2.5  # noqa: E731
    config = resolve_config(TABLE, {"reward": first, "reward_args": {"least": 3}})
    (tmp_path / "config.toml").write_text(tomli_w.dumps(asdict(config)))
    with pytest.raises(RloraError, match=r"reward = 'python:lambda\w*': it was passed from Python; pass the"):
        resolve_config(None, {"steps": 3}, resume=tmp_path)
    resumed = resolve_config(None, {"reward": again}, resume=tmp_path)
    assert (resumed.reward, resumed.reward_args) == (config.reward, {"least": 3})  # registered under the same name
    assert plugin.load("reward", str(resumed.reward)) is again
    assert resolve_config(None, {"reward": integer_answer}, resume=tmp_path).reward == config.reward


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_args": {"scorer": Fours(1)}}, r"reward_args\.scorer = .*Fours object.*: use text, a number"),
        ({"learner": {"lr": object()}}, r"learner\.lr = .*object.*: use text, a number"),
        ({"env": None}, r"env = None"),
        ({"env": 3}, r"env = 3|env = 'python:int"),
    ],
)
def test_values_that_are_not_plain_data_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RloraError, match=message):
        load_task(resolve_config(TABLE, changes))


def test_numbers_of_numpy_are_numbers() -> None:
    config = resolve_config(
        TABLE, {"steps": np.int64(7), "learner": {"lr": np.float32(0.5)}, "env_args": {"count": np.int64(3)}}
    )
    assert (config.steps, config.learner.lr, config.env_args) == (7, 0.5, {"count": 3})


def test_objects_that_can_not_be_imported_reach_other_processes() -> None:
    bonus = 0.25

    def brief(completion: str, answer: int) -> float:
        return float(str(answer) in completion) - bonus * len(completion)

    spec = plugin.register(brief)
    assert spec == "python:brief"
    with closing(Pool(Setup((spec,), objects=plugin.pickled("reward", [spec])), 1)) as pool:
        (scores,) = pool.submit(CASE).result()
    assert [score.value for score in scores] == [0.75, 0.5]
    with pytest.raises(RloraError, match=r"reward = 'python:gone': it was passed from Python, and this process has no"):
        load_reward_functions(Setup(("python:gone",)))


def test_an_env_instance_takes_no_arguments() -> None:
    assert plugin.env_of(Fours, {"count": 2}).count == 2
    assert len(plugin.env_of(Fours(5), {}).train()) == 5
    with pytest.raises(RloraError, match=r"env_args = \{'count': 2\}: the env is an instance"):
        plugin.env_of(Fours(5), {"count": 2})


def test_objects_that_can_not_be_pickled_are_refused_before_a_run() -> None:
    lock = threading.Lock()

    def judge(completion: str) -> float:
        with lock:
            return 1.0

    with pytest.raises(RloraError, match=r"reward = 'python:judge': the object can't be sent .*TypeError"):
        setup_of(resolve_config(TABLE, {"reward": judge}), agent=False)
    env = Fours(1)
    env.lock = lock  # type: ignore[attr-defined]
    setup_of(resolve_config(TABLE, {"env": env}), agent=False)  # the env stays in this process
    with pytest.raises(RloraError, match=r"env = 'python:Fours\w*': the object can't be sent"):
        setup_of(resolve_config(TABLE, {"env": env}), agent=True)


def cells(*texts: str) -> dict[str, Any]:
    """Namespace after running notebook cells with these texts."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, text in enumerate(texts):
        file = f"<cell {number} of {hash(texts)}>"
        linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
        exec(compile(text, file, "exec"), names)
    return names


POLITE = """
def polite(completions, **kwargs):
    return [float("please" in c[0]["content"]) for c in completions]
"""
LAST = """
def last(completion):
    return completion[-1]["content"]
"""
JUDGE = """
class Judge:
    def __call__(self, completion, state):
        return float(len(last(completion)))
"""


@pytest.mark.parametrize(
    ("texts", "make"),
    [
        ((POLITE,), lambda names: names["polite"]),
        ((LAST, JUDGE), lambda names: names["Judge"]),
        ((LAST, JUDGE), lambda names: names["Judge"]()),
        ((LAST, JUDGE), lambda names: partial(names["Judge"]())),
    ],
)
def test_the_source_of_notebook_cells_reaches_other_processes(
    texts: tuple[str, ...], make: Callable[[dict[str, Any]], Any]
) -> None:
    """The source decides whether a function gets text or chat messages, and other processes have no file with it."""
    spec = plugin.register(make(cells(*texts)))
    with closing(Pool(Setup((spec,), objects=plugin.pickled("reward", [spec])), 1)) as pool:
        (scores,) = pool.submit(CASE).result()
    assert not any(score.detail for score in scores)
    assert [score.value for score in scores] == ([0.0, 0.0] if texts == (POLITE,) else [1.0, 2.0])


def test_an_error_names_the_cell_and_the_line() -> None:
    names = cells("class Bad:\n    def __call__(self, completion):\n        return 1 / 0\n")
    spec = plugin.register(names["Bad"])
    with closing(Pool(Setup((spec,), objects=plugin.pickled("reward", [spec])), 1)) as pool:
        (scores,) = pool.submit(CASE).result()
    assert re.match(r"<cell 0 of -?\d+>:3: Bad raised ZeroDivisionError", scores[0].detail)


def test_an_objective_from_python_reaches_the_learner(
    tiny: str, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
import torch
from rlora import Objective

class Mine(Objective):
    def advantages(self, group, samples):
        return [torch.full_like(s.tokens.weights, s.episode.reward) for s in samples]

    def loss(self, now, batch):
        return -(batch.tokens.advantages * now.logprobs * batch.tokens.weights).sum(), {"mine": now.logprobs}
"""
    settings = resolve_config(config(), {"algorithm": {"name": cells(text)["Mine"]}})
    assert settings.algorithm.name == "python:Mine"
    setup = Policy.of(settings)
    faulty = cells(text.replace("now.logprobs *", "gone *"))["Mine"]
    bad = Policy.of(resolve_config(config(), {"algorithm": {"name": faulty}}))
    monkeypatch.setattr(plugin, "_registered", {})  # as in a different process
    learner = Learner(settings, tiny)
    learner.open("run", setup)
    groups = [group([5, 6], episode([7, 8], 1.0, [-1.0, -1.0]), episode([9], 0.0, [-1.0]))]
    assert set(learner.update("run", groups)[1].objective_metrics) == {"mine"}
    learner.open("bad", bad)
    with pytest.raises(RloraError, match=r"<cell 0 of -?\d+>:10: algorithm\.name = 'python:Mine_2': NameError"):
        learner.update("bad", groups)


# --- with real engines ---


def blocks() -> list[str]:
    """Python blocks of docs/python.md."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)


def run(script: str, directory: Path) -> str:
    file = directory / "script.py"
    file.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, str(file)],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.vllm
def test_a_script_of_six_lines_trains_and_resumes(tmp_path: Path) -> None:
    first, second, *_ = blocks()
    assert len([line for line in first.splitlines() if line]) <= 6
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    small = '"steps": 2, "prompts_per_step": 2, "group_size": 4, "run_dir": "run", "evaluate": {"prompts": 4, '
    script = first.replace('"steps": 50, "evaluate": {', small) + second.replace("steps=80", "steps=3")
    assert small in script
    script += "import json\nprint(json.dumps([len(result.steps), result.adapter.number, result.summary['steps']]))\n"
    lines = run(script, tmp_path).splitlines()
    assert json.loads(lines[-1]) == [3, 3, 3]
    assert sum("reward/brief" in line for line in lines if line.startswith("{")) == 2  # on_step prints two steps
    assert 'reward = "python:brief"' in (tmp_path / "run" / "config.toml").read_text()
    resumed = subprocess.run(
        [sys.executable, "-m", "rlora", "train", "--resume", "run", "--steps=4"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert resumed.returncode == 1
    assert "reward = 'python:brief': it was passed from Python" in resumed.stderr


@pytest.mark.vllm
def test_the_primitives_train_in_twenty_lines(shallow: str, tmp_path: Path) -> None:
    *_, loop, several = (block.replace("demo:smollm2-135m", shallow) for block in blocks())
    assert len([line for line in loop.splitlines() if line]) <= 24
    body = loop.replace("    policy.save", "    print(json.dumps([g.rewards for g in groups]))\n    policy.save")
    out = run("import json\n" + body, tmp_path)
    assert len(re.findall(r"^\d ", out, re.MULTILINE)) == 6
    saved = tmp_path / "adapters" / "sevens"
    assert sorted(path.name for path in saved.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "state.safetensors"
    ]  # fmt: skip
    again = f"""
import rlora
with rlora.policy(model="{shallow}", learner={{"rank": 1}}, resume="adapters/sevens") as policy:
    assert policy.adapter.number == 6
    policy.save("adapters/again")
    groups = policy.sample(["Name a number."], group_size=2)
    policy.forward_backward([policy.samples(groups[0], [1.0, -1.0])], lambda now, batch: (now.logprobs.sum(), {{}}))
    policy.optim_step(rlora.Adam(lr=1e-4))
    assert policy.adapter.number == 7
    scored = [group.with_rewards([1.0, 0.0]) for group in policy.sample(["Name a number."], 2, temperature=0.5)]
    try:
        policy.update(scored)
    except rlora.RloraError as error:
        print(error)
    try:
        policy.save(".")
    except rlora.RloraError as error:
        print(error)
"""
    wrong = again.replace('"rank": 1', '"rank": 1, "alpha": 16.0').partition("    assert")[0] + "    pass\n"
    (tmp_path / "wrong.py").write_text(wrong)
    refused = subprocess.run([sys.executable, "wrong.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
                             env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)  # fmt: skip
    assert "its alpha is 32.0, learner.alpha is 16.0; set learner.alpha to 32.0" in refused.stderr
    output = run(again + several + "    print(groups[0].episodes[0].version.policy)\n", tmp_path)
    assert output.endswith("low\n")
    assert "sampled at temperature 0.5, and the learner's probabilities are at sampling.temperature = 1.0;" in output
    assert "name a directory for the adapter alone" in output
    for name in ("adapter_model.safetensors", "state.safetensors"):
        assert (saved.parent / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_import_is_light() -> None:
    heavy = "torch", "ray", "vllm", "transformers"
    script = f"import sys, rlora; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert callable(rlora.train)
    assert rlora.Objective.__name__ == "Objective"
