"""The command line, without starting anything."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints
from unittest.mock import Mock

import pytest
from conftest import ROOT
from conftest import exit_status as run
from upath import UPath

from rlora import __version__
from rlora.cli.overrides import parse_train
from rlora.config import read
from rlora.records import RloraError
from rlora.rollout.task import load_task
from rlora.run import directory, resume
from rlora.run.checkpoint import Bundle, bundle_path
from rlora.settings import Config
from rlora.store import write_directory

TOML = str(ROOT / "launch" / "arithmetic.toml")


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command here gets as far as to need the processes that it starts ahead."""
    monkeypatch.setattr("rlora.cluster.starting", lambda *_, **__: nullcontext())


def names(section: type, prefix: str = "") -> list[str]:
    hints = get_type_hints(section)
    found = []
    for field in fields(section):
        name = f"{prefix}{field.name}"
        found += names(hints[field.name], f"{name}.") if is_dataclass(hints[field.name]) else [name]
    return found


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--help") == 0
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "--evaluate.sets.NAME.prompts" in text
    for name in {*names(Config), "run_dir", "overwrite", "resume"} - {"evaluate.sets"}:
        option = "--" + name.replace("_", "-")
        assert re.search(rf"{re.escape(option)}(, --\S+)?(?![\w.-])( \{{[^}}]*\}})?[^-]* [A-Z]\w+", text), (
            f"{option} has no help"
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--learner.rank", "9"), r"learner\.rank = 9: .*less than or equal to 8"),
        (("--group_size", "1"), r"group_size = 1: .*2 or more"),
        (("--sampling.top-p", "0"), r"sampling\.top_p = 0: .*greater than 0"),
        (("--sampling.repetition-penalty", "0.9"), r"sampling\.repetition_penalty: .*remove sampling\.repetition"),
        (("--model", "./nowhere"), r"model = './nowhere': there is no such directory"),
        (("--model", "nobody/here/this"), r"model = 'nobody/here/this': there is no such directory"),
        (("--reward", "mine.py:f"), r"reward = 'mine.py:f': there is no file mine.py"),
        (("--resume", "runs/none"), r"--resume runs/none: a run is resumed where it is; remove --run-dir"),
        (("--fork", "runs/none@3"), r"arithmetic\.toml: a fork has the config of its run; remove the file"),
        (("--learner.start-from", "none"), r"learner\.start_from = 'none': none: there is no adapter in PEFT's format"),
        (("--env-args.operator", "/"), r"env_args\.operator = '/': use one of"),
        (("--env-args.hihg=3",), r"env_args = .*'hihg': 3.*unexpected keyword argument 'hihg'"),
        (("--learner.betas", "0.9", "1.5"), r"learner\.betas\.1 = 1\.5: .*less than 1"),
    ],
)
def test_bad_input_is_told_in_a_line_and_makes_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", TOML, "--run-dir", str(tmp_path / "run"), *arguments) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "nowhere"), r"nowhere: not the directory of a run"),
        (("eval",), r"no run and no config; name the directory of a run"),
        (("grade", "nowhere.jsonl", "--out", "out.jsonl"), r"nowhere\.jsonl: there is no such file"),
        (("grade", "same.jsonl", "--out", "./same.jsonl"), r"--out same\.jsonl: it is the file to grade"),
        (
            ("train", "--resume", "runs/none"),
            r"runs/none: not the directory of a run .*use a directory that `rlora train` created",
        ),
        (("train", "--fork", "runs/none@3"), r"runs/none: not the directory of a run"),
        (("replay", "nowhere"), r"nowhere: not the directory of a run"),
        (("replay", "{run}"), r"run: no two consecutive checkpoints are kept, .*larger checkpoint\.keep_last"),
        (
            ("replay", "{run}", "--step", "3"),
            r"--step 3: needs the bundles of versions 3 and 4; use one of the steps whose",
        ),
        (("replay", "{run}@2", "--step", "3"), r"--step 3: .*run@2 names a different version; use one of the two"),
        (
            ("replay", "{run}", "--learner.rank", "2"),
            r"learner\.rank = 2: rlora replay continues an adapter that was",
        ),
        (("runs", "nowhere"), r"nowhere: it contains no runs"),
        (("export", "nowhere", "--to", "out"), r"nowhere: not the directory of a run"),
        (("eval", "{run}"), r"run: there is no bundle yet; `rlora train --resume"),
        (("eval", "{run}", "--prompts", "-1"), r"evaluate\.prompts = -1: .*greater than or equal to 0"),
        (("export", "{run}", "--to", "out", "--dtype", "float32"), r"--dtype float32: .*add --merge"),
        (("scale", "nowhere", "2"), r"nowhere: not the directory of a run"),
        (("scale", "{run}", "9"), r"engines = 9: the run's engine\.max_replicas allows 1 to 8"),
    ],
)
def test_what_is_asked_of_a_run_that_can_not_give_it(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "launch", tmp_path / "run")
    (tmp_path / "run" / "arithmetic.toml").rename(tmp_path / "run" / "config.toml")
    assert run(*(argument.format(run=tmp_path / "run") for argument in arguments)) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.fixture
