"""Bad addresses and rejected jobs, with Ray's own client. For a real cluster see end_to_end/test_submit.py."""

import json
import re
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import ROOT

from rlora.cli.main import main
from rlora.cluster import jobs
from rlora.records import RloraError


class Dashboard(BaseHTTPRequestHandler):
    """The part of Ray's dashboard that a client calls before it submits: its version, and uploaded packages."""

    ray: ClassVar[str] = "2.60.0"
    received: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        version = {"version": "4", "ray_version": self.ray, "ray_commit": "x", "session_name": "s"}
        self._answer(*((200, version) if self.path == "/api/version" else (404, {})))

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append(self.path)
        message = f"Maximum request body size 10000 exceeded, actual body size {len(data)}"  # as in Ray's dashboard
        too_large = f'Traceback (most recent call last):\n  File "job_head.py"\naiohttp.TooLarge: {message}\n'
        self._answer(500, too_large)

    def _answer(self, status: int, body: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode() if isinstance(body, str) else json.dumps(body).encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """A function that returns the address of a dashboard with that version of Ray."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever).start()

    def address(ray: str) -> str:
        monkeypatch.setattr(Dashboard, "ray", ray)
        return f"http://127.0.0.1:{server.server_port}"

    yield address
    server.shutdown()
    server.server_close()


def test_a_cluster_whose_ray_is_too_old_is_rejected(cluster: Callable[[str], str]) -> None:
    address = cluster("2.9.3")
    with pytest.raises(RloraError, match=rf"--address {address}: the cluster runs Ray 2\.9\.3, and rlora needs 2\.50"):
        jobs.jobs(address)
    with pytest.raises(RloraError, match=r"runs Ray 1\.8\.0|1\.8\.0 is running"):  # Ray's own client may reject it
        jobs.jobs(cluster("1.8.0"))


def test_the_address_option_takes_precedence(cluster: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In Ray's client the environment variables would."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    address = cluster("2.9.3")
    with pytest.raises(RloraError, match=rf"--address {address}: the cluster runs Ray 2\.9\.3"):
        jobs.jobs(address)
    with pytest.raises(RloraError, match=r"RAY_ADDRESS = http://127\.0\.0\.1:1: .*give http://HOST:8265"):
        jobs.jobs(None)


def test_the_oldest_ray_is_the_one_that_is_installed_with_rlora() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"ray[default]>={jobs.OLDEST_RAY}" in needed


def test_a_directory_that_is_too_large_is_reported_with_the_fix(
    cluster: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(20_000))
    command = ["rlora", "submit", "launch/arithmetic.toml", "--address", cluster("2.60.0")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback" not in error
    assert re.search(
        r"--working-dir .*: Ray accepts at most 100 MiB \(.*Maximum request body size 10000 exceeded.*\); exclude",
        error,
    ), error


def test_a_port_without_a_dashboard_is_reported() -> None:
    for address in ("http://127.0.0.1:1", "nonsense://x"):
        with pytest.raises(RloraError, match=rf"--address {address}: .*give http://HOST:8265"):
            jobs.jobs(address)


@pytest.mark.parametrize(("answer", "stops"), [("y", True), ("Yes", True), ("", False), ("n", False)])
def test_ctrl_c_asks(
    answer: str, stops: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    class Job:
        id = "mine"

        def follow(self, write: Callable[[str], object]) -> str:
            raise KeyboardInterrupt

        def stop(self) -> bool:
            calls.append("stop")
            return True

    monkeypatch.setattr(jobs, "job", lambda name, address: Job())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    monkeypatch.setattr("sys.argv", ["rlora", "submit", "--follow", "mine"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert bool(calls) == stops
    assert ("saves its state" if stops else "Follow the job: rlora submit --follow mine") in capsys.readouterr().out


def test_errors_in_the_config_are_reported_before_submitting(
    cluster: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = cluster("2.60.0")
    Dashboard.received.clear()
    monkeypatch.setattr(
        "sys.argv", ["rlora", "submit", "launch/arithmetic.toml", "--learner.rank", "9", "--address", address]
    )
    with pytest.raises(SystemExit):
        main()
    assert "learner.rank = 9" in capsys.readouterr().err
    assert not Dashboard.received
