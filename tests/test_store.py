import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from upath import UPath

from rlora import store

FILES = {"a": b"1" * 5000, "b": b"2" * 5000}


@pytest.mark.parametrize("kind", ["{}", "memory://{}"])
def test_files_and_directories_are_replaced(kind: str, tmp_path: Path) -> None:
    root = UPath(kind.format(tmp_path))
    store.write_directory(root / "d", FILES)
    store.write_directory(root / "d", {"c": b"3"})
    assert {path.name: path.read_bytes() for path in (root / "d").iterdir()} == {"c": b"3"}
    store.write_file(root / "f", b"old")
    store.write_file(root / "f", b"new")
    assert (root / "f").read_bytes() == b"new"
    for name in ("d", "f", "none"):
        store.remove(root / name)
        assert not (root / name).exists()


DIE = """
import os, signal, sys
from pathlib import Path
from rlora import store
real, remaining = store._write, int(sys.argv[2])
def write(path, content):
    global remaining
    if remaining == 0:
        path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    remaining -= 1
    real(path, content)
store._write = write
store.write_directory(Path(sys.argv[1]), {"a": b"new" * 1000, "b": b"new" * 1000})
"""


@pytest.mark.parametrize("written", [0, 1])
def test_a_kill_during_a_write_keeps_the_old_content(written: int, tmp_path: Path) -> None:
    path = tmp_path / "d"
    store.write_directory(path, FILES)
    killed = subprocess.run([sys.executable, "-c", DIE, str(path), str(written)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert {file.name: file.read_bytes() for file in path.iterdir()} == FILES
    store.write_directory(path, FILES)  # clears the partial directory away
    assert os.listdir(tmp_path) == ["d"]


def test_a_kill_during_a_removal_leaves_only_partial_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d"
    store.write_directory(path, FILES)
    with monkeypatch.context() as patched:
        patched.setattr(store.shutil, "rmtree", lambda half: (half / "a").unlink())
        store.remove(path)
    assert os.listdir(tmp_path) == [".d.old.half"]
    store.write_directory(path, FILES)
    store.remove(path)  # although a partial one exists already
    assert os.listdir(tmp_path) == []
    (tmp_path / ".e.half").write_text("killed in the middle of a wr")
    store.remove_halves(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_link_is_removed_and_its_target_stays(tmp_path: Path) -> None:
    store.write_directory(tmp_path / "d", FILES)
    (tmp_path / "link").symlink_to(tmp_path / "d")
    store.remove(tmp_path / "link")
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("kind", ["{}", "memory://{}"])
def test_a_missing_file_differs_from_a_store_that_does_not_answer(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = UPath(kind.format(tmp_path)) / "d"
    assert (store.names(root), store.read_file(root / "a")) == ([], None)
    store.write_directory(root, FILES)
    assert (sorted(store.names(root)), store.read_file(root / "a")) == (["a", "b"], FILES["a"])

    def failing(*_: object, **__: object) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(root), "read_bytes", failing)
    for owner, name in [(os, "listdir"), (type(root.fs), "ls")]:
        monkeypatch.setattr(owner, name, failing)
    with pytest.raises(TimeoutError):
        store.names(root)
    with pytest.raises(TimeoutError):
        store.read_file(root / "a")


@pytest.mark.parametrize(
    ("directory", "path", "expected"),
    [
        ("runs/a", "runs/a", True),
        ("runs/a", "runs/../runs/a/bundles/3", True),
        ("runs/a", "runs/ab", False),
        ("memory://runs/a", "memory://runs/a/bundles", True),
        ("memory://runs/a", "memory://runs/ab", False),
        ("memory://runs/a", "runs/a", False),
    ],
)
def test_what_a_directory_holds(directory: str, path: str, expected: bool) -> None:
    assert store.holds(UPath(directory), UPath(path)) == expected
