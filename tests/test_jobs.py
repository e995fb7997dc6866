"""Bad addresses, and jobs that a cluster does not take, by Ray's own client; a real cluster: test_end_to_end.py."""

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
    """As far as a client asks before it submits: what runs there, and whether it has the package."""

    ray: ClassVar[str] = "2.60.0"
    received: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        version = {"version": "4", "ray_version": self.ray, "ray_commit": "x", "session_name": "s"}
        self._answer(*((200, version) if self.path == "/api/version" else (404, {})))

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append(self.path)
        what = f"Maximum request body size 10000 exceeded, actual body size {len(data)}"  # as Ray's dashboard answers
        too_large = f'Traceback (most recent call last):\n  File "job_head.py"\naiohttp.TooLarge: {what}\n'
        self._answer(500, too_large)

    def _answer(self, status: int, body: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode() if isinstance(body, str) else json.dumps(body).encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """The address of such a server, which says that it runs a version of Ray."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever).start()

    def runs(ray: str) -> str:
        monkeypatch.setattr(Dashboard, "ray", ray)
        return f"http://127.0.0.1:{server.server_port}"

    yield runs
    server.shutdown()
    server.server_close()


def test_a_cluster_whose_ray_is_too_old_is_refused(cluster: Callable[[str], str]) -> None:
    address = cluster("2.9.3")
    with pytest.raises(RloraError, match=rf"--address {address}: the cluster runs Ray 2\.9\.3, and rlora needs 2\.50"):
        jobs.jobs(address)
    with pytest.raises(RloraError, match=r"runs Ray 1\.8\.0|1\.8\.0 is running"):  # Ray's own client refuses that
        jobs.jobs(cluster("1.8.0"))


def test_the_address_that_is_given_counts(cluster: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client would take those of the environment before it."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    address = cluster("2.9.3")
    with pytest.raises(RloraError, match=rf"--address {address}: the cluster runs Ray 2\.9\.3"):
        jobs.jobs(address)
    with pytest.raises(RloraError, match=r"RAY_ADDRESS = http://127\.0\.0\.1:1: .*give http://HOST:8265"):
        jobs.jobs(None)


def test_the_oldest_ray_is_the_one_that_is_installed_with_rlora() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"ray[default]>={jobs.OLDEST_RAY}" in needed


def test_a_directory_that_is_too_large_is_told_with_what_to_do(
    cluster: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(20_000))
    command = ["rlora", "submit", "launch/arithmetic.toml", "--address", cluster("2.60.0")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback" not in told
    assert re.search(
        r"--working-dir .*: Ray takes 100 MiB at most \(.*Maximum request body size 10000 exceeded.*\); name what need",
        told,
    ), told


def test_a_port_that_is_no_dashboard_is_told() -> None:
    for address in ("http://127.0.0.1:1", "nonsense://x"):
        with pytest.raises(RloraError, match=rf"--address {address}: .*give http://HOST:8265"):
            jobs.jobs(address)


@pytest.mark.parametrize(("answer", "stops"), [("y", True), ("Yes", True), ("", False), ("n", False)])
def test_ctrl_c_asks(
    answer: str, stops: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    class Job:
        id = "mine"

        def follow(self, tell: Callable[[str], object]) -> str:
            raise KeyboardInterrupt

        def stop(self) -> bool:
            asked.append("stop")
            return True

    monkeypatch.setattr(jobs, "job", lambda name, address: Job())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    monkeypatch.setattr("sys.argv", ["rlora", "submit", "--follow", "mine"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert bool(asked) == stops
    assert ("saves what it has" if stops else "Follow it: rlora submit --follow mine") in capsys.readouterr().out


def test_what_is_wrong_with_the_config_is_told_here(
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
