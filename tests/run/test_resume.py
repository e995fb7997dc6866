import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ORIGIN, adapter, episode, group, save_words
from killed import DRIVER, LEARNER, RAY, WRITE, Driver
from recorded_run import generated
from upath import UPath

from rlora.records import Adapter, Version
from rlora.rollout.cursor import Cursor, InFlight
from rlora.run import checkpoint, resume
from rlora.run.checkpoint import Bundle
from rlora.run.directory import Provenance
from rlora.settings import Config
from rlora.store import write_adapter, write_directory


@pytest.fixture
def config_file(tiny: str, tmp_path: Path) -> Callable[[int, int], str]:
    save_words(tiny)

    def make(steps: int, keep_last: int) -> str:
        path = tmp_path / f"keep-{keep_last}.toml"
        path.write_text(
            f'model = "{tiny}"\nenv = "rlora.envs.arithmetic:Arithmetic"\n'
            'reward = "rlora.rewards.integer:integer_answer"\n'
            f'dtype = "float32"\nsteps = {steps}\nprompts_per_step = 2\ngroup_size = 4\n'
            "[sampling]\nmax_tokens = 8\nmax_prompt_tokens = 48\n[evaluate]\nprompts = 0\n[learner]\nlr = 1e-2\n"
            '[algorithm]\nname = "grpo"\nepochs = 2\nminibatches = 2\n'
            f"[checkpoint]\nkeep_last = {keep_last}\n"
        )
        return str(path)

    return make


def lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def digests(run: Path) -> list[tuple[int, str]]:
    """Each step, and the digest of the version that it made."""
    return [(line["step"], line["adapter"]) for line in map(json.loads, lines(run))]


@pytest.mark.vllm
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_no_kill_costs_more_than_the_step_in_flight(
    kills: int, config_file: Callable[[int, int], str], tmp_path: Path
) -> None:
    """kill -9 of the driver, the learner and Ray at random times, and of the driver during a write or a removal."""
    draw, steps = random.Random(kills), 6 * kills
    config, uninterrupted, run = config_file(steps, 3), tmp_path / "uninterrupted" / "run", tmp_path / "run"
    uninterrupted.parent.mkdir()
    reference = Driver(uninterrupted, config_file(steps, steps + 1), "-")
    assert reference.wait() == 0, reference.printed

    driver: Driver | None = None
    reached = least = 0  # completed steps, and steps that are certainly saved
    for number, target in enumerate(([WRITE, LEARNER, RAY, WRITE, DRIVER] * kills)[:kills]):
        if not driver:
            least = max(len(lines(run)) - 1, reached - 1)  # a line is written before its bundle
            fault = [str(draw.randrange(5, 50) if number else 1)] if target == WRITE else []  # 1: the very first write
            driver = Driver(run, config, str(uninterrupted), *fault)
        if target != WRITE:
            driver.wait_for(max(reached, driver.done) + 1)
            time.sleep(draw.random() * 0.3)
            driver.kill(target)
        if target != LEARNER:  # the driver replaces a learner by itself
            assert driver.wait() != 0, driver.printed
            reached = max(reached, driver.done)
        if driver.start is not None:
            assert driver.start >= least
        driver = driver if target == LEARNER else None
    assert not driver, "the last kill must end the driver: two can't train one run"

    last = Driver(run, config, str(uninterrupted))
    assert last.wait() == 0, last.printed
    assert last.start is not None
    assert last.start >= reached - 1

    assert digests(run) == digests(uninterrupted)  # each episode was used once, in its step
    assert [step for step, _ in digests(run)] == list(range(steps))
    kept = checkpoint.versions(UPath(run))
    assert kept[-3:] == [steps - 2, steps - 1, steps]
    assert len(kept) <= 4  # including the best version
    for version in kept:
        bundle, expected = (
            checkpoint.read(checkpoint.bundle_path(UPath(path), version)) for path in (run, uninterrupted)
        )
        assert bundle.groups == expected.groups
        assert bundle.groups == (list(generated(version - 1)) if version else None)
        assert bundle.cursor.next == 2 * version
        assert bundle.adapter.weights == expected.adapter.weights
        assert bundle.state == expected.state
    assert not [path for path in (run / "bundles").iterdir() if not path.name.isdigit()]


