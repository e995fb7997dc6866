import asyncio
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlora.envs.verifiers_env import Verifiers
from rlora.records import RloraError
from rlora.rewards.verifiers_rubric import rubric

TASKSET = """
import verifiers.v1 as vf

__all__ = ["Doubling"]


class Data(vf.TaskData):
    answer: str = ""


class Task(vf.Task[Data]):
    @vf.reward(weight=2.0)
    async def exact(self, task, trace) -> float:
        return float(task.answer == trace.last_reply)


class NeedsRuntime(Task):
    @vf.reward
    async def ran(self, trace, runtime) -> float:
        return 1.0


class Config(vf.TasksetConfig):
    high: int = 10
    hard: bool = False


class Doubling(vf.Taskset[Task, Config]):
    def load(self):
        kind = NeedsRuntime if self.config.hard else Task
        for n in range(self.config.high):
            data = Data(prompt=f"{n}+{n}?", answer=str(2 * n), system_prompt="Be brief.")
            yield kind(data, self.config.task)
"""


@pytest.mark.skipif(find_spec("verifiers") is not None, reason="verifiers is installed")
def test_the_error_names_the_package_to_install() -> None:
    with pytest.raises(RloraError, match=r"pip install 'rlora\[verifiers\]'"):
        Verifiers("doubling").train()


def test_a_share_of_1_is_an_error() -> None:
    with pytest.raises(RloraError, match=r"held_out_share = 1\.0"):
        Verifiers("doubling", held_out_share=1.0)


def test_tasks_become_prompts_and_their_rewards_score_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("verifiers.v1")
    (tmp_path / "rlora_doubling.py").write_text(TASKSET)
    monkeypatch.syspath_prepend(tmp_path)
    env = Verifiers("rlora-doubling", high=20)
    train, held_out = env.train(), env.held_out()
    assert (len(train), len(held_out)) == (18, 2)
    assert sorted(int(prompt.answer) for prompt in [*train, *held_out]) == [2 * n for n in range(20)]
    prompt = next(prompt for prompt in train if prompt.answer == "16")
    assert prompt.text == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "8+8?"}]
    for completion, score in (("16", 2.0), ("17", 0.0)):
        scored = asyncio.run(rubric(completion, prompt=prompt.text, **prompt.columns))
        assert scored == {"score": score, "exact": score}
    with pytest.raises(RloraError, match="can't be loaded"):
        Verifiers("rlora-doubling", hgih=20).train()
    with pytest.raises(RloraError, match="only single-turn tasks are supported"):
        Verifiers("rlora-doubling", hard=True).train()
