"""Whole commands on real Ray and vLLM, and that nothing of them stays behind."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from conftest import NEEDS_SHARED, ROOT, SHARED, ray_head, ray_node
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig
from upath import UPath

from rlora import cluster
from rlora.cluster import processes
from rlora.config import read
from rlora.core.setup import Setup
from rlora.records import Cursor, EngineLostError, Group, Prompt, RloraError
from rlora.rollout.stream import Rollouts, prompt_at
from rlora.rollout.task import ServedPolicy, load_task
from rlora.run import checkpoint
from rlora.run.health import RULES
from rlora.run.prepare import prepared
from rlora.run.source import resolve_config
from rlora.run.turns import Turns, first, rounds
from rlora.settings import Config
from rlora.train import drive

pytestmark = pytest.mark.vllm
TOML = "launch/arithmetic.toml"
ADDRESS = ("--address", "http://127.0.0.1:8299")
SMALL = ("--prompts-per-step", "4", "--group-size", "4", "--evaluate.prompts", "4")


TOKEN = f"RLORA_TEST={secrets.token_hex(8)}"  # in the environment of each process that a test starts


def leftovers() -> set[str]:
    """Processes of this test, and files in RAM of processes that are gone: what a command must not leave behind.

    Whatever else runs on the machine, or was killed there, is none of it.
    """
    processes = {int(path.name): path for path in Path("/proc").glob("[0-9]*")}
    found = {f"process {pid} {line}" for pid, path in processes.items() if (line := own(path))}
    for path in Path("/dev/shm").iterdir():
        if (pid := re.match(r"(?:rlora-|__KMP_REGISTERED_LIB_)(\d+)", path.name)) and int(pid[1]) not in processes:
            found.add(f"shm {path.name}")
    return found


def own(process: Path) -> str:
    """The command of a process that the test started, itself or through others; empty for another's."""
    try:
        environment = (process / "environ").read_bytes()
        line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        state, parent, *_ = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""  # it has ended meanwhile
    if TOKEN.encode() in environment:
        return line[:100]
    if state != "Z" and line.startswith("ray::") and not environment.strip(b"\0"):  # Ray's title is written over it
        with suppress(OSError):
            above = process.with_name(parent)
            if b"raylet" in (above / "cmdline").read_bytes():
                return line if own(above) else ""
        return line  # its raylet is gone; one of another cluster was there before
    return ""


@pytest.fixture(autouse=True)
def _nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(*TOKEN.split("="))
    before = leftovers()
    yield
    deadline = time.monotonic() + 20
    while (left := leftovers() - before) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


