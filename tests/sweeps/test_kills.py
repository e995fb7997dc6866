"""A sweep that is killed repeatedly produces the same bits as an uninterrupted one."""

import random
import time
from pathlib import Path

import pytest
from conftest import save_words
from killed import DRIVER, LEARNER, RAY, WRITE, Driver
from upath import UPath

from rlora.run import checkpoint, directory
from rlora.sweeps.diary import Diary

pytestmark = pytest.mark.vllm
SWEEP = """
[config]
model = "{model}"
env = "rlora.envs.arithmetic:Arithmetic"
reward = "rlora.rewards.integer:integer_answer"
dtype = "float32"
steps = {steps}
prompts_per_step = 2
group_size = 4
sampling = {{ max_tokens = 8, max_prompt_tokens = 48 }}
evaluate = {{ prompts = 0 }}
learner = {{ lr = 1e-2 }}
algorithm = {{ name = "grpo", epochs = 2, minibatches = 2 }}
checkpoint = {{ keep_last = {steps} }}
[over]
"learner.rank" = [1, 2]
[members.other]
"algorithm.kl" = 0.1
[members.ppo]
"algorithm.name" = "ppo"
"algorithm.minibatches" = 2
[halving]
at = [{rung}]
keep = 0.75
by = "grad/norm"
"""


def versions(run: Path) -> dict[int, tuple[bytes, bytes, str | None]]:
    bundles = [
        checkpoint.read(checkpoint.bundle_path(UPath(run), number)) for number in checkpoint.versions(UPath(run))
    ]
    return {bundle.version: (bundle.adapter.weights, bundle.state, bundle.parent) for bundle in bundles}


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_change_no_bit_of_a_sweep(kills: int, tiny: str, tmp_path: Path) -> None:
    """kill -9 of the driver, the learner and Ray at random times, and of the driver during a write."""
    save_words(tiny)
    draw, steps, file = random.Random(kills), 4 * kills, tmp_path / "sweep.toml"
    file.write_text(SWEEP.format(model=tiny, steps=steps, rung=steps // 2))
    uninterrupted, path = tmp_path / "uninterrupted", tmp_path / "sweep"
    reference = Driver(uninterrupted, str(file), "-")
    assert reference.wait() == 0, reference.printed
    for number, target in enumerate(([WRITE, LEARNER, DRIVER, RAY] * kills)[:kills]):
        fault = [str(draw.randrange(5, 60) if number else 1)] if target == WRITE else []  # 1: the very first write
        driver = Driver(path, str(file), "-", *fault)
        if target != WRITE:
            start = len(directory.complete_lines(UPath(path)))
            deadline = time.monotonic() + 120
            while len(directory.complete_lines(UPath(path))) < start + 2:
                assert driver.process.poll() is None, driver.printed
                assert time.monotonic() < deadline, driver.printed
                time.sleep(0.02)
            time.sleep(draw.random() * 0.3)
            driver.kill(target)
        if target == LEARNER:  # the driver replaces it by itself
            driver.wait_for(driver.done + 2)
            driver.kill(DRIVER)
        assert driver.wait() != 0, driver.printed
    last = Driver(path, str(file), "-")
    assert last.wait() == 0, last.printed
    names = ["rank-1", "rank-2", "other", "ppo"]
    states, expected = Diary(path).states, Diary(uninterrupted).states
    assert {name: states[name].status for name in names} == {name: expected[name].status for name in names}
    assert sorted(state.status for state in states.values()) == ["dropped", "finished", "finished", "finished"]
    for name in names:
        bundles, expected_bundles = versions(path / name), versions(uninterrupted / name)
        assert list(bundles) == list(expected_bundles)
        assert bundles == expected_bundles
        lines, expected_lines = (
            [(line["step"], line["adapter"]) for line in directory.figures(UPath(sweep / name))]
            for sweep in (path, uninterrupted)
        )
        assert lines == expected_lines