def test_a_fork_adopts_the_bundle(tmp_path: Path, bundle: Callable[..., Bundle]) -> None:
    (tmp_path / "config.toml").write_text(
        '[provenance]\nid = "ff"\nprompts_sha256 = "others"\nmachine = ""\n[provenance.packages]\n'
    )
    run = UPath(tmp_path)
    adopted = resume.adopt(bundle(3), run)
    assert checkpoint.newest(run, Provenance.of(run)) == adopted
    assert (adopted.origin.id, adopted.origin.prompts) == ("ff", "prompts")
    assert adopted.adapter.weights == adapter(3).weights
    assert bundle(3).identity == {
        "run": "run", "id": ORIGIN.id, "version": 3, "digest": adapter(3).digest,
    }  # fmt: skip


def test_prompts_in_flight_of_a_fork_belong_to_its_policy(tmp_path: Path, bundle: Callable[..., Bundle]) -> None:
    fork = tmp_path / "fork"
    fork.mkdir()
    (fork / "config.toml").write_text(
        '[provenance]\nid = "ff"\nprompts_sha256 = "prompts"\nmachine = ""\n[provenance.packages]\n'
    )
    played = group([7], replace(episode([8], 1.0), version=adapter(2).version))
    in_flight = (InFlight(9, 2, None), InFlight(10, 2, adapter(2), played, True), InFlight(11, 2, adapter(3)))
    adopted = resume.adopt(bundle(3, cursor=Cursor(12, (), in_flight)), UPath(fork))
    assert adopted.adapter.version == Version("fork", 3, adapter(3).digest)
    adapters = [prompt.adapter for prompt in adopted.cursor.in_flight]
    assert [item and item.version for item in adapters] == [
        None, Version("fork", 2, adapter(2).digest), Version("fork", 3, adapter(3).digest),
    ]  # fmt: skip
    assert [item and item.weights for item in adapters] == [None, adapter(2).weights, adapter(3).weights]
    assert checkpoint.newest(UPath(fork), Provenance.of(UPath(fork))) == adopted


def test_prompts_in_flight_are_kept_only_if_the_config_still_asks_for_them(
    config: Callable[..., Config], bundle: Callable[..., Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    cursor = Cursor(20, (4,), (InFlight(18, 2, adapter(1)), InFlight(19, 2, None)))
    start = bundle(2, cursor=cursor)
    assert resume.cursor_for(config(learner={"lr": 1e-3}, steps=7), start, ORIGIN) == cursor
    assert capsys.readouterr().err == ""
    hotter = config(sampling={"max_tokens": 8, "max_prompt_tokens": 48, "temperature": 0.5})
    assert resume.cursor_for(hotter, start, ORIGIN) == Cursor(20, (18, 19, 4))
    assert "sampling: changed, so the prompts in flight are sampled again" in capsys.readouterr().err
    assert resume.cursor_for(config(), start, replace(ORIGIN, prompts="others")) == Cursor(20)
    assert "its training prompts have changed since version 2" in capsys.readouterr().err


def test_a_bundle_tells_the_run_and_version_that_a_start_is_from(tmp_path: Path, bundle: Callable[..., Bundle]) -> None:
    source = bundle(3)
    write_directory(path := UPath(tmp_path / "3"), source.files)
    assert checkpoint.identity(path) == source.identity
    (path / "bundle.json").write_text("{}")
    assert checkpoint.identity(path) is None
    assert checkpoint.identity(UPath(tmp_path)) is None


def test_a_run_keeps_a_copy_of_its_start(tmp_path: Path, config: Callable[..., Config]) -> None:
    original = write_adapter(Adapter("", 0, b"{}", b"weights"), tmp_path / "original")
    run, plain, started = UPath(tmp_path / "run"), config(), config(learner={"start_from": str(original)})
    assert resume.keep_start(run, plain) == resume.with_kept_start(run, plain) == plain
    assert resume.with_kept_start(run, started) == started  # there is no copy yet
    kept = resume.keep_start(run, started)
    assert kept.learner.start_from == str(run / "start")
    shutil.rmtree(original)
    assert resume.with_kept_start(run, started) == kept
    assert (run / "start" / "adapter_model.safetensors").read_bytes() == b"weights"
