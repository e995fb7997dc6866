"""A checkout as a Ray job, and an installed wheel."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import SMALL, TOML, metrics
from conftest import ROOT, ray_node

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("nothing_stays_behind")]
ADDRESS = ("--address", "http://127.0.0.1:8299")


def test_a_bare_checkout_runs_as_a_ray_job_with_two_replicas(tmp_path: Path, shallow: str) -> None:
    """`ray job submit --working-dir .` to a cluster; what runs is the checkout, not the installed rlora."""
    checkout, run, ray = tmp_path / "checkout", tmp_path / "run", str(Path(sys.executable).parent / "ray")
    ignore = shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, checkout, ignore=ignore, symlinks=True)  # rlora/envs is envs/
    small = (*SMALL, "--model", shallow)
    source = (checkout / "envs" / "arithmetic.py").read_text()
    (checkout / "envs" / "only_here.py").write_text(source)  # so that no other rlora can run the job
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job's `python` is that of the cluster
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**os.environ, **token, "PATH": path}
    home = tempfile.mkdtemp(prefix="ray-")  # of its own: no later ray.init finds this cluster; short for its sockets
    head = "--head", "--port=0", "--dashboard-port=8299", f"--temp-dir={home}"
    head += ("--dashboard-agent-listen-port=8298",)  # by default a port that any other Ray of this machine takes too
    job = [
        *("env", f"PYTHONPATH={sysconfig.get_path('purelib')}", sys.executable, "-S"),  # without the editable install
        *("-m", "rlora", "train", TOML, "--steps", "2", "--env", "rlora.envs.only_here:Arithmetic"),
        *("--engine.replicas", "2", "--engine.kv-cache-gib", "1", "--run-dir", str(run), *small),
    ]
    submit = [ray, "job", "submit", *ADDRESS, "--working-dir", ".", "--", *job]
    try:
        with ray_node(tmp_path / "head.log", environment, *head):
            done = subprocess.run(
                submit, cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=600
            )
            ours = submitted(small, checkout, environment, tmp_path)
            left, stopped, ended = let_go(small, checkout, environment, tmp_path)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout  # its metrics are streamed
    assert len(metrics(run)) == 2
    good, bad, listed, nobody = ours
    assert good.returncode == 0, good.stdout + good.stderr
    assert "step 1/1" in good.stdout
    assert bad.returncode == 1
    told = bad.stdout + bad.stderr
    assert "bad.py:2: bad raised ValueError: no judge today" in told[-2000:]
    assert "16 of 16 episodes are in error" in told
    assert "Traceback" not in told
    assert len((tmp_path / "bad" / "unscored.jsonl").read_text().splitlines()) == 16
    assert (tmp_path / "bad" / "bundles" / "0" / "adapter_model.safetensors").exists()
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


def submitted(
    small: Sequence[str], checkout: Path, environment: dict[str, str], place: Path
) -> list[subprocess.CompletedProcess[str]]:
    """`rlora submit` of a run that ends and of one whose reward fails, `rlora jobs`, and an address where nobody is."""
    (checkout / "bad.py").write_text("def bad(completion, answer):\n    raise ValueError('no judge today')\n")
    short = TOML, "--steps", "1", *small
    commands: list[tuple[str, ...]] = [
        ("submit", *short, *ADDRESS, "--name", "good", "--run-dir", str(place / "good")),
        ("submit", *short, *ADDRESS, "--name", "bad", "--reward", "bad.py:bad", "--run-dir", str(place / "bad")),
        ("jobs", *ADDRESS),
        ("submit", *short, "--address", "http://127.0.0.1:1"),
    ]
    return [called(command, checkout, environment) for command in commands]


def called(command: Sequence[str], checkout: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`rlora COMMAND` in a checkout, to its end."""
    line = [sys.executable, "-m", "rlora", *command]
    return subprocess.run(line, cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=600)


def let_go(
    small: Sequence[str], checkout: Path, environment: dict[str, str], place: Path
) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """A long job that is left by Ctrl-C and "n", stopped from elsewhere, and followed again to its end."""
    long = "submit", TOML, "--steps", "1000", *small, *ADDRESS, "--name", "long", "--run-dir", str(place / "long")
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
        assert text, (seen, process.communicate(), called(("jobs", *ADDRESS), checkout, environment).stdout)
        seen += text
    process.send_signal(signal.SIGINT)
    os.write(terminal, b"n\n")
    out, err = process.communicate(timeout=300)
    os.close(terminal)
    os.close(stdin)
    left = subprocess.CompletedProcess(line, process.returncode, seen + out, err)
    stopped = called(("jobs", "--stop", "long", *ADDRESS), checkout, environment)
    return left, stopped, called(("submit", "--follow", "long", *ADDRESS), checkout, environment)


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