def rlora(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlora", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=900)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_short_run_raises_the_reward_and_can_be_resumed_and_evaluated(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = rlora("train", TOML, "--steps", "6", "--run-dir", str(run), "--evaluate.prompts", "40")
    assert done.returncode == 0, done.stderr
    lines = metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    rewards = [line["reward/mean"] for line in lines]
    assert rewards[-1] > rewards[0] + 0.15, rewards
    assert all(line["kl/behaviour"] < 0.01 and line["staleness"] == 0 for line in lines)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy/after"] > summary["accuracy/before"]
    assert summary["accuracy/prompts"] == 40
    assert summary["adapter/parameters"] == 305_280
    assert sorted(int(path.name) for path in (run / "bundles").iterdir()) == [0, 1, 2, 3, 4, 5, 6]
    assert "step 6/6" in done.stdout
    for shown in ("accuracy before", str(summary["adapter/path"]), f"rlora eval {run}", "PeftModel"):
        assert shown in done.stdout.replace("\n", "")

    refused = rlora("train", TOML, "--run-dir", str(run))
    assert refused.returncode == 1
    assert "not empty" in refused.stderr
    changed = rlora("train", "--resume", str(run), "--learner.lr", "1.0")
    assert changed.returncode == 1
    assert "learner.lr: 0.0005 -> 1.0" in changed.stdout
    assert "set --steps to a larger number" in changed.stderr
    resumed = rlora("train", "--resume", str(run), "--steps", "7")
    assert resumed.returncode == 0, resumed.stderr
    assert "steps: 6 -> 7" in resumed.stdout
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3, 4, 5, 6]
    fork = tmp_path / "fork"
    forked = rlora(
        "train", "--fork", f"{run}@3", "--run-dir", str(fork), "--steps", "4", "--learner.lr", "1e-4", *SMALL
    )
    assert forked.returncode == 0, forked.stderr
    assert [line["lr"] for line in metrics(fork)] == [pytest.approx(1e-4 / 4)]
    listed = rlora("runs", str(tmp_path)).stdout
    assert re.search(r"fork +finished +4/4 .* run@3 *\n", listed), listed
    assert re.search(r"run +finished +7/7 ", listed), listed

    replayed = rlora("replay", str(run))
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert replayed.stdout.count("bit for bit; loss") == 7  # the update after the resume too

    merged = rlora("export", str(run), "--to", str(tmp_path / "merged"), "--merge")
    assert merged.returncode == 0, merged.stderr
    assert "version 7 merged in bfloat16" in merged.stdout
    assert "Rounding to bfloat16 loses that part: export with --dtype float32" in merged.stdout
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert rlora("export", f"{run}@2", "--to", str(tmp_path / "adapter")).returncode == 0
    assert f"# {run.name}, version 2" in (tmp_path / "adapter" / "README.md").read_text()
    exported = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert exported == (run / "bundles" / "2" / "adapter_model.safetensors").read_bytes()
    again = rlora("export", str(run), "--to", str(tmp_path / "adapter"))
    assert (again.returncode, "it exists already" in again.stderr) == (1, True)


