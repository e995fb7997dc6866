import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from conftest import ROOT

from rlora.config import check_learnable, read, validate
from rlora.plugin import load
from rlora.records import RloraError
from rlora.settings import Config

MINIMAL = {"model": "m", "env": "a:B", "reward": "c:d"}


def test_main_job_is_valid() -> None:
    config = read(ROOT / "launch" / "arithmetic.toml")
    assert (config.learner.rank, config.group_size, config.max_model_len) == (1, 8, 80)


def test_written_config_reads_back_equal(tmp_path: Path) -> None:
    config = validate(MINIMAL | {"env_args": {"high": 9, "operator": "*"}, "learner": {"betas": [0.8, 0.99]}})
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(asdict(config) | {"provenance": {"torch": "1"}}))
    assert read(path) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner": {"rank": 9}}, r"learner\.rank = 9: .*less than or equal to 8.*1 to 8"),
        ({"learner": {"rank": 0}}, r"learner\.rank = 0: .*greater than or equal to 1"),
        ({"learner": {"rank": "4"}}, r"learner\.rank = '4': .*valid integer"),
        ({"learner": {"lr": float("nan")}}, r"learner\.lr = nan"),
        ({"learner": {"lr": "much"}}, r"^learner\.lr = 'much': [^\n]*$"),
        ({"algorithm": {"name": "sarsa"}}, r"algorithm\.name = 'sarsa': .*'reinforce', 'grpo'"),
        ({"algorithm": {"dual_clip": 0.5}}, r"algorithm\.dual_clip = 0\.5: .*above 1"),
        (
            {"algorithm": {"dual_clip": 3.0}},
            r"algorithm\.dual_clip = 3\.0: algorithm\.loss = 'reinforce' has no clipped",
        ),
        ({"algorithm": {"truncated": "bootstrap"}}, r"algorithm\.truncated = 'bootstrap': bootstrap needs a critic"),
        (
            {"algorithm": {"name": "ppo"}, "critic": {"warmup": 9}, "steps": 9},
            r"critic\.warmup = 9: the policy would never learn in 9 steps",
        ),
        ({"algorithm": {"name": "gspo", "correction": "token-mask"}}, r"algorithm\.correction = 'token-mask': GSPO"),
        ({"algorithm": {"name": "gspo", "advantage": "gae"}}, r"algorithm\.advantage = 'gae': advantages are"),
        ({"algorithm": {"target_kl": 0.1}}, r"algorithm\.target_kl = 0\.1: an update with one minibatch"),
        ({"algorithm": {"importance_floor": 0.5}}, r"importance_floor = 0\.5: .*'token-truncate' masks nothing; set"),
        ({"algorithm": {"name": "gspo", "importance_floor": 0.5}}, r'correction to "episode-mask"'),
        ({"algorithm": {"name": "grpo", "dual_clip": 1.1}}, r"algorithm\.dual_clip = 1\.1: .*dual_clip above 1\.2"),
        ({"algorithm": "grpo"}, r"algorithm = 'grpo': "),
        ({"algorithm": {"name": ["grpo"]}}, r"algorithm\.name = \['grpo'\]: "),
        ({"algorithm": {"name": "ppo", "minibatches": 17}}, r"algorithm\.minibatches = 17: a step has 16 groups"),
        ({"algorithm": {"name": "ppo", "refills": 1}}, r"algorithm\.refills = 1: groups with equal rewards do carry"),
        ({"algorithm": {"overlong_tokens": 999}}, r"algorithm\.overlong_tokens = 999: a completion has at most 256"),
        ({"algorithm": {"overlong_tokens": 9}}, r"algorithm\.overlong_penalty = 0\.0: algorithm\.overlong_tokens is 9"),
        ({"algorithm": {"kl": 0.1}, "learner": {"adapter": "none"}}, r"algorithm\.kl = 0\.1: the reference policy"),
        ({"algorithm": {"name": "ppo"}, "learner": {"adapter": "none"}}, r"algorithm\.advantage = 'gae': the critic"),
        ({"group_size": 0}, r"group_size = 0: .*greater than 0.*relative to the group"),
        ({"group_size": 1}, r"group_size = 1: algorithm\.advantage = 'centred' is relative to the other"),
        ({"steps": True}, r"steps = True: .*valid integer"),
        ({"dtype": "int8"}, r"dtype = 'int8': .*'bfloat16' or 'float32'"),
        (
            {"max_staleness": 2, "checkpoint": {"keep_last": 2}},
            r"checkpoint\.keep_last = 2: with max_staleness = 2 .*; set checkpoint\.keep_last to 3 or more, or",
        ),
        ({"nonsense": 3}, r"nonsense = 3: no such field; `rlora train --help` lists all fields"),
        ({"engine": {"replica": 2}}, r"engine\.replica = 2: no such field; did you mean engine\.replicas"),
        ({"num_generations": 8}, r"num_generations = 8: no such field; use group_size"),
        (
            {"learner": {"learning_rate": 1e-4}},
            r"learner\.learning_rate = 0\.0001: no such field; use learner\.lr",
        ),
        ({"lr": 1e-4}, r"lr = 0\.0001: no such field; did you mean learner\.lr or critic\.lr\?"),
        ({"model": 7}, r"model = 7: .*valid string"),
        ({"learner": {"shard": True}}, r"learner\.shard = True: a single learner.*learner\.replicas to 2"),
        (
            {"learner": {"shard": True, "replicas": 2, "quantise": "nf4"}},
            r"learner\.shard = True: a base quantised to nf4 is not",
        ),
        (
            {"learner": {"shard": True, "replicas": 2, "adapter": "none"}},
            r"learner\.shard = True: there is no adapter .*unset learner\.shard",
        ),
        ({"learner": {"quantise": "nf4", "adapter": "none"}}, r"learner\.quantise = 'nf4': there is no adapter"),
        ({"learner": {"quantise": "int4"}}, r"learner\.quantise = 'int4': .*'none', 'int8' or 'nf4'"),
    ],
)
def test_bad_value_is_named_with_its_field(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RloraError, match=message):
        validate(MINIMAL | changes)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(RloraError) as error:
        validate({"model": "m", "steps": 0, "group_size": 0})
    assert [line.split(" ")[0].rstrip(":") for line in str(error.value).splitlines()] == [
        "env", "reward", "steps", "group_size",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "logit_bias"]
)
def test_sampling_that_the_learner_could_not_know_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(MINIMAL | {"sampling": {name: 0.9}}))
    with pytest.raises(RloraError, match=rf"sampling\.{name} = 0\.9: .*remove sampling\.{name}"):
        read(path)
    for changes in ({"sampling": {name: {"5": -100}}}, {name: 3}):
        with pytest.raises(RloraError, match=rf"{name} = (3|{{'5': -100}}): .*remove sampling\.{name}"):
            validate(MINIMAL | changes)
    with pytest.raises(RloraError, match=name):
        check_learnable([name])


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}])
def test_sampling_of_a_single_token_is_refused(setting: dict[str, float]) -> None:
    (name, value), *_ = setting.items()
    with pytest.raises(RloraError, match=rf"sampling\.{name} = {value}: only the most probable .* no gradient; set "):
        validate(MINIMAL | {"sampling": setting})


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RloraError, match=r"none\.toml: can't be read"):
        read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("model = ")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    for name in ("bad", "bytes"):
        with pytest.raises(RloraError, match=rf"{name}\.toml: not valid TOML"):
            read(tmp_path / f"{name}.toml")


