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
real, left = store._write, int(sys.argv[2])
def write(path, content):
    global left
    if left == 0:
        path.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    real(path, content)
store._write = write
store.write_directory(Path(sys.argv[1]), {"a": b"new" * 1000, "b": b"new" * 1000})
"""


@pytest.mark.parametrize("written", [0, 1])
def test_a_kill_in_mid_write_leaves_what_was_there(written: int, tmp_path: Path) -> None:
    path = tmp_path / "d"
    store.write_directory(path, FILES)
    died = subprocess.run([sys.executable, "-c", DIE, str(path), str(written)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert {each.name: each.read_bytes() for each in path.iterdir()} == FILES
    store.write_directory(path, FILES)  # and the half that it left is cleared away
    assert os.listdir(tmp_path) == ["d"]


def test_a_kill_in_mid_removal_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d"
    store.write_directory(path, FILES)
    with monkeypatch.context() as patched:
        patched.setattr(store.shutil, "rmtree", lambda half: (half / "a").unlink())
        store.remove(path)
    assert os.listdir(tmp_path) == [".d.old.half"]
    store.write_directory(path, FILES)
    store.remove(path)  # though there is a half one already
    assert os.listdir(tmp_path) == []
    (tmp_path / ".e.half").write_text("killed in the middle of a wr")
    store.remove_halves(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    store.write_directory(tmp_path / "d", FILES)
    (tmp_path / "link").symlink_to(tmp_path / "d")
    store.remove(tmp_path / "link")
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("kind", ["{}", "memory://{}"])
def test_what_is_not_there_is_not_what_can_not_be_known(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = UPath(kind.format(tmp_path)) / "d"
    assert (store.names(root), store.read_file(root / "a")) == ([], None)
    store.write_directory(root, FILES)
    assert (sorted(store.names(root)), store.read_file(root / "a")) == (["a", "b"], FILES["a"])

    def failing(*_: object, **__: object) -> None:
        raise TimeoutError("it does not answer")

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
