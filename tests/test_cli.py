"""The command line, without starting anything."""

import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from conftest import ROOT

from rlora.cli import main
from rlora.config import Config

TOML = str(ROOT / "launch" / "arithmetic.toml")


def run(*arguments: str) -> int:
    """The exit status of `rlora ...`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlora", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


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
    for name in [*names(Config), "run_dir", "overwrite", "resume"]:
        option = "--" + name.replace("_", "-")
        assert re.search(rf"{re.escape(option)}(, --\S+)?(?![\w.-])[^-]* [A-Z]\w+", text), f"{option} has no help"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--learner.rank", "9"), r"learner\.rank = 9: .*less than or equal to 8"),
        (("--group_size", "1"), r"group_size = 1: .*2"),
        (("--sampling.top-p", "0.9"), r"sampling\.top_p: .*remove it"),
        (("--model", "./nowhere"), r"model = './nowhere': neither a local directory"),
        (("--reward", "mine.py:f"), r"reward = 'mine.py:f': there is no file mine.py"),
        (("--resume", "runs/none"), r"runs/none/config.toml: can't be read"),
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


@pytest.mark.parametrize("arguments", [("--steps", "many"), ("--learner.rnak", "2"), ("--nonsense",)])
def test_usage_errors(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", TOML, *arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "train,eval" in capsys.readouterr().err