def test_a_file_as_windows_editors_write_it(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    text = tomli_w.dumps(MINIMAL | {"chat": {"system": "caf\u00e9"}})
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read(path) == validate(MINIMAL | {"chat": {"system": "caf\u00e9"}})
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(RloraError, match=r"config\.toml: not valid TOML: it looks like UTF-16; save it as UTF-8"):
            read(path)


@pytest.mark.parametrize("table", [{"sampling": 3}, {"chat": "x"}, {"env_args": 3}, {"env_args": ["a"]}])
def test_a_value_where_a_table_belongs_is_named(table: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(tomli_w.dumps(MINIMAL | table))
    with pytest.raises(RloraError, match=rf"a\.toml: {next(iter(table))} = "):
        read(tmp_path / "a.toml")


def test_load_takes_a_module_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def judge(completion, answer):\n    return 1.0\n")
    assert load("reward", f"{file}:judge")("a", "b") == 1.0
    assert load("env", "rlora.config:Config") is Config


def test_load_finds_the_working_directory_and_the_neighbours_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    beside = tmp_path / "beside"
    beside.mkdir()
    (tmp_path / "of_the_working_directory.py").write_text("NAME = 'here'\n")
    (beside / "a_neighbour.py").write_text("NAME = 'beside'\n")
    (beside / "plug_in.py").write_text("from a_neighbour import NAME\n")
    monkeypatch.chdir(tmp_path)
    assert load("env", "of_the_working_directory:NAME") == "here"
    assert load("env", "beside/plug_in.py:NAME") == "beside"


def test_local_directories_become_absolute_and_other_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = validate(MINIMAL | {"model": "org/name", "learner": {"start_from": "org/../org"}})
    assert config.model == str(tmp_path / "org" / "name")
    assert config.learner.start_from == str(tmp_path / "org" / ".." / "org")
    for name in ("org/other", "demo:smollm2-135m", ""):
        config = validate(MINIMAL | {"model": name, "learner": {"start_from": name}})
        assert (config.model, config.learner.start_from) == (name, name)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("judge", "write module:name"),
        ("no_such_module:judge", "importing no_such_module failed"),
        ("{tmp}/none.py:judge", "there is no file"),
        ("{tmp}/broken.py:judge", "importing .*broken.py failed: ZeroDivisionError"),
        ("{tmp}/hungry.py:judge", "importing .*hungry.py failed: FileNotFoundError: .*'answers.json'"),
        ("rlora.config:Confug", "has no 'Confug'"),
    ],
)
def test_what_can_not_be_loaded_is_named(spec: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "hungry.py").write_text("open('answers.json')\n")
    with pytest.raises(RloraError, match=f"reward = .*{message}") as raised:
        load("reward", spec.format(tmp=tmp_path))
    name = spec.removeprefix("{tmp}/").partition(":")[0]
    is_executed = name in ("broken.py", "hungry.py")
    assert str(raised.value).startswith(f"{tmp_path}/{name}:1: " if is_executed else "reward = ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_staleness": 1}, r"max_staleness = 1: .*set max_staleness to 0"),
        ({"learner": {"rank": 8}}, r"learner\.rank = 8: there is no adapter"),
        ({"learner": {"start_from": "there"}}, r"learner\.start_from = 'there': there is no adapter"),
    ],
)
def test_what_needs_an_adapter_is_refused_where_all_weights_are_trained(values: dict[str, Any], message: str) -> None:
    learner = {"adapter": "none", **values.get("learner", {})}
    with pytest.raises(RloraError, match=message):
        validate(MINIMAL | values | {"learner": learner})
    assert validate(MINIMAL | {"learner": {"adapter": "none"}}).learner.adapter == "none"


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ({"kl_in": "reward", "kl_estimator": "k1"}, {"kl_estimator": "k1"}),
        ({"kl_in": "reward"}, {"kl_estimator": "k1"}),
        ({"kl_in": "loss", "kl_estimator": "k2"}, {"kl_estimator": "k2"}),
        ({"drop_truncated": True, "bootstrap_truncated": False}, {"truncated": "drop"}),
        ({"drop_truncated": False, "bootstrap_truncated": False}, {"truncated": "learn"}),
        ({"name": "ppo", "bootstrap_truncated": True}, {"truncated": "bootstrap"}),
    ],
)
def test_fields_of_earlier_releases_are_read(
    earlier: dict[str, object], today: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silently in a run's own config and in its bundles; with a warning in a file."""
    algorithm = validate(MINIMAL | {"algorithm": earlier}).algorithm
    assert {name: getattr(algorithm, name) for name in today} == today
    assert capsys.readouterr().err == ""
    file = tmp_path / "a.toml"
    file.write_text(tomli_w.dumps(MINIMAL | {"algorithm": earlier}))
    assert read(file).algorithm == algorithm
    assert f"{file}: algorithm." in capsys.readouterr().err
    file.write_text(tomli_w.dumps(MINIMAL | {"algorithm": earlier, "provenance": {}}))
    assert read(file).algorithm == algorithm
    assert capsys.readouterr().err == ""
