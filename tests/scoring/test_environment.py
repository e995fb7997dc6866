"""Environment variables for reward functions: passed by name to every node, and never stored by value."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, case, ray_head

from rlora.config import read, validate
from rlora.records import RloraError
from rlora.rollout.task import setup_of
from rlora.scoring import worker
from rlora.scoring.signatures import reward_function
from rlora.scoring.worker import Setup
from rlora.settings import Config

MakeConfig = Callable[..., Config]
NAME, VALUE = "RLORA_TEST_KEY", "secret-7f3a"
SHADY = f"{ROOT / 'tests' / 'shady_rewards.py'}:with_a_key"


def test_names_alone_are_kept(config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(NAME, VALUE)
    settings = config(scoring={"environment": [NAME]})
    assert setup_of(settings, agent=False).environment == {NAME: VALUE}
    assert VALUE not in repr(settings)
    file = tmp_path / "config.toml"
    file.write_text(f'model = "m"\nenv = "e:E"\nreward = "r:f"\n[scoring]\nenvironment = ["{NAME}"]\n')
    assert read(file).scoring.environment == (NAME,)


def test_a_variable_that_is_not_set_is_named(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAME, raising=False)
    with pytest.raises(RloraError, match=rf"scoring\.environment: {NAME} is not set in the environment .*; export it"):
        setup_of(config(scoring={"environment": ["PATH", NAME]}), agent=False)
    monkeypatch.setenv(NAME, "")
    assert setup_of(config(scoring={"environment": [NAME]}), agent=False).environment == {NAME: ""}


@pytest.mark.parametrize("setting", [f"{NAME}={VALUE}", VALUE, f"${NAME}", "", " ", "A B"])
def test_a_value_in_place_of_a_name_is_refused_and_not_shown(setting: str, config: MakeConfig) -> None:
    with pytest.raises(RloraError, match=r"scoring\.environment: item 1 is not the name of .*give names only") as error:
        validate(config(scoring={"environment": ["PATH", setting]}))
    assert VALUE not in str(error.value)


@pytest.mark.parametrize("setting", [f"{NAME}={VALUE}", {NAME: VALUE}, [{NAME: VALUE}], [[NAME, VALUE]]])
def test_other_forms_are_refused_and_not_shown(setting: object, config: MakeConfig) -> None:
    with pytest.raises(RloraError, match=r"^scoring\.environment: give a list of names .*, without") as error:
        config(scoring={"environment": setting})
    assert VALUE not in str(error.value)


def raising(message: Callable[[str], object]) -> Callable[[str], float]:
    def raises(completion: str) -> float:
        raise ValueError(message(completion))

    return raises


@pytest.mark.parametrize(
    "value",
    [VALUE, "line one\nline two", "a \"b\" 'c' d", "back\\slash", "k\u00e9y-\udc80-secret", "ends so\n", "s" * 3000],
)
@pytest.mark.parametrize(
    "message",
    [
        lambda value: value,
        lambda value: "x" * 185 + value,
        lambda value: "x" * 195 + value,
        lambda value: f"{value!r}",
        lambda value: repr([value, "it's"]),
        lambda value: repr(f"'\"{value}"),
        lambda value: repr(repr(value)),
        ascii,
        lambda value: json.dumps({"key": value}),
        lambda value: repr(value.encode("utf-8", "surrogateescape")),
        lambda value: "x" * 1500 + value * 20,
        lambda value: "x" * 1590 + value,
        lambda value: value + "x" * 390,
        lambda value: "x" * 100_000 + value,
    ],
)
def test_secrets_are_masked_before_a_message_is_shortened(value: str, message: Callable[[str], object]) -> None:
    setup = Setup(environment={NAME: value, "OTHER": "x"})
    (score,) = reward_function("mine.py:f", raising(message))(case(value), [0])
    detail = worker._masked(score.detail, setup)
    assert len(detail) < 2100
    assert "; fix it there" in detail
    assert not [part for part in (value[:6], value[-6:].strip(), repr(value)[1:7], value[6:12]) if part in detail], (
        detail
    )


def test_a_returned_text_is_no_place_for_a_secret() -> None:
    value = "secret" * 20
    (score,) = reward_function("mine.py:f", lambda completion: completion)(case(value), [0])
    assert f"returned '<{NAME}>'; return" in worker._masked(score.detail, Setup(environment={NAME: value}))


def test_the_longer_secret_is_masked_first() -> None:
    setup = Setup(environment={"SHORT": "abcdef", "LONG": "abcdefghi"})
    assert worker._masked("abcdefghi abcdef abcde", setup) == "<LONG> <SHORT> abcde"


SCORES = """
import os, sys, json
from types import SimpleNamespace
sys.path[:0] = [{tests!r}]
from conftest import case
from rlora import cluster
from rlora.config import validate
from rlora.rollout.task import ServedPolicy, setup_of

config = validate({{"model": "m", "env": "e:E", "reward": {reward!r}, "scoring": {{"environment": {names!r}}}}})
with cluster._processes(config, "") as actors:
    task = SimpleNamespace(scoring=setup_of(config, agent=False))
    (pool,) = actors.pools([ServedPolicy("run", config, task)])["run"]
    actors.wait()
    scores = pool.submit(case("secret-7f3a", "guessed", answer=1)).result(timeout=120)[0]
    print(json.dumps({{"values": [score.value for score in scores], "details": [score.detail for score in scores]}}))
"""


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[str, Path]]:
    """Address and directory of a Ray cluster that was started without the variable."""
    files = Path(tempfile.mkdtemp(prefix="ray-"))  # short, for Ray's sockets
    environment = {name: value for name, value in os.environ.items() if name != NAME} | TOKEN
    with ray_head(files, environment) as address:
        yield address, files


@pytest.mark.vllm
@pytest.mark.parametrize("names", [[NAME], []])
def test_a_cluster_that_was_there_before_gets_them_by_name(names: list[str], started: tuple[str, Path]) -> None:
    address, files = started
    code = SCORES.format(tests=str(ROOT / "tests"), reward=SHADY, names=names)
    environment = os.environ | TOKEN | {NAME: VALUE, "RAY_ADDRESS": address}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    output = json.loads(done.stdout.splitlines()[-1])
    if names:
        assert output["values"] == [1.0, None]
        assert output["details"][1].endswith(f"PermissionError: no access with <{NAME}>; fix it there")
    else:
        assert all(f"KeyError: '{NAME}'" in detail for detail in output["details"])
    logs = [file for file in files.rglob("*") if file.is_file()]
    assert len(logs) > 5
    assert not [file for file in logs if VALUE.encode() in file.read_bytes()]
