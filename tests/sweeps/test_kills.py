"""A sweep that is killed again and again comes to the bits of one that nobody killed."""

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
    return {each.version: (each.adapter.weights, each.state, each.parent) for each in bundles}


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_change_no_bit_of_a_sweep(kills: int, tiny: str, tmp_path: Path) -> None:
    """kill -9 of the driver, the learner and Ray at random moments, and of the driver in mid-write."""
    save_words(tiny)
    draw, steps, file = random.Random(kills), 4 * kills, tmp_path / "sweep.toml"
    file.write_text(SWEEP.format(model=tiny, steps=steps, rung=steps // 2))
    whole, place = tmp_path / "whole", tmp_path / "sweep"
    reference = Driver(whole, str(file), "-")
    assert reference.wait() == 0, reference.printed
    for number, what in enumerate(([WRITE, LEARNER, DRIVER, RAY] * kills)[:kills]):
        fault = [str(draw.randrange(5, 60) if number else 1)] if what == WRITE else []  # the first of all, too
        driver = Driver(place, str(file), "-", *fault)
        if what != WRITE:
            start = len(directory.whole_lines(UPath(place)))
            deadline = time.monotonic() + 120
            while len(directory.whole_lines(UPath(place))) < start + 2:
                assert driver.process.poll() is None, driver.printed
                assert time.monotonic() < deadline, driver.printed
                time.sleep(0.02)
            time.sleep(draw.random() * 0.3)
            driver.kill(what)
        if what == LEARNER:  # it needs no help to go on
            driver.wait_for(driver.done + 2)
            driver.kill(DRIVER)
        assert driver.wait() != 0, driver.printed
    last = Driver(place, str(file), "-")
    assert last.wait() == 0, last.printed
    names = ["rank-1", "rank-2", "other", "ppo"]
    fates, expected = Diary(place).fates, Diary(whole).fates
    assert {name: fates[name].status for name in names} == {name: expected[name].status for name in names}
    assert sorted(fate.status for fate in fates.values()) == ["dropped", "finished", "finished", "finished"]
    for name in names:
        ours, theirs = versions(place / name), versions(whole / name)
        assert list(ours) == list(theirs)
        assert ours == theirs
        lines = [(line["step"], line["adapter"]) for line in directory.figures(UPath(place / name))]
        assert lines == [(line["step"], line["adapter"]) for line in directory.figures(UPath(whole / name))]