def test_two_engines_and_two_learners_on_stale_episodes_with_a_users_reward(tmp_path: Path) -> None:
    """A reward in a file of the user's own, two engines, an update that two learners share, sampling beside it; at a
    URL, where nothing is renamed or appended to."""
    (tmp_path / "brief.py").write_text("def brief(completion, answer):\n    return -float(len(completion))\n")
    run = tmp_path / "run"
    done = rlora(
        "train", TOML, "--reward", f"{tmp_path}/brief.py:brief", "--run-dir", run.as_uri(), "--steps", "3",
        "--engine.replicas", "2", "--engine.kv-cache-gib", "1", "--learner.replicas", "2", "--max-staleness", "1",
        *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = metrics(run)
    assert all(line["reward/mean"] < 0 and line["reward/informative_groups"] > 0.5 for line in lines)
    assert all(line["grad/norm"] > 0 for line in lines)
    assert [line["staleness"] for line in lines] == [0, 1, 1]


def test_a_reward_that_raises_ends_the_run_with_what_was_sampled(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def bad(completion, answer):\n    raise ValueError('no judge today')\n")
    run = tmp_path / "run"
    reward = "--reward", f"{tmp_path}/bad.py:bad"
    done = rlora("train", TOML, *reward, "--run-dir", str(run), *SMALL, "--evaluate.prompts", "0")
    assert done.returncode == 1
    assert "bad.py:2: bad raised ValueError: no judge today" in done.stderr
    assert "16 of 16 episodes are in error" in done.stderr
    assert "Traceback" not in done.stderr
    assert len((run / "unscored.jsonl").read_text().splitlines()) == 16
    assert (run / "bundles" / "0" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_the_last_version_and_ends_everything(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    heeding = "env", "--default-signal=INT"  # what a shell starts in the background ignores Ctrl-C, tests or not
    command = [*heeding, sys.executable, "-m", "rlora", "train", TOML, "--run-dir", str(run), *SMALL]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while not (run / "bundles" / "1").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal's Ctrl-C goes to all of them
        else:
            process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert f"rlora train --resume {run}" in error
    last = max(int(path.name) for path in (run / "bundles").iterdir() if path.name.isdigit())
    assert len(metrics(run)) == last  # the step that was being saved is saved whole, its line with it


@pytest.mark.parametrize("turns", [rounds, first])
def test_runs_that_train_together_are_runs_like_any_other(turns: Turns, tmp_path: Path) -> None:
    """Two policies of other ranks and algorithms on one engine, each with a learner of its own; one fails."""
    members: dict[str, dict[str, Any]] = {
        "low": {"learner": {"rank": 1, "concurrent": 2}, "steps": 3},
        "high": {"learner": {"rank": 8, "concurrent": 2}, "steps": 2, "algorithm": {"name": "grpo", "kl": 0.01}},
        "failing": {"learner": {"concurrent": 2}, "steps": 3, "reward": lambda completion, step: 1 / (1 - step)},
    }
    small = {"prompts_per_step": 2, "group_size": 4, "evaluate": {"prompts": 4}}
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
        replayed = rlora("replay", str(tmp_path / "high"))
        assert "2 of 2 updates bit for bit" in replayed.stdout, replayed.stdout + replayed.stderr
        alone = rlora("train", "--resume", str(tmp_path / "low"), "--steps=4")
        assert alone.returncode == 0, alone.stderr
        assert [line["step"] for line in metrics(tmp_path / "low")] == [0, 1, 2, 3]


class Sums:
    """Sums to hold out, which the base can do now and then; to train on, prompts that have no answer."""

    def train(self) -> list[Prompt]:
        return [Prompt(f"What is {a} + {b}?") for a in range(1, 9) for b in range(1, 9)]

    def held_out(self) -> list[Prompt]:
        return [replace(prompt, answer=sum(map(int, re.findall(r"\d+", str(prompt.text))))) for prompt in self.train()]


def test_each_rule_of_health_holds_in_a_run_that_is_ill_in_its_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them over one engine and one learner; each also says what to do."""

    def right(completion: str, answer: Any) -> float:
        return float(str(answer) in completion)

    def terse(completion: str, answer: Any) -> float:  # of prompts without an answer
        return 0.9 / (1 + len(completion)) if answer is None else right(completion, answer)

    ill: dict[str, dict[str, Any]] = {
        "floor": {"reward": lambda completion: 0.0, "steps": 9, "health": {"steps": 2, "stop": ["floor"]}},
        "solved": {"reward": lambda completion: 1.0, "steps": 3},
        "truncated": {"sampling": {"max_tokens": 1}, "steps": 3},
        "failing_rewards": {
            "reward": lambda completion: 1 / (len(completion) % 2), "scoring": {"max_errors": 1.0}, "steps": 3,
        },
        "dead_part": {"reward": [right, "rlora.rewards.shaping:boxed"], "steps": 3},
        "no_signal": {"reward": lambda completion, answer: answer / 100, "steps": 3},
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
        "check": {"prompts": 0},
    }  # fmt: skip
    assert ill.keys() == RULES.keys()
    with ExitStack() as stack:
        for name, changes in ill.items():
            learner = {"threads": 2} | changes.get("learner", {})
            config = resolve_config(ROOT / TOML, small | changes | {"learner": learner})
            ill[name]["run"] = stack.enter_context(prepared(config, tmp_path / name))
        with pytest.raises(RloraError, match=r"1 of 10 runs failed:\nfloor, after 2 steps: health\.stop = \['floor'\]"):
            drive([changes["run"] for changes in ill.values()])
    told = capsys.readouterr().err
    for name in ill:
        lines = metrics(tmp_path / name)
        held = [line["step"] for line in lines if f"health/{name}" in line]
        assert held, f"{name}: {lines[-1]}"
        assert json.loads((tmp_path / name / "summary.json").read_text())["health"][name] == held[0]
        assert f"{name}, step {held[0] + 1}: {name}: {RULES[name].remedy[:40]}" in told  # type: ignore[index]
    assert checkpoint.versions(UPath(tmp_path / "floor")) == [0, 1, 2]


def sampled_ahead(run: Path) -> bool:
    """Whether the newest bundle has groups that are not learned from yet."""
    there = checkpoint.versions(UPath(run))
    newest = checkpoint.read(checkpoint.bundle_path(UPath(run), there[-1])) if there else None
    return bool(newest and any(each.group for each in newest.cursor.in_flight))


def test_what_was_sampled_before_a_kill_is_learned_from_after_it(tmp_path: Path) -> None:
    """kill -9 while the next step's prompts are in flight: each prompt is learned from once, in its turn."""
    run, there = tmp_path / "run", leftovers()
    toml = "--max-staleness", "1", "--sampling.max-tokens", "12", "--evaluate.prompts", "0"
    toml += "--algorithm.name", "grpo", "--algorithm.epochs", "4"  # that updates take longer than sampling does
    command = [sys.executable, "-m", "rlora", "train", TOML, "--resume", str(run), "--steps", "8", *SMALL, *toml]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while not sampled_ahead(run):
            process.send_signal(signal.SIGCONT)
            time.sleep(0.05)
            process.send_signal(signal.SIGSTOP)  # so that no other bundle comes before the kill
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
    finally:
        process.kill()
        process.wait()
    while any(what.startswith("process") for what in leftovers() - there):  # Ray ends them
        assert time.monotonic() < deadline
        time.sleep(0.5)
    left = Path(f"/dev/shm/rlora-{process.pid}")  # as an engine leaves it that is killed too, or one of an earlier run
    (left / "run-v1").mkdir(parents=True)
    before = checkpoint.read_version(UPath(run))
    assert before.cursor.in_flight  # prompts of the step after, under the version that they were sent under
    assert {each.adapter.number for each in before.cursor.in_flight if each.adapter} <= {before.version - 1}
    played = [each.group for each in before.cursor.in_flight if each.group]
    assert played
    done = rlora("train", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    assert f"starting from version {before.version}" in done.stdout
    assert not left.exists()

    config = read(run / "config.toml")
    prompts, learned = load_task(config).prompts, []
    for version in range(1, 9):
        groups = checkpoint.read_version(UPath(run), version).groups
        assert groups
        learned += groups
        if version > 1:  # the resumed run samples ahead as the one before did
            assert {episode.version.number for group in groups for episode in group.episodes} == {version - 2}
    taken = [group.prompt.token_ids for group in learned]
    assert taken == [prompt_at(prompts, place, config.seed).token_ids for place in range(len(taken))]
    ids = [[episode.completion_ids for episode in group.episodes] for group in learned]
    assert all([episode.completion_ids for episode in group.episodes] in ids for group in played)


def test_an_evaluation_that_a_kill_ended_is_done_again_and_once(tmp_path: Path) -> None:
    """kill -9 after version 2 was saved, while it answers the held-out prompts beside step 3. A tracker goes on too."""
    run, there = tmp_path / "run", leftovers()
    evaluate = "--evaluate.every", "2", "--evaluate.samples", "8", "--evaluate.prompts", "42"
    evaluate += "--evaluate.sets.easy.env-args.high", "3", "--evaluate.sets.easy.prompts", "5"
    evaluate += "--trackers.use", "tensorboard"
    command = [sys.executable, "-m", "rlora", "train", TOML, "--run-dir", str(run), "--steps", "5", *SMALL, *evaluate]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while not (run / "bundles" / "2").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)  # some of the 336 completions are there
    process.kill()
    process.wait()
    while any(what.startswith("process") for what in leftovers() - there):  # Ray ends them
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert [line["accuracy/version"] for line in metrics(run) if "accuracy/version" in line] == [0]
    done = rlora("train", "--resume", str(run))
    assert done.returncode == 0, done.stderr
    evaluated = [line for line in metrics(run) if "accuracy/version" in line]
    assert [line["accuracy/version"] for line in evaluated] == [0, 2, 4]
    for line in evaluated:
        for name in ("held_out", "easy"):
            low, accuracy, high = (line[f"accuracy/{name}{end}"] for end in ("/low", "", "/high"))
            assert low <= accuracy <= high
    summary = json.loads((run / "summary.json").read_text())
    assert summary["accuracy/version"] == 4
    assert summary["accuracy/easy/after"] <= 1
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("reward/mean", "accuracy/held_out"):
        told = [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        assert told == [(line["step"], line[name]) for line in metrics(run) if name in line]


@NEEDS_SHARED
def test_gsm8k_runs_three_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = rlora(
        "train", "launch/gsm8k.toml", "--env-args.path", str(SHARED / "data" / "gsm8k"), "--run-dir", str(run),
        "--steps", "3", "--sampling.max-tokens", "64", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(metrics(run)) == 3
    assert all(0 <= line["reward/mean"] <= 1 for line in metrics(run))


def test_a_bare_checkout_runs_as_a_ray_job_with_two_replicas(tmp_path: Path) -> None:
    """`ray job submit --working-dir .` to a cluster; what runs is the checkout, not the installed rlora."""
    checkout, run, ray = tmp_path / "checkout", tmp_path / "run", str(Path(sys.executable).parent / "ray")
    ignore = shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, checkout, ignore=ignore, symlinks=True)  # rlora/envs is envs/
    source = (checkout / "envs" / "arithmetic.py").read_text()
    (checkout / "envs" / "only_here.py").write_text(source)  # so that no other rlora can run the job
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job's `python` is that of the cluster
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token, "PATH": path}
    home = tempfile.mkdtemp(prefix="ray-")  # of its own: no later ray.init finds this cluster; short for its sockets
    head = "--head", "--port=0", "--dashboard-port=8299", f"--temp-dir={home}"
    job = [
        *("env", f"PYTHONPATH={sysconfig.get_path('purelib')}", sys.executable, "-S"),  # without the editable install
        *("-m", "rlora", "train", TOML, "--steps", "2", "--env", "rlora.envs.only_here:Arithmetic"),
        *("--engine.replicas", "2", "--engine.kv-cache-gib", "1", "--run-dir", str(run), *SMALL),
    ]
    submit = [ray, "job", "submit", *ADDRESS, "--working-dir", ".", "--", *job]
    try:
        with ray_node(tmp_path / "head.log", environment, *head):
            done = subprocess.run(
                submit, cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=600
            )
            ours = submitted(checkout, environment, tmp_path)
            left, stopped, ended = let_go(checkout, environment, tmp_path)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout  # its metrics are streamed
    assert len(metrics(run)) == 2
    good, bad, listed, nobody = ours
    assert good.returncode == 0, good.stdout + good.stderr
    assert "step 1/1" in good.stdout
    assert bad.returncode == 1
    assert "no judge today" in (bad.stdout + bad.stderr)[-2000:]
    assert re.search(r"good +succeeded", listed.stdout), listed.stdout
    assert re.search(r"bad +failed", listed.stdout), listed.stdout
    assert nobody.returncode == 1
    assert "--address http://127.0.0.1:1: " in nobody.stderr
    assert "Traceback" not in nobody.stderr
    assert left.returncode == 130
    assert f"rlora submit --follow long {' '.join(ADDRESS)}" in left.stdout
    assert "asked to stop" in stopped.stdout
    assert ended.returncode == 1
    assert "job long: stopped" in ended.stderr
    kept = sorted(int(bundle.name) for bundle in (tmp_path / "long" / "bundles").iterdir())
    assert kept[-1] == len(metrics(tmp_path / "long")) > 1  # `rlora train --resume` goes on from it


def test_a_wheel_runs_a_recipe_that_comes_with_it(tmp_path: Path) -> None:
    """Built from the checkout, installed into an environment that has what rlora needs and not rlora, run elsewhere."""
    checkout, elsewhere, environment = tmp_path / "checkout", tmp_path / "elsewhere", tmp_path / "venv"
    ignore = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, checkout, ignore=ignore, symlinks=True)
    elsewhere.mkdir()
    venv.create(environment, with_pip=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "needed.pth").write_text(
        sysconfig.get_path("purelib")
    )  # whose own .pth files, as of rlora, don't count
    python = str(environment / "bin" / "python")
    for command in (
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(checkout),
        ],
        [python, "-m", "pip", "install", "-q", "--no-deps", str(tmp_path / "rlora-0.1.0-py3-none-any.whl")],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(checkout)
    train = [str(environment / "bin" / "rlora"), "train", "launch/arithmetic.toml", "--steps", "2", *SMALL]
    done = subprocess.run(train, cwd=elsewhere, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (elsewhere / "runs").iterdir()
    assert len(metrics(run)) == 2
    where = "import rlora; print(rlora.__file__)"
    found = subprocess.run([python, "-c", where], cwd=elsewhere, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(environment))


def submitted(checkout: Path, environment: dict[str, str], place: Path) -> list[subprocess.CompletedProcess[str]]:
    """`rlora submit` of a run that ends and of one whose reward fails, `rlora jobs`, and an address where nobody is."""
    (checkout / "bad.py").write_text("def bad(completion, answer):\n    raise ValueError('no judge today')\n")
    small = TOML, "--steps", "1", *SMALL
    commands: list[tuple[str, ...]] = [
        ("submit", *small, *ADDRESS, "--name", "good", "--run-dir", str(place / "good")),
        ("submit", *small, *ADDRESS, "--name", "bad", "--reward", "bad.py:bad", "--run-dir", str(place / "bad")),
        ("jobs", *ADDRESS),
        ("submit", *small, "--address", "http://127.0.0.1:1"),
    ]
    return [called(command, checkout, environment) for command in commands]


def called(command: Sequence[str], checkout: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`rlora COMMAND` in a checkout, to its end."""
    line = [sys.executable, "-m", "rlora", *command]
    return subprocess.run(line, cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=600)


def let_go(
    checkout: Path, environment: dict[str, str], place: Path
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """A long job that is left by Ctrl-C and "n", stopped from elsewhere, and followed again to its end."""
    long = "submit", TOML, "--steps", "1000", *SMALL, *ADDRESS, "--name", "long", "--run-dir", str(place / "long")
    line = [sys.executable, "-m", "rlora", *long]
    terminal, stdin = os.openpty()
    process = subprocess.Popen(
        line, cwd=checkout, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    seen = ""
    while "step 2/1000" not in seen:
        text = process.stdout.readline()
        assert text, seen
        seen += text
    process.send_signal(signal.SIGINT)
    os.write(terminal, b"n\n")
    out, err = process.communicate(timeout=60)
    os.close(terminal)
    os.close(stdin)
    left = subprocess.CompletedProcess(line, process.returncode, seen + out, err)
    stopped = called(("jobs", "--stop", "long", *ADDRESS), checkout, environment)
    return left, stopped, called(("submit", "--follow", "long", *ADDRESS), checkout, environment)


def test_a_run_on_two_nodes_goes_on_where_one_dies(tmp_path: Path) -> None:
    """An engine is on either node. Their processes are told apart by the raylet that started them."""
    home, run = Path(tempfile.mkdtemp(prefix="ray-")), tmp_path / "run"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with ray_head(home, environment) as address, ExitStack() as second:
        second.enter_context(ray_node(tmp_path / "node.log", environment, f"--address={address}", "--num-cpus=1"))
        before = raylets()
        line = [sys.executable, "-m", "rlora", "train", TOML, "--steps", "6", "--run-dir", str(run), *SMALL,
                "--engine.replicas", "2", "--engine.kv-cache-gib", "1", "--restarts", "1"]  # fmt: skip
        with (tmp_path / "out.txt").open("w") as out:
            training = subprocess.Popen(
                line, cwd=ROOT, env=environment | {"RAY_ADDRESS": address}, stdout=out, stderr=out
            )
        told = (tmp_path / "out.txt").read_text
        try:
            while "step 2/6" not in told():
                assert training.poll() is None, told()
                time.sleep(0.2)
            over = engines_by_raylet()
            assert sorted(len(pids) for pids in over.values()) == [1, 1], over
            head = min(before, key=lambda raylet: raylet)  # the first that was started
            (other,) = over.keys() - {head}
            os.kill(other, signal.SIGKILL)
            assert training.wait(timeout=400) == 0, told()
        finally:
            training.kill()
    assert "step 6/6" in told()
    assert len(metrics(run)) == 6


def raylets() -> set[int]:
    """Those of this test."""
    found = (path for path in Path("/proc").glob("[0-9]*") if own(path))
    return {int(path.name) for path in found if b"raylet/raylet" in (path / "cmdline").read_bytes()}


def engines_by_raylet() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for raylet in raylets():
        children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
        titles = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        engines = [pid for pid, title in titles.items() if b"_EngineActor" in title]
        if engines:
            found[raylet] = engines
    return found


PHASES = ("idle", "loading", "canary", "sampling", "learning", "scoring")


@pytest.mark.parametrize("count", [6, pytest.param(24, marks=pytest.mark.slow)])
def test_a_run_outlives_its_engines_its_learners_and_its_scorers(
    config: Callable[..., Config], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9, once a step, of an engine in each of its phases, of a learner of two or of what scores.

    No prompt is lost or doubled.
    """
    small = config(
        prompts_per_step=4, group_size=4, steps=count + 1, max_staleness=1, learner={"lr": 5e-4, "replicas": 2},
        sampling={"max_tokens": 24, "max_prompt_tokens": 48},
        engine={"replicas": 2, "kv_cache_gib": 1, "straggler_seconds": 300.0},
    )  # fmt: skip
    task = load_task(small)
    monkeypatch.setattr(processes, "ENGINE", f"{ROOT / 'tests' / 'faulty_engine.py'}:MortalEngine")
    killed: set[int] = set()

    def kill_learner(remote: Any) -> None:
        _, pid = ray.get(remote.process)
        timer = threading.Timer(0.3, lambda: (os.kill(pid, signal.SIGKILL), killed.add(pid)))  # in its update
        timer.daemon = True
        timer.start()

    trained: list[Group] = []
    with cluster.start([ServedPolicy("run", small, task)]) as job:
        learners, fleet, loops = job.learners, job.fleet, job.loops
        learner, loop = learners["run"], loops["run"]
        ranks: Any = learner
        adapter = learner.open("run", Setup.of(small))
        rollouts = Rollouts(small, task.prompts, fleet, loop, Cursor())
        for step in range(small.steps):
            phase = PHASES[step % len(PHASES)] if step < count else None
            while not fleet.engines:  # one that replaces another is on its way
                time.sleep(0.1)
            engine: Any = fleet.engines[0]
            if phase == "idle":
                wait([each.flight.request.group for each in rollouts._sent])
                with pytest.raises(EngineLostError):
                    engine.die(phase).result()
            if phase == "loading":
                engine.die(phase).result()
            fleet.swap(adapter, oldest=adapter.number - small.max_staleness)
            if phase in ("canary", "sampling"):  # the canary goes with a version's first prompts
                engine.die(phase).result()
            if phase == "scoring":
                pool: Any = loop.scoring.pools[0]
                _, pid = ray.get(pool.actor.process.remote())
                os.kill(pid, signal.SIGKILL)
            collection = rollouts.take(adapter.number)
            if phase == "learning":
                kill_learner(ranks._remotes[step % 2])
            adapter, update = learner.update("run", collection.groups)
            assert (adapter.number, update.skipped_in_a_row) == (step + 1, 0)
            trained += collection.groups
        stats = fleet.stats()
    assert len(killed) == count // 6
    assert stats.lost == count * 4 // 6
    assert stats.replayed > 0
    places = [prompt_at(task.prompts, place, small.seed) for place in range(4 * small.steps)]
    assert [group.prompt for group in trained] == places
    assert all(len(group.episodes) == len(group.rewards) == 4 for group in trained)
    for place, group in enumerate(trained):
        (version,) = {episode.version for episode in group.episodes}
        assert place // 4 - 1 <= version.number <= place // 4