def finished(tmp_path: Path, bundle: Callable[..., Bundle]) -> UPath:
    """A run that has done its three steps."""
    config, made = read(Path(TOML)), UPath(tmp_path / "run")
    config = replace(config, steps=3, evaluate=replace(config.evaluate, prompts=5))
    task = load_task(config)
    directory.create(made, config, task)
    last = bundle(3, config=config, origin=directory.Provenance.current(made, task))
    write_directory(bundle_path(made, 3), last.files)
    measured = {"accuracy/before": 0.25, "accuracy/after": 0.75, "accuracy/prompts": 5}
    totals = {"time/total": 9.0, "time/train": 8.0}
    directory.summarise(made, resume.describe(made, last.adapter) | measured | totals)
    return made


def test_a_finished_run_that_is_started_again_says_so_and_ends_well(
    finished: UPath, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that what starts it again after every end stops doing so."""
    assert run("train", "--resume", str(finished)) == 0
    assert "accuracy after" in capsys.readouterr().out
    assert run("train", "--resume", str(finished), "--steps", "3") == 0  # what it says already
    assert run("train", "--resume", str(finished), "--learner.lr", "1e-5") == 1
    assert "steps = 3: " in (said := capsys.readouterr().err)
    assert "has completed all steps; set --steps to a larger number" in said


def test_a_run_is_measured_on_the_same_prompts_before_and_after(
    finished: UPath, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "config.toml").read_text()
    assert run("train", "--resume", str(finished), "--steps=9", "--evaluate.prompts=7") == 1
    assert "evaluate.prompts = 7: accuracy before training was measured on 5 " in capsys.readouterr().err
    assert (finished / "config.toml").read_text() == before  # what was refused is not asked for by the next one


def test_a_fork_does_not_overwrite_what_it_comes_from(finished: UPath, capsys: pytest.CaptureFixture[str]) -> None:
    fork = "train", "--fork", f"{finished}@3", "--steps", "9", "--run-dir", str(finished), "--overwrite"
    assert run(*fork) == 1
    assert re.search(r"--fork .*run@3: this run is in .*run, which --overwrite would remove;", capsys.readouterr().err)
    assert bundle_path(finished, 3).exists()


def test_the_args_of_a_file_go_with_its_env_only() -> None:
    other = "rlora.envs.gsm8k:GSM8K"
    given = {"low": 1, "high": 11, "held_out_share": 0.35}
    assert parse_train([TOML]).config.env_args == given
    assert parse_train([TOML, "--env-args.high", "5"]).config.env_args == given | {"high": 5}
    assert parse_train([TOML, "--env", other, "--env-args.path=p"]).config.env_args == {"path": "p"}


def test_an_algorithms_name_brings_its_settings_but_for_those_given_beside_it() -> None:
    algorithm = parse_train([TOML, "--algorithm.name", "gspo", "--algorithm.clip-high", "0.1"]).config.algorithm
    assert (algorithm.loss, algorithm.clip_low, algorithm.clip_high) == ("gspo", 3e-4, 0.1)
    ppo = parse_train(["launch/arithmetic-ppo.toml", "--algorithm.lam", "0.5"]).config
    assert (ppo.algorithm.advantage, ppo.algorithm.minibatches, ppo.algorithm.lam) == ("gae", 4, 0.5)
    assert parse_train(["launch/arithmetic-ppo.toml", "--algorithm.name", "rloo"]).config.algorithm.minibatches == 1


def test_a_config_file_may_have_any_name_and_place(tmp_path: Path) -> None:
    file = shutil.copy(TOML, tmp_path / "mine")
    for arguments in (["--steps", "7", str(file)], [str(file), "--steps=7", "--run-dir", "a.toml"]):
        config = parse_train(arguments).config
        assert (config.model, config.learner.lr, config.steps) == ("demo:smollm2-135m", 5e-4, 7)


@pytest.mark.parametrize("arguments", [("--steps",), ("--learner.rnak", "2"), ("--nonsense",)])
def test_usage_errors(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", TOML, *arguments) == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "eval", "replay", "show", "runs", "export", "grade", "scale"])
def test_help_needs_nothing_else(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert f"usage: rlora {command}" in shown
    if command not in ("train", "runs"):
        assert "positional arguments" in shown


def test_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train") == 1
    assert "no config; name a TOML file, as in `rlora train launch/arithmetic.toml`" in capsys.readouterr().err
    assert run("train", "--steps", "3") == 1
    missing = capsys.readouterr().err.removeprefix("rlora: ").splitlines()
    assert [line.partition(":")[0] for line in missing] == ["model", "env", "reward"]


def test_output_that_is_no_longer_read_is_no_error() -> None:
    for arguments in ("--help", "train --help"):
        command = f"{sys.executable} -m rlora {arguments} | head -1; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: rlora")


def test_what_a_run_ends_with_says_first_why_and_then_how_to_continue(
    finished: UPath, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, status, why in (
        (RloraError("reward: it is ill"), 1, "rlora: reward: it is ill\n"),
        (KeyboardInterrupt(), 130, "rlora: interrupted\n"),
        (SystemExit(143), 143, ""),  # a signal, which was told
    ):
        monkeypatch.setattr(sys.modules["rlora.train"], "drive", Mock(side_effect=error))
        assert run("train", "--resume", str(finished), "--steps=4") == status
        told = capsys.readouterr().err
        assert told.endswith(f"{why}`rlora train --resume {finished}` continues from the newest saved step\n")


def test_a_run_directory_that_is_taken_is_told_before_anything_is_loaded(
    finished: UPath, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlora.run.prepare.prepared", Mock(side_effect=AssertionError))
    assert run("train", TOML, "--run-dir", str(finished)) == 1
    assert f"--run-dir {finished}: the directory is not empty; resume its run with" in capsys.readouterr().err


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == run("tarin") == 2
    shown = capsys.readouterr()
    assert "rlora: 'tarin' is not a command" in shown.err
    words = "train Train|sweep Train|pause, go, drop Ask|fork Add|eval Answer|check Try|plan Predict|replay Recompute|"
    words += "runs List|report Write|export Write|grade Grade|show Show"
    listed = ".*\n +".join(words.replace(" ", " +").split("|"))
    assert re.search(listed, shown.err)
    assert run("--help") == run("--version") == 0
    assert "usage: rlora COMMAND" in (out := capsys.readouterr().out)
    assert f"rlora {__version__}\n" in out


def test_show_prompt_tells_what_the_policy_reads_and_what_ends_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "prompt", TOML, "--chat.system", "Be brief.", "--chat.stop", "!!", "--number", "3") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is ")
    assert "the policy's message ends with '<|im_end|>' or '!!'" in shown
    assert run("show", "prompt", TOML, "--number", "1000") == 1
    assert "--number 1000: there are 79 training prompts" in capsys.readouterr().err


def test_grade_adds_a_status_and_a_reward_and_keeps_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        {"gold": "3/4", "prediction": "so it is \\boxed{0.75}.", "id": "a"},
        {"gold": 7, "prediction": "\\boxed{8}", "id": "b"},
        {"gold": "7", "prediction": "", "id": "c\u2028"},
    ]
    file, out = tmp_path / "given.jsonl", tmp_path / "graded.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given))
    assert run("grade", str(file), "--out", str(out), "--workers", "1") == 0
    graded = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["status"], row["reward"]) for row in graded] == [
        ("a", "correct", 1.0), ("b", "wrong", 0.0), ("c\u2028", "unparsable", 0.0),
    ]  # fmt: skip
    assert [{name: row[name] for name in one} for one, row in zip(given, graded, strict=True)] == given
    assert "3 rows in" in capsys.readouterr().out


def test_grade_with_a_function_of_ones_own_that_hangs(tmp_path: Path) -> None:
    file, out = tmp_path / "given.jsonl", tmp_path / "graded.jsonl"
    file.write_text('{"gold": "7", "prediction": "7"}\n\n{"gold": "7", "prediction": "hang"}\n')
    shady = f"{ROOT / 'tests' / 'shady_rewards.py'}:shady"
    assert run("grade", str(file), "--out", str(out), "--reward", shady, "--deadline", "0.5") == 0
    assert [json.loads(line)["status"] for line in out.read_text().splitlines()] == ["correct", "timeout"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"gold": "7"}', 'line 1: each row needs "gold" and a string "prediction"'),
        ('{"gold": "7", "prediction": 7}', "line 1: each row needs"),
    ],
)
def test_a_row_that_can_not_be_graded_is_named(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "given.jsonl"
    file.write_text(line + "\n")
    assert run("grade", str(file), "--out", str(tmp_path / "out.jsonl")) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
