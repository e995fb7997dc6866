"""Where engines keep their adapters' files: in RAM or on disk, and what is left of processes that are gone."""

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
held = Scratch({pid})
print(held._directory({place}), flush=True)
time.sleep(60)
"""


def can_unshare() -> bool:
    if os.getuid() or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-m", "-p", "-f", "true"], check=False).returncode == 0


NEEDS_NAMESPACES = pytest.mark.skipif(not can_unshare(), reason="needs root and namespaces")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Stand in for /dev/shm and /tmp."""
    ram, disk = tmp_path / "ram", tmp_path / "disk"
    for place in (ram, disk):
        place.mkdir()
    monkeypatch.setattr(machine, "ram_directory", lambda: ram)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    return ram, disk


def gone() -> int:
    """The pid of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def holder(places: tuple[Path, Path]) -> Iterator[Callable[..., tuple[subprocess.Popen[str], Path]]]:
    """Starts processes that keep a directory, as engines do."""
    started: list[subprocess.Popen[str]] = []

    def start(pid: str = "os.getpid()", *prefix: str) -> tuple[subprocess.Popen[str], Path]:
        place = f"__import__('pathlib').Path({str(places[0])!r})"
        command = [*prefix, sys.executable, "-c", HOLD.format(pid=pid, place=place)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_an_adapter_is_written_in_ram_and_goes_when_its_engine_is_closed(places: tuple[Path, Path]) -> None:
    held = Scratch(os.getpid())
    path = held.write(adapter(3), versions=2)
    assert path == machine.adapter_directory(os.getpid()) / adapter(3).name
    assert {file.name: file.read_bytes() for file in path.iterdir()} == adapter(3).files
    remove_leftovers()  # it is in use
    assert path.exists()
    held.close()
    assert not any(place for ram in places for place in ram.iterdir())


def test_where_ram_has_no_room_disk_is_used(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ram, disk = places
    size = sum(map(len, adapter(1).files.values()))
    free = {ram: 2 * size, disk: 2 * size}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, free[Path(place)]))  # type: ignore[attr-defined]
    held = Scratch(os.getpid())
    assert ram in held.write(adapter(1), versions=2).parents
    free[ram] = size - 1
    assert disk in held.write(adapter(2)).parents
    free[ram], free[disk] = 2 * size, 3 * size
    assert disk in held.write(adapter(4), versions=3).parents
    free[disk] = 0
    with pytest.raises(RloraError) as told:
        held.write(adapter(5), versions=3)
    for part in ("3 versions of the adapter need", f"{ram} has 0.0 MB free", f"{disk} has 0.0 MB free", "--shm-size"):
        assert part in str(told.value)
    held.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_where_ram_fills_up_meanwhile_disk_is_used(number: int, places: tuple[Path, Path]) -> None:
    def write(_: Adapter, directory: Path) -> Path:
        if places[0] in directory.parents:
            raise OSError(number, os.strerror(number))
        return directory

    held = Scratch(os.getpid())
    assert places[1] in held.write(adapter(1), write=write).parents
    held.close()


def test_what_killed_processes_left_is_removed_and_nothing_else(
    places: tuple[Path, Path], holder: Callable[..., tuple[subprocess.Popen[str], Path]]
) -> None:
    ram, disk = places
    dead, user = gone(), os.getuid()
    killed, of_killed = holder()
    _, of_living = holder()
    (of_killed / "run-v3").mkdir()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    earlier = [ram / f"rlora-{dead}", disk / f"rlora-{dead}", ram / f"rlora-{dead}.1"]  # without a lock
    living = [ram / f"rlora-{os.getpid()}", ram / "rlora-run-ab12", ram / "rlora-", ram / f"other-{dead}"]
    for path in [*earlier, *living]:
        path.mkdir()
    openmp = [ram / f"__KMP_REGISTERED_LIB_{pid}_{user}" for pid in (dead, killed.pid)]
    others = [ram / f"__KMP_REGISTERED_LIB_{os.getpid()}_{user}", ram / f"__KMP_REGISTERED_LIB_{dead}_{user + 1}"]
    others += [ram / "__KMP_REGISTERED_LIB_x", ram / f"rlora-{dead}0000000", ram / "sem.x"]
    for path in [*openmp, *others]:
        path.write_text("")
    (disk / f"rlora-{dead}.2").symlink_to(living[0])
    remove_leftovers()
    assert not [path for path in [of_killed, *earlier, *openmp] if path.exists()]
    assert [path for path in [of_living, *living, *others] if path.exists()] == [of_living, *living, *others]


def test_a_later_process_of_the_same_number_keeps_nothing_alive(places: tuple[Path, Path]) -> None:
    ours = places[0] / f"rlora-{os.getpid()}"
    ours.mkdir()
    os.utime(ours, (0, 0))  # long before this process began
    remove_leftovers()
    assert not ours.exists()


def test_a_process_that_is_not_waited_for_is_gone(places: tuple[Path, Path]) -> None:
    """A container without an init keeps its entry."""
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    left = places[0] / f"rlora-{process.pid}"
    left.mkdir()
    remove_leftovers()
    assert not left.exists()
    process.wait()


@NEEDS_NAMESPACES
def test_a_process_of_another_container_is_left_alone_and_has_files_of_its_own(
    places: tuple[Path, Path], holder: Callable[..., tuple[subprocess.Popen[str], Path]]
) -> None:
    """Two containers that share their RAM file system have processes of the same number."""
    unseen = gone()
    _, theirs = holder(str(unseen), "unshare", "-p", "-f", "--kill-child")
    assert theirs.name == f"rlora-{unseen}"
    (theirs / "run-v1").mkdir()
    remove_leftovers()
    held = Scratch(unseen)
    path = held.write(adapter(1))
    assert path.parent == theirs.with_name(f"{theirs.name}.1")
    assert (theirs / "run-v1").exists()
    held.close()
    assert theirs.exists()


def test_a_dead_process_of_the_same_number_leaves_its_place(places: tuple[Path, Path]) -> None:
    left = places[0] / f"rlora-{os.getpid()}"
    (left / "run-v1").mkdir(parents=True)
    held = Scratch(os.getpid())
    held.write(adapter(2))
    assert [path.name for path in left.iterdir()] == [adapter(2).name]
    held.close()


def test_what_may_not_be_removed_stays(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    left = places[0] / f"rlora-{gone()}"
    left.mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    remove_leftovers()
    assert left.exists()


SMALL = """
import os, sys, shutil
from pathlib import Path
from rlora.records import Adapter, RloraError
from rlora.engine.scratch import Scratch
weights = (2).to_bytes(8, "little") + b"{}" + bytes(300_000)
held = Scratch(os.getpid())
for version in range(5):
    try:
        print(held.write(Adapter("run", version, b"{}", weights), versions=2 if not version else 1).parents[1])
    except RloraError as error:
        print(error)
