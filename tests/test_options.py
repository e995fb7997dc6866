import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from upath import UPath

from rlora.checkpoint import Bundle, bundle_path
from rlora.config import Config, read
from rlora.options import differences, parse_replay, parse_train, split, with_changes
from rlora.records import RloraError
from rlora.storage import write_directory

TOML = str(ROOT / "launch" / "arithmetic.toml")


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run's directory, as far as its config goes."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(Path(TOML).read_text())
    return str(tmp_path / "run")


def test_a_run_and_a_step() -> None:
    assert split("runs/x") == (UPath("runs/x"), None)
    assert split("runs/x@40") == (UPath("runs/x"), 40)
    assert split("runs/x@home") == (UPath("runs/x@home"), None)
    assert split("memory://bucket/runs/x@7") == (UPath("memory://bucket/runs/x"), 7)
    with pytest.raises(RloraError, match=r"s33://runs/x: .*s33.*; install what that names, or give a local directory"):
        split("s33://runs/x@7")


def test_a_resumed_run_has_its_own_config_and_what_is_asked_for_by_name(run: str) -> None:
    own = read(Path(TOML))
    assert parse_train(["--resume", run]).config == own
    given = parse_train(["--resume", run, "--set", "steps=200", "learner.lr=1e-4", "learner.betas=[0.5, 0.9]"])
    assert differences(own, given.config) == {
        "steps": (48, 200), "learner.lr": (5e-4, 1e-4), "learner.betas": ([0.9, 0.95], [0.5, 0.9]),
    }  # fmt: skip
    of_env = parse_train(["--resume", run, "--set", "env_args.high=12", "env-args.name=x"]).config
    assert of_env.env_args == own.env_args | {"high": 12, "name": "x"}
    grpo = parse_train(["--resume", run, "--set", "algorithm.name=grpo"]).config.algorithm
    assert (grpo.name, grpo.advantage, grpo.loss) == ("grpo", "standardised", "clip")
    assert parse_train([TOML, "--resume", run]).config == own  # the file says the same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--learner.lr", "1e-4"), r"learner\.lr: 0\.0005 -> 0\.0001\n.*--set learner\.lr=0\.0001"),
        (("--steps", "200", "--set", "learner.lr=1e-4"), r"steps: 48 -> 200"),
        (("{other}",), r"learner\.lr: 0\.0005 -> 0\.1\n.*--set learner\.lr=0\.1"),
        (("--set", "learner.rnak=1"), r"--set learner\.rnak=1: no such field; did you mean learner\.rank"),
        (("--set", "steps"), r"--set steps: no value; give NAME=VALUE"),
        (("--set", "steps=0"), r"steps = 0: .*greater than or equal to 1"),
        (("--set", "steps=many"), r"steps = 'many': .*valid integer"),
        (("--set", "model=other"), r"model = 'other': --resume goes on with an adapter that was trained with 'demo:"),
        (("--set", "learner.rank=2"), r"learner\.rank = 2: .* trained with 1, .*leave it out, or start a new run"),
        (("--set", "learner.targets=mlp"), r"learner\.targets = 'mlp': .* trained with 'all'"),
        (("--set", "learner.alpha=16.0"), r"learner\.alpha = 16\.0: "),
        (("--set", "algorithm.name=ppo"), r"algorithm\.advantage = 'gae': "),
        (("--overwrite",), r"a run goes on where it is; leave out --run-dir, --overwrite and --fork"),
    ],
)
def test_nothing_else_is_taken(arguments: tuple[str, ...], message: str, run: str, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(Path(TOML).read_text().replace("lr = 5e-4", "lr = 0.1"))
    with pytest.raises(RloraError) as refused:
        parse_train(["--resume", run, *(argument.format(other=other) for argument in arguments)])
    assert re.search(message, str(refused.value))


def test_a_run_is_begun_where_none_is_yet_if_a_file_says_how(tmp_path: Path) -> None:
    given = parse_train([TOML, "--resume", str(tmp_path / "run")])
    assert (given.run_dir, given.resume) == (UPath(tmp_path / "run"), None)


def test_a_fork_takes_any_field_that_its_adapter_does_not_hang_on(run: str) -> None:
    given = parse_train(["--fork", run, "--learner.lr", "2e-4", "--seed", "1"])
    assert set(differences(read(Path(TOML)), given.config)) == {"learner.lr", "seed"}
    with pytest.raises(RloraError, match=r"learner\.rank = 4: --fork goes on with an adapter that was trained with 1"):
        parse_train(["--fork", run, "--learner.rank", "4"])


def test_a_fork_of_a_version_has_the_config_that_it_was_made_under(run: str, bundle: Callable[..., Bundle]) -> None:
    """Not what the run was changed to later."""
    made = replace(read(Path(TOML)), steps=7)
    write_directory(bundle_path(UPath(run), 3), bundle(3, config=made).files)
    given = parse_train(["--fork", f"{run}@3", "--learner.lr", "2e-4"])
    assert set(differences(made, given.config)) == {"learner.lr"}
    with pytest.raises(RloraError, match=r"it keeps no bundle of version 4; there are 3"):
        parse_train(["--fork", f"{run}@4"])


def test_a_replay_is_over_the_config_that_its_version_was_made_under(run: str) -> None:
    """What is given counts also where the run's own config says the same by now."""
    own = read(Path(TOML))
    made = replace(own, learner=replace(own.learner, lr=1e-5))
    asked = parse_replay([run, "--learner.lr", str(own.learner.lr)], made).config
    assert differences(made, asked) == {"learner.lr": (1e-5, own.learner.lr)}
    assert parse_replay([run], made).config == made


def test_changes_of_every_kind(config: Callable[..., Config]) -> None:
    changed = with_changes(config(), ['chat.stop=["="]', "learner.head=true", "dtype=bfloat16", 'reward=["a.py:f"]'])
    assert (changed.chat.stop, changed.learner.head, changed.dtype, changed.reward) == (
        ("=",),
        True,
        "bfloat16",
        ("a.py:f",),
    )
