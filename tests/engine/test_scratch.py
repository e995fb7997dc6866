"""Where engines keep their adapters' files, and removal of what dead processes have left."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, adapter

from rlora import machine
from rlora.engine.scratch import Scratch, remove_leftovers
from rlora.records import Adapter, RloraError

HOLD = """
import os, time
from rlora.engine.scratch import Scratch
scratch = Scratch({pid})
print(scratch._directory({root}), flush=True)
time.sleep(60)
"""


def can_unshare() -> bool:
    if os.getuid() or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-m", "-p", "-f", "true"], check=False).returncode == 0


NEEDS_NAMESPACES = pytest.mark.skipif(not can_unshare(), reason="needs root and namespaces")


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Replacements for /dev/shm and /tmp."""
    ram, disk = tmp_path / "ram", tmp_path / "disk"
    for root in (ram, disk):
        root.mkdir()
    monkeypatch.setattr(machine, "ram_directory", lambda: ram)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    return ram, disk


def dead_pid() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def holder(roots: tuple[Path, Path]) -> Iterator[Callable[..., tuple[subprocess.Popen[str], Path]]]:
    """Starts processes that hold a directory, as engines do."""
    started: list[subprocess.Popen[str]] = []

    def start(pid: str = "os.getpid()", *prefix: str) -> tuple[subprocess.Popen[str], Path]:
        root = f"__import__('pathlib').Path({str(roots[0])!r})"
        command = [*prefix, sys.executable, "-c", HOLD.format(pid=pid, root=root)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_an_adapter_is_written_in_ram_and_removed_when_its_engine_is_closed(roots: tuple[Path, Path]) -> None:
    scratch = Scratch(os.getpid())
    path = scratch.write(adapter(3), versions=2)
    assert path == machine.adapter_directory(os.getpid()) / adapter(3).name
    assert {file.name: file.read_bytes() for file in path.iterdir()} == adapter(3).files
    remove_leftovers()  # it is in use
    assert path.exists()
    scratch.close()
    assert not any(path for root in roots for path in root.iterdir())


def test_without_room_in_ram_disk_is_used(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ram, disk = roots
    size = sum(map(len, adapter(1).files.values()))
    free = {ram: 2 * size, disk: 2 * size}
    monkeypatch.setattr(shutil, "disk_usage", lambda root: shutil._ntuple_diskusage(0, 0, free[Path(root)]))  # type: ignore[attr-defined]
    scratch = Scratch(os.getpid())
    assert ram in scratch.write(adapter(1), versions=2).parents
    free[ram] = size - 1
    assert disk in scratch.write(adapter(2)).parents
    free[ram], free[disk] = 2 * size, 3 * size
    assert disk in scratch.write(adapter(4), versions=3).parents
    free[disk] = 0
    with pytest.raises(RloraError) as caught:
        scratch.write(adapter(5), versions=3)
    for part in ("3 versions of the adapter need", f"{ram} has 0.0 MB free", f"{disk} has 0.0 MB free", "--shm-size"):
        assert part in str(caught.value)
    scratch.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_when_ram_fills_up_meanwhile_disk_is_used(number: int, roots: tuple[Path, Path]) -> None:
    def write(_: Adapter, directory: Path) -> Path:
        if roots[0] in directory.parents:
            raise OSError(number, os.strerror(number))
        return directory

    scratch = Scratch(os.getpid())
    assert roots[1] in scratch.write(adapter(1), write=write).parents
    scratch.close()


def test_only_files_of_killed_processes_are_removed(
    roots: tuple[Path, Path], holder: Callable[..., tuple[subprocess.Popen[str], Path]]
) -> None:
    ram, disk = roots
    dead, user = dead_pid(), os.getuid()
    killed, killed_directory = holder()
    _, live_directory = holder()
    (killed_directory / "run-v3").mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    unlocked = [ram / f"rlora-{dead}", disk / f"rlora-{dead}", ram / f"rlora-{dead}.1"]
    unrelated = [ram / f"rlora-{os.getpid()}", ram / "rlora-run-ab12", ram / "rlora-", ram / f"other-{dead}"]
    for path in [*unlocked, *unrelated]:
        path.mkdir()
    openmp = [ram / f"__KMP_REGISTERED_LIB_{pid}_{user}" for pid in (dead, killed.pid)]
    kept = [ram / f"__KMP_REGISTERED_LIB_{os.getpid()}_{user}", ram / f"__KMP_REGISTERED_LIB_{dead}_{user + 1}"]
    kept += [ram / "__KMP_REGISTERED_LIB_x", ram / f"rlora-{dead}0000000", ram / "sem.x"]
    for path in [*openmp, *kept]:
        path.write_text("")
    (disk / f"rlora-{dead}.2").symlink_to(unrelated[0])
    remove_leftovers()
    assert not [path for path in [killed_directory, *unlocked, *openmp] if path.exists()]
    kept += [live_directory, *unrelated]
    assert [path for path in kept if path.exists()] == kept


def test_a_later_process_with_the_same_pid_keeps_nothing_alive(roots: tuple[Path, Path]) -> None:
    directory = roots[0] / f"rlora-{os.getpid()}"
    directory.mkdir()
    os.utime(directory, (0, 0))  # long before this process began
    remove_leftovers()
    assert not directory.exists()


def test_a_zombie_process_counts_as_dead(roots: tuple[Path, Path]) -> None:
    """A container without an init process keeps zombies."""
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    directory = roots[0] / f"rlora-{process.pid}"
    directory.mkdir()
    remove_leftovers()
    assert not directory.exists()
    process.wait()


@NEEDS_NAMESPACES
def test_a_process_of_another_container_keeps_its_own_directory(
    roots: tuple[Path, Path], holder: Callable[..., tuple[subprocess.Popen[str], Path]]
) -> None:
    """In two containers that share a RAM file system, processes have the same pid."""
    pid = dead_pid()
    _, directory = holder(str(pid), "unshare", "-p", "-f", "--kill-child")
    assert directory.name == f"rlora-{pid}"
    (directory / "run-v1").mkdir()
    remove_leftovers()
    scratch = Scratch(pid)
    path = scratch.write(adapter(1))
    assert path.parent == directory.with_name(f"{directory.name}.1")
    assert (directory / "run-v1").exists()
    scratch.close()
    assert directory.exists()


def test_the_directory_of_a_dead_process_with_the_same_pid_is_reused(roots: tuple[Path, Path]) -> None:
    directory = roots[0] / f"rlora-{os.getpid()}"
    (directory / "run-v1").mkdir(parents=True)
    scratch = Scratch(os.getpid())
    scratch.write(adapter(2))
    assert [path.name for path in directory.iterdir()] == [adapter(2).name]
    scratch.close()


def test_files_that_cannot_be_removed_stay(roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = roots[0] / f"rlora-{dead_pid()}"
    directory.mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    remove_leftovers()
    assert directory.exists()


SMALL = """
import os, sys, shutil
from pathlib import Path
from rlora.records import Adapter, RloraError
from rlora.engine.scratch import Scratch
weights = (2).to_bytes(8, "little") + b"{}" + bytes(300_000)
scratch = Scratch(os.getpid())
for version in range(5):
    try:
        print(scratch.write(Adapter("run", version, b"{}", weights), versions=2 if not version else 1).parents[1])
    except RloraError as error:
        print(error)
scratch.close()
print(os.listdir("/dev/shm"), [name for name in os.listdir(sys.argv[1]) if name.startswith("rlora-")])
"""


def in_namespace(mounts: str, tmp: Path) -> list[str]:
    """Output of SMALL after the shell commands `mounts`."""
    command = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && {mounts} exec {sys.executable} -c '{SMALL}' {tmp}"
    environment = os.environ | {"TMPDIR": str(tmp)}
    unshared = ["unshare", "-m", "sh", "-c", command]
    done = subprocess.run(unshared, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@NEEDS_NAMESPACES
def test_a_small_ram_file_system_is_filled_before_disk_is_used(tmp_path: Path) -> None:
    """1 MB: three adapters of 0.3 MB."""
    assert in_namespace("", tmp_path) == ["/dev/shm"] * 3 + [str(tmp_path)] * 2 + ["[] []"]


@NEEDS_NAMESPACES
def test_a_full_ram_file_system_is_reported_with_the_fix(tmp_path: Path) -> None:
    fill = "head -c 2000000 /dev/zero > /dev/shm/fill 2>/dev/null;"
    assert in_namespace(fill, tmp_path) == [str(tmp_path)] * 5 + ["['fill'] []"]
    *messages, _ = in_namespace(f"{fill} mount -t tmpfs -o size=100k tmpfs {tmp_path};", tmp_path)
    for message in messages:
        assert "/dev/shm has 0.0 MB free and" in message
        assert "--shm-size" in message
        assert "TMPDIR" in message
        assert str(tmp_path) in message


def test_a_ram_file_system_that_is_too_small_for_vllm_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's semaphores need a page, and Intel's OpenMP dies of a bus error without one."""
    usage = shutil.disk_usage("/dev/shm")
    for free in (0, 4096, 2**16):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with pytest.raises(RloraError, match=f"/dev/shm has {free // 1024} KiB free, .*--shm-size"):
            machine.check_ram_directory()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    machine.check_ram_directory()


@NEEDS_NAMESPACES
def test_a_run_reports_a_full_ram_file_system(tmp_path: Path) -> None:
    fill = "mount -t tmpfs -o size=1m tmpfs /dev/shm && head -c 2000000 /dev/zero > /dev/shm/fill 2>/dev/null"
    train = f"exec {sys.executable} -m rlora train launch/arithmetic.toml --run-dir {tmp_path}/run"
    command = ["unshare", "-m", "sh", "-c", f"{fill}; {train}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rlora: /dev/shm has 0 KiB free" in done.stderr
    assert "--shm-size" in done.stderr
    assert "Traceback" not in done.stderr
