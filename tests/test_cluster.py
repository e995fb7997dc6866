"""Errors of joining a Ray cluster, in one sentence and within seconds, and futures of calls."""

import asyncio
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray
from conftest import ray_head

from rlora import cluster
from rlora.cluster.actors import Remote
from rlora.records import RloraError

JOIN = """
import ray
from rlora import cluster
from rlora.records import RloraError
try:
    cluster.join_ray()
    print("joined", ray.cluster_resources()["CPU"])
except RloraError as error:
    print(error)
"""
OTHER_VERSION = """
import json
import ray
from rlora import cluster
cluster.join_ray()
client = ray._private.worker._global_node.get_gcs_client()
metadata = json.loads(client.internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster"))
changed = json.dumps(metadata | {"ray_version": "2.9.3", "python_version": "3.8.2"}).encode()
client.internal_kv_put(b"CLUSTER_METADATA", changed, True, namespace=b"cluster")
"""


@pytest.mark.parametrize(
    "address",
    ["nonsense", "127.0.0.1", "127.0.0.1:abc", ":6379", "127.0.0.1:99999", " ", "http://127.0.0.1:8265", "foo://x:1"],
)
def test_an_invalid_address_is_rejected(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RloraError, match="is not an address; set RAY_ADDRESS to HOST:PORT of the head node") as caught:
        cluster.join_ray()
    assert f"RAY_ADDRESS = {address!r}" in str(caught.value)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@pytest.mark.parametrize("remembered", [False, True])
def test_a_cluster_that_has_ended_is_reported_at_once(
    remembered: bool, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself would wait for ten minutes."""
    monkeypatch.setenv("RAY_ADDRESS", "" if remembered else f"127.0.0.1:{free_port}")
    monkeypatch.setattr(ray._private.utils, "read_ray_address", lambda: f"127.0.0.1:{free_port}")
    began = time.monotonic()
    with pytest.raises(
        RloraError, match=f":{free_port}.*: the connection failed .*run `ray stop` to .*, or set RAY_ADDRESS="
    ):
        cluster.join_ray()
    assert time.monotonic() - began < 5


def test_an_unknown_host_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "no-such-host.invalid:6379")
    with pytest.raises(RloraError, match="RAY_ADDRESS = 'no-such-host"):
        cluster.join_ray()


def test_errors_of_ray_are_shortened_to_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: Mapping[str, tuple[BaseException, str]] = {
        "auto": (ConnectionError("Could not find any. Please\nmore"), "Could not find any; if that cluster has ended"),
        "local": (RuntimeError("Failed to start GCS. Last 3 lines:\n..."), "no cluster could be started: Failed to st"),
        "ray://127.0.0.1:1": (ConnectionError("ray client connection timeout"), "ray client connection timeout; if"),
    }
    for address, (error, message) in errors.items():

        def fail(error: BaseException = error, **_: object) -> None:
            raise error

        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(ray, "init", fail)
        with pytest.raises(RloraError, match=re.escape(message)) as caught:
            cluster.join_ray()
        assert "\n" not in str(caught.value)
        assert "RAY_gcs_server_port_wait_time_s" not in os.environ


@pytest.fixture(scope="module")
def join() -> Iterator[Callable[..., str]]:
    """A function that joins a cluster with a token, in a process with environment variables. Returns its output."""
    token = secrets.token_hex(32)
    valid = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    home = Path(tempfile.mkdtemp(prefix="ray-"))  # short, for Ray's sockets
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": str(home)}
    with ray_head(home, plain | valid) as address:

        def run(script: str = JOIN, **environment: str) -> str:
            settings = {name: valid[name] if value == "right" else value for name, value in environment.items()}
            command = [sys.executable, "-c", script]
            environment = plain | {"RAY_ADDRESS": address} | settings
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
            assert done.returncode == 0, done.stderr
            assert "Traceback" not in done.stderr
            return done.stdout.strip()

        yield run


TOKEN = {"RAY_AUTH_MODE": "right", "RAY_AUTH_TOKEN": "right"}


@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}],
)
def test_a_missing_or_wrong_token_is_reported(environment: dict[str, str], join: Callable[..., str]) -> None:
    message = join(**environment)
    assert "requires a token, and this process has no token or a different one; set RAY_AUTH_MODE=token" in message
    assert "\n" not in message


def test_a_cluster_with_a_different_version_is_reported_with_both_versions(join: Callable[..., str]) -> None:
    assert join(**TOKEN) == "joined 1.0"
    join(OTHER_VERSION, **TOKEN)
    message = join(**TOKEN)
    python = ".".join(map(str, sys.version_info[:3]))
    expected = f"runs Ray 2.9.3 on Python 3.8.2, and this process runs Ray {ray.__version__} on Python {python}"
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_ends_quietly_after_the_coroutine_that_awaits_it(fails: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A run whose reward failed cancels its coroutines, and the other rewards arrive later."""
    call: Future[str] = Future()
    future = Remote.future(Mock(spec=Remote), Mock(future=lambda: call))

    async def wait_in_vain() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(future), 0.01)

    asyncio.run(wait_in_vain())
    if fails:
        call.set_exception(RloraError("late"))
        assert isinstance(future.exception(1.0), RloraError)
    else:
        call.set_result("late")
        assert future.result(1.0) == "late"
    assert not caplog.records
