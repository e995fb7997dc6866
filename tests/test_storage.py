import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from upath import UPath

from rlora import storage

FILES = {"a": b"1" * 5000, "b": b"2" * 5000}


@pytest.mark.parametrize("kind", ["{}", "memory://{}"])
def test_files_and_directories_are_replaced(kind: str, tmp_path: Path) -> None:
    root = UPath(kind.format(tmp_path))
    storage.write_directory(root / "d", FILES)
    storage.write_directory(root / "d", {"c": b"3"})
    assert {path.name: path.read_bytes() for path in (root / "d").iterdir()} == {"c": b"3"}
    storage.write_file(root / "f", b"old")
    storage.write_file(root / "f", b"new")
    assert (root / "f").read_bytes() == b"new"
    for name in ("d", "f", "none"):
        storage.remove(root / name)
        assert not (root / name).exists()


DIE = """
import os, signal, sys
from pathlib import Path
from rlora import storage
real, left = storage._write, int(sys.argv[2])
def write(path, content):
    global left
    if left == 0:
        path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    real(path, content)
storage._write = write
storage.write_directory(Path(sys.argv[1]), {"a": b"new" * 1000, "b": b"new" * 1000})
"""


@pytest.mark.parametrize("written", [0, 1])
def test_a_kill_in_mid_write_leaves_what_was_there(written: int, tmp_path: Path) -> None:
    path = tmp_path / "d"
    storage.write_directory(path, FILES)
    died = subprocess.run([sys.executable, "-c", DIE, str(path), str(written)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert {each.name: each.read_bytes() for each in path.iterdir()} == FILES
    storage.write_directory(path, FILES)  # and the half that it left is cleared away
    assert os.listdir(tmp_path) == ["d"]