held.close()
print(os.listdir("/dev/shm"), [name for name in os.listdir(sys.argv[1]) if name.startswith("rlora-")])
"""


def in_namespace(mounts: str, tmp: Path) -> list[str]:
    """What SMALL prints where `mounts` was done before."""
    command = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && {mounts} exec {sys.executable} -c '{SMALL}' {tmp}"
    environment = os.environ | {"TMPDIR": str(tmp)}
    unshared = ["unshare", "-m", "sh", "-c", command]
    done = subprocess.run(unshared, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@NEEDS_NAMESPACES
def test_a_small_ram_file_system_is_filled_and_then_left(tmp_path: Path) -> None:
    """1 MB: three adapters of 0.3 MB."""
    assert in_namespace("", tmp_path) == ["/dev/shm"] * 3 + [str(tmp_path)] * 2 + ["[] []"]


@NEEDS_NAMESPACES
def test_a_full_ram_file_system_names_itself_and_the_remedy(tmp_path: Path) -> None:
    fill = "head -c 2000000 /dev/zero > /dev/shm/fill 2>/dev/null;"
    assert in_namespace(fill, tmp_path) == [str(tmp_path)] * 5 + ["['fill'] []"]
    *told, _ = in_namespace(f"{fill} mount -t tmpfs -o size=100k tmpfs {tmp_path};", tmp_path)
    for line in told:
        assert "/dev/shm has 0.0 MB free and" in line
        assert "--shm-size" in line
        assert "TMPDIR" in line
        assert str(tmp_path) in line


def test_a_ram_file_system_in_which_no_engine_can_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's semaphores need a page, and Intel's OpenMP dies of a bus error without one."""
    usage = shutil.disk_usage("/dev/shm")
    for free in (0, 4096, 2**16):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with pytest.raises(RloraError, match=f"/dev/shm has {free // 1024} KiB free, .*--shm-size"):
            machine.check_ram_directory()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    machine.check_ram_directory()


@NEEDS_NAMESPACES
def test_a_run_in_a_full_ram_file_system_names_it(tmp_path: Path) -> None:
    fill = "mount -t tmpfs -o size=1m tmpfs /dev/shm && head -c 2000000 /dev/zero > /dev/shm/fill 2>/dev/null"
    train = f"exec {sys.executable} -m rlora train launch/arithmetic.toml --run-dir {tmp_path}/run"
    command = ["unshare", "-m", "sh", "-c", f"{fill}; {train}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rlora: /dev/shm has 0 KiB free" in done.stderr
    assert "--shm-size" in done.stderr
    assert "Traceback" not in done.stderr
