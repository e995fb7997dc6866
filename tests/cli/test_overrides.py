import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tomli_w
from conftest import ROOT
from upath import UPath

from rlora.cli.arguments import Eval, Plan, Replay, Show
from rlora.cli.grammar import split as split_fields
from rlora.cli.overrides import parse_source, parse_train, with_changes
from rlora.cli.sweep import parse_sweep
from rlora.config import differences, read, validate
from rlora.records import RloraError
from rlora.run.checkpoint import Bundle, bundle_path
from rlora.run.source import split
from rlora.settings import Config
from rlora.store import write_directory

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
    with pytest.raises(
        RloraError, match=r"s33://runs/x: .*s33.*; install the missing package, or use a local directory"
    ):
        split("s33://runs/x@7")


def test_a_resumed_run_has_its_own_config_and_what_is_asked_for_by_name(run: str) -> None:
    saved = read(Path(TOML))
    assert parse_train(["--resume", run]).config == saved
    resumed = parse_train(["--resume", run, "--steps", "200", "--learner.lr=1e-4", "--learner.betas", "0.5", "0.9"])
    assert differences(saved, resumed.config) == {
        "steps": (48, 200), "learner.lr": (5e-4, 1e-4), "learner.betas": ([0.9, 0.95], [0.5, 0.9]),
    }  # fmt: skip
    env_args = parse_train(["--resume", run, "--env_args.high=12", "--env-args.name", "x"]).config.env_args
    assert env_args == saved.env_args | {"high": 12, "name": "x"}
    grpo = parse_train(["--resume", run, "--algorithm.name", "grpo"]).config.algorithm
    assert (grpo.name, grpo.advantage, grpo.loss) == ("grpo", "standardised", "clip")
    assert parse_train([TOML, "--resume", run]).config == saved  # the file says the same
    assert parse_train([TOML, "--resume", run, "--steps=200"]).config == replace(saved, steps=200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("{other}",),
            r"other\.toml differs from it:\n  learner\.lr: 0\.0005 -> 0\.1\n.*set the fields to change by name",
        ),
        (("{other}", "--steps=4"), r"other\.toml differs from it:\n  learner\.lr: 0\.0005 -> 0\.1\nRemove"),
        (("--num-generations", "4"), r"--num-generations: no such option; use --group-size"),
        (("--learner.rnak=1",), r"--learner\.rnak: no such field; did you mean learner\.rank"),
        (("--steps",), r"--steps: no value; give --steps=VALUE"),
        (("--steps=0",), r"steps = 0: .*greater than 0"),
        (("--steps=many",), r"steps = 'many': .*valid integer"),
        (("--model=other",), r"model = 'other': --resume continues an adapter that was trained with 'demo:"),
        (("--learner.rank=2",), r"learner\.rank = 2: .* trained with 1, .*set learner\.rank to 1, or start a new run"),
        (("--learner.targets=mlp",), r"learner\.targets = 'mlp': .* trained with 'all'"),
        (("--learner.alpha=16",), r"learner\.alpha = 16\.0: "),
        (("--algorithm.name=ppo",), r"algorithm\.advantage = 'gae': "),
        (("--overwrite",), r"a run is resumed where it is; remove --run-dir, --overwrite and --fork"),
    ],
)
def test_nothing_else_is_taken(arguments: tuple[str, ...], message: str, run: str, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(Path(TOML).read_text().replace("lr = 5e-4", "lr = 0.1"))
    with pytest.raises(RloraError) as refused:
        parse_train(["--resume", run, *(argument.format(other=other) for argument in arguments)])
    assert re.search(message, str(refused.value))


def test_sets_to_evaluate_on_are_given_by_name(run: str) -> None:
    hard = ["--evaluate.sets.hard.prompts", "7", "--evaluate.sets.hard.env-args.operator=*"]
    sets = parse_train([TOML, "--evaluate.sets.easy.prompts=3", *hard]).config.evaluate.sets
    assert {name: evaluated.prompts for name, evaluated in sets.items()} == {"easy": 3, "hard": 7}
    assert sets["hard"].env_args == {"operator": "*"}
    assert parse_train(["--resume", run, "--evaluate.sets.hard.prompts=7"]).config.evaluate.sets["hard"].prompts == 7
    with pytest.raises(RloraError, match=r"evaluate\.sets\.hard\.promts = 7: no such field"):
        parse_train([TOML, "--evaluate.sets.hard.promts", "7"])
    with pytest.raises(RloraError, match=r"evaluate\.sets\.hard = 7: .*Additional sets of held-out prompts"):
        parse_train([TOML, "--evaluate.sets.hard", "7"])


def test_a_run_is_begun_where_none_is_yet_if_a_file_says_how(tmp_path: Path) -> None:
    given = parse_train([TOML, "--resume", str(tmp_path / "run")])
    assert (given.run_dir, given.resume) == (UPath(tmp_path / "run"), None)


def test_a_fork_takes_any_field_that_its_adapter_does_not_hang_on(run: str) -> None:
    given = parse_train(["--fork", run, "--learner.lr", "2e-4", "--seed", "1"])
    assert set(differences(read(Path(TOML)), given.config)) == {"learner.lr", "seed"}
    with pytest.raises(RloraError, match=r"learner\.rank = 4: --fork continues an adapter that was trained with 1"):
        parse_train(["--fork", run, "--learner.rank", "4"])


def test_a_fork_of_a_version_has_the_config_that_it_was_made_under(run: str, bundle: Callable[..., Bundle]) -> None:
    """Not what the run was changed to later."""
    made = replace(read(Path(TOML)), steps=7)
    write_directory(bundle_path(UPath(run), 3), bundle(3, config=made).files)
    given = parse_train(["--fork", f"{run}@3", "--learner.lr", "2e-4"])
    assert set(differences(made, given.config)) == {"learner.lr"}
    with pytest.raises(RloraError, match=r"there is no bundle of version 4; use one of the versions 3"):
        parse_train(["--fork", f"{run}@4"])


def test_a_replay_is_over_the_config_that_its_version_was_made_under(run: str) -> None:
    """What is given counts also where the run's own config says the same by now."""
    own = read(Path(TOML))
    made = replace(own, learner=replace(own.learner, lr=1e-5))
    replayed = parse_source(Replay, "rlora replay", [run, "--learner.lr", str(own.learner.lr)])
    config = with_changes(asdict(made), replayed.changes)
    assert differences(made, config) == {"learner.lr": (1e-5, own.learner.lr)}
    assert with_changes(asdict(made), parse_source(Replay, "rlora replay", [run]).changes) == made


def test_changes_of_every_kind(config: Callable[..., Config]) -> None:
    arguments = ['--chat.stop=["="]', "--learner.head=true", "--dtype=bfloat16", '--reward=["a.py:f"]']
    changed = with_changes(asdict(config()), split_fields(arguments, ())[0])
    assert (changed.chat.stop, changed.learner.head, changed.dtype, changed.reward) == (
        ("=",),
        True,
        "bfloat16",
        ("a.py:f",),
    )


def without(tmp_path: Path, *names: str) -> str:
    """The TOML of the main job without these fields."""
    lines = Path(TOML).read_text().splitlines()
    path = tmp_path / "part.toml"
    path.write_text("\n".join(line for line in lines if line.partition(" =")[0] not in names))
    return str(path)


@pytest.mark.parametrize("name", ["model", "env", "reward"])
def test_the_command_line_fills_a_file_without_a_required_field(name: str, tmp_path: Path) -> None:
    own = read(Path(TOML))
    file, value = without(tmp_path, name), str(getattr(own, name))
    assert parse_train([file, f"--{name}", value]).config == own
    assert parse_train([file, f"--{name}={value}"]).config == own
    assert parse_source(Eval, "rlora eval", [file, f"--{name}", value]).config == own
    assert parse_source(Show, "rlora show", ["prompt", file, f"--{name}", value]).config == own
    with pytest.raises(RloraError, match=rf"part\.toml: {name}: not set, and it has no default"):
        parse_train([file])


def test_the_command_line_fills_all_of_them_and_a_files_arguments_stay(tmp_path: Path) -> None:
    own = read(Path(TOML))
    file = without(tmp_path, "model", "env", "reward")
    given = ["--model", own.model, "--env", own.env, "--reward", str(own.reward)]
    assert parse_train([file, *given]).config == own
    with pytest.raises(RloraError, match=r"reward: not set"):
        parse_train([file, *given[:4]])


def test_the_check_comes_after_the_command_line(tmp_path: Path) -> None:
    """What a file says wrongly may be said rightly beside it."""
    file = tmp_path / "a.toml"
    file.write_text(Path(TOML).read_text() + "\n[evaluate]\nprompts = -1\n")
    assert parse_train([str(file), "--evaluate.prompts", "3"]).config.evaluate.prompts == 3
    with pytest.raises(RloraError, match=r"a\.toml: evaluate\.prompts = -1: "):
        parse_train([str(file), "--steps", "3"])
    with pytest.raises(RloraError, match=r"^evaluate\.prompts = -2: "):
        parse_train([str(file), "--evaluate.prompts", "-2"])


def test_arguments_of_another_plug_in_go_and_a_preset_goes_with_its_name(tmp_path: Path) -> None:
    own = read(Path(TOML))
    assert own.env_args
    assert parse_train([TOML, "--env", "mine.py:Mine"]).config.env_args == {}
    assert parse_train([TOML, "--env", own.env]).config.env_args == own.env_args
    assert parse_train([TOML, "--env", "mine.py:Mine", "--env-args.x", "1"]).config.env_args == {"x": 1}
    file = tmp_path / "a.toml"
    file.write_text(Path(TOML).read_text() + '\n[algorithm]\nname = "gspo"\n')
    algorithm = parse_train([str(file), "--algorithm.name", "ppo", "--algorithm.truncated=bootstrap"]).config.algorithm
    assert (algorithm.loss, algorithm.advantage, algorithm.truncated) == ("clip", "gae", "bootstrap")


def test_lists_of_numbers_and_texts_are_arguments(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    text = 'levels = [1, 2]\nnames = ["a", "b"]\nnone = []\nmixed = [1, "b", 2.5, true]\n'
    head = Path(TOML).read_text().partition("[env_args]")[0]
    file.write_text(f"{head}\n[env_args]\n{text}[reward_args]\n{text}[chat.template_args]\n{text}")
    wanted = {"levels": [1, 2], "names": ["a", "b"], "none": [], "mixed": [1, "b", 2.5, True]}
    config = parse_train([str(file)]).config
    assert (config.env_args, config.reward_args, config.chat.template_args) == (wanted, wanted, wanted)
    copy = tmp_path / "config.toml"  # as a run writes it
    copy.write_text(tomli_w.dumps(asdict(config)))
    assert read(copy) == config == validate(json.loads(json.dumps(asdict(config))))
    given = ["--env-args.levels", "[3]", '--reward-args.names=["c"]', "--chat.template-args.none", "[1.5]"]
    config = parse_train([str(file), *given]).config
    assert config.env_args == wanted | {"levels": [3]}
    assert config.reward_args == wanted | {"names": ["c"]}
    assert config.chat.template_args == wanted | {"none": [1.5]}
    assert with_changes(asdict(config), {"env_args.levels": [4, 5]}).env_args["levels"] == [4, 5]


@pytest.mark.parametrize("value", ["[[1], 2]", '{"a": 1}', "null", "[null]", "NaN"])
def test_other_arguments_are_refused_with_what_they_may_be(value: str) -> None:
    for option in ("env-args", "reward-args", "chat.template-args"):
        name = option.replace("-", "_")
        with pytest.raises(
            RloraError, match=rf"^{name}\.x = .*: use text, a number, true or false, or a list of them$"
        ):
            parse_train([TOML, f"--{option}.x", value])


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--learner.rank", "4"], "learner.rank", 4),
        (["--learner.rank=4"], "learner.rank", 4),
        (["--learner.lr", "auto"], "learner.lr", "auto"),
        (["--learner.lr=1e-4"], "learner.lr", 1e-4),
        (["--seed", "-1"], "seed", -1),
        (["--model", "7"], "model", "7"),  # a text, though it reads as a number
        (["--learner.shard"], "learner.shard", True),
        (["--learner.shard", "false"], "learner.shard", False),
        (["--learner.checkpointing", "auto"], "learner.checkpointing", "auto"),
        (["--learner.checkpointing"], "learner.checkpointing", True),
        (["--trackers.use", "wandb"], "trackers.use", ["wandb"]),
        (["--trackers.use", "wandb", "mlflow"], "trackers.use", ["wandb", "mlflow"]),
        (['--trackers.use=["wandb", "mlflow"]'], "trackers.use", ["wandb", "mlflow"]),
        (["--reward", "a.py:f"], "reward", "a.py:f"),
        (["--reward", "a.py:f", "b.py:g"], "reward", ["a.py:f", "b.py:g"]),
        (["--chat.stop", "7"], "chat.stop", ["7"]),
        (["--learner.betas", "0.5", "0.9"], "learner.betas", [0.5, 0.9]),
        (["--env-args.high", "12"], "env_args.high", 12),
        (["--evaluate.sets.hard.env-args.operator=*"], "evaluate.sets.hard.env_args.operator", "*"),
        # forms of earlier releases, which are accepted with a warning
        (["--learner.no-shard"], "learner.shard", False),
        (["--set", "learner.rank=4"], "learner.rank", 4),
        (["--algorithm.kl-in", "reward"], "algorithm.kl_estimator", "k1"),
        (["--algorithm.drop-truncated"], "algorithm.truncated", "drop"),
        (["--algorithm.bootstrap-truncated=true"], "algorithm.truncated", "bootstrap"),
    ],
)
def test_one_grammar_for_every_command(arguments: list[str], field: str, value: object, run: str) -> None:
    """After a file, a run that is resumed or forked, one that is replayed, and the members of a sweep."""
    for command in ([TOML], ["--resume", run], ["--fork", run]):
        assert split_fields([*command, *arguments], {"resume", "fork"}) == ({field: value}, command)
    if not field.startswith(("model", "env_args", "reward", "learner.rank", "evaluate", "learner.shard", "algorithm")):
        for options in (
            parse_train([TOML, *arguments]), parse_train(["--resume", run, *arguments]),
            parse_train(["--fork", run, *arguments]), parse_source(Replay, "rlora replay", [run, *arguments]),
            parse_source(Plan, "rlora plan", [TOML, *arguments]), parse_sweep([TOML, *arguments])[0],
        ):  # fmt: skip
            assert options.changes == {field: value}


def test_an_old_form_is_shown_in_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    split_fields(["--set", "steps=4", "learner.lr=1e-3", "--learner.no-head"], ())
    assert capsys.readouterr().err.splitlines() == [
        "rlora: --set is the form of an earlier release; write --steps=4 --learner.lr=1e-3",
        "rlora: --learner.no-head is the form of an earlier release; write --learner.head=false",
    ]


def test_every_broken_rule_has_a_line() -> None:
    with pytest.raises(RloraError) as refused:
        parse_train([TOML, "--group-size", "1", "--critic.warmup", "99", "--algorithm.name", "ppo",
                     "--algorithm.target-kl", "0", "--algorithm.minibatches", "17", "--chat.stop", ""])  # fmt: skip
    names = [line.partition(" = ")[0] for line in str(refused.value).splitlines()]
    assert names == ["chat.stop", "critic.warmup", "algorithm.minibatches"]
