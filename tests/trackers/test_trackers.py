"""Trackers with their libraries: they receive all of metrics.jsonl, also after a crash and a resume."""

import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from conftest import ROOT, episode, group
from upath import UPath

from rlora.config import validate
from rlora.records import RloraError
from rlora.run import episodes
from rlora.settings import Config
from rlora.trackers.tracker import Tracked, make
from rlora.trackers.tracking import tracked

FIGURES = {"reward/mean": 0.25, "completion/length": 7.0, "kl/reference": None, "update/skipped": False}
TABLE = {"model": "-", "env": "-", "reward": "-"}


class Directory:
    """A run's directory, written step by step."""

    def __init__(self, parent: Path, **trackers: Any) -> None:
        self.path = parent / "run"
        (self.path / "bundles" / "0").mkdir(parents=True)
        table = TABLE | {"trackers": trackers}
        self.config: Config = validate(table)
        (self.path / "config.toml").write_text(tomli_w.dumps(table | {"provenance": {"id": "abc123"}}))
        (self.path / "summary.json").write_text(json.dumps({"accuracy/after": 0.9}))
        self.lines: list[dict[str, Any]] = []

    @property
    def run(self) -> Any:
        return SimpleNamespace(path=UPath(self.path), config=self.config)

    def step(self, bundle: bool = True, shift: float = 0.0) -> None:
        """Write the line of a step, and its bundle."""
        number = len(self.lines)
        self.lines.append({"step": number, **FIGURES, "reward/max": number + shift})
        self.write()
        if bundle:
            path = self.path / "bundles" / str(number + 1)
            path.mkdir()
            groups = [group([1], episode([2], 0.5)), group([1], episode([3], 1.0))]
            (path / "update.parquet").write_bytes(episodes.encode(groups))

    def cut(self, steps: int) -> None:
        """Remove lines without a bundle, as a resume after a crash does."""
        del self.lines[steps:]
        self.write()

    def write(self) -> None:
        (self.path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in self.lines))

    @property
    def numbers(self) -> dict[str, list[tuple[int, float]]]:
        """Each metric by step, as trackers should have it."""
        names = {name for line in self.lines for name in line} - {"step"}
        return {
            name: [(line["step"], float(line[name])) for line in self.lines if line[name] is not None]
            for name in names
            if any(line[name] is not None for line in self.lines)
        }


CUSTOM = """
import json, os, time
from pathlib import Path

class Notes:
    def __init__(self, tracked, last):
        self.file = Path(tracked.directory) / "notes.jsonl"
        self.where = f"at {self.file.name}"
        self.note("start", tracked.name, tracked.id, last, tracked.flat["model"])

    def note(self, *values):
        with self.file.open("a") as file:
            file.write(json.dumps(values) + "\\n")

    def log(self, step, figures):
        self.note("log", step, figures)

    def samples(self, step, columns, rows):
        self.note("samples", step, columns, rows)

    def flush(self):
        pass

    def finish(self, failed, summary):
        self.note("finish", failed, summary)

class Hanging(Notes):
    def log(self, step, figures):
        time.sleep(1000)

class Failing(Notes):
    def log(self, step, figures):
        raise ConnectionError("no connection")

class Dying(Notes):
    def log(self, step, figures):
        os.kill(os.getpid(), 9)

class Broken:
    def __init__(self, tracked, last):
        raise ConnectionError("no key")
"""


@pytest.fixture
def custom(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CUSTOM)
    return str(tmp_path / "mine.py")


def notes(directory: Directory) -> list[list[Any]]:
    return [json.loads(line) for line in (directory.path / "notes.jsonl").read_text().splitlines()]


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_tracker_receives_each_step_once(custom: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = Directory(tmp_path, use=[f"{custom}:Notes"], samples_every=2)
    with tracked(directory.run):
        directory.step()
        directory.step(bundle=False)  # a resume would repeat it
        wait_for(lambda: any((directory.path / "trackers").glob("*-Notes.json")))
    assert re.search(r"^tracker .*mine\.py:Notes: at notes\.jsonl$", capfd.readouterr().out, re.MULTILINE)
    received = notes(directory)
    assert received[0] == ["start", "run", "abc123", -1, "-"]
    figures = {name: value for name, value in FIGURES.items() if value is not None} | {"update/skipped": 0.0}
    assert received[1] == ["log", 0, figures | {"reward/max": 0.0}]
    kind, step, columns, rows = received[2]
    assert (kind, step, columns[1:5]) == ("samples", 0, ["prompt", "completion", "answer", "reward"])
    assert [row[4] for row in rows] == [0.5, 1.0]
    assert received[3:] == [["finish", False, {"accuracy/after": 0.9}]]
    with tracked(directory.run):
        directory.step()  # its bundle completes the previous line's
    assert notes(directory)[4:] == [
        ["start", "run", "abc123", 0, "-"],
        *(["log", step, figures | {"reward/max": float(step)}] for step in (1, 2)),
        notes(directory)[7],
        ["finish", False, {"accuracy/after": 0.9}],
    ]


KILLED = """
import os, sys
sys.path[:0] = [{tests!r}, {directory!r}]
from test_trackers import *

directory = Directory(Path({parent!r}), use=[{name!r}])
with tracked(directory.run):
    directory.step(), directory.step(), directory.step(bundle=False)
    wait_for(lambda: {done})
    os.kill(os.getpid(), 9)
"""


def test_after_a_crash_no_step_is_sent_twice(custom: str, tmp_path: Path) -> None:
    name = f"{custom}:Notes"
    code = KILLED.format(tests=str(ROOT / "tests"), directory=str(Path(__file__).parent), parent=str(tmp_path),
                         name=name, done='any((directory.path / "trackers").glob("*-Notes.json"))')  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120)
    directory = Directory.__new__(Directory)
    directory.path, directory.config = tmp_path / "run", validate(TABLE | {"trackers": {"use": [name]}})
    wait_for(lambda: notes(directory)[-1][0] == "finish")  # the tracker's process ends by itself
    assert notes(directory)[-1][1] is True  # failed
    assert [note[1] for note in notes(directory) if note[0] == "log"] == [0, 1]
    directory.lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
    directory.cut(2)
    with tracked(directory.run):
        directory.step(), directory.step()
    assert [note[1] for note in notes(directory) if note[0] == "log"] == [0, 1, 2, 3]


def test_a_tracker_that_hangs_or_fails_does_not_delay_the_run(
    custom: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = Directory(tmp_path, use=[f"{custom}:Hanging", f"{custom}:Failing", f"{custom}:Broken"], patience=8.0)
    start = time.monotonic()
    with tracked(directory.run):
        for _ in range(3):
            directory.step()
        assert time.monotonic() - start < 2
    assert time.monotonic() - start < 20
    warnings = capfd.readouterr().err
    assert f"tracker {custom}:Failing: ConnectionError: no connection; training continues" in warnings
    assert f"tracker {custom}:Broken: ConnectionError: no key; training continues" in warnings
    assert f"tracker {custom}:Hanging: it did not end within trackers.patience = 8 s" in warnings
    assert warnings.count("no connection") == 1


def test_a_tracker_whose_process_dies_causes_a_warning(
    custom: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = Directory(tmp_path, use=[f"{custom}:Dying"])
    with tracked(directory.run):
        directory.step(), directory.step()
        wait_for(lambda: "Dying" in capfd.readouterr().err)


def test_a_tracker_that_hangs_ends_after_its_run_was_killed(custom: str, tmp_path: Path) -> None:
    """No process waits for it then."""
    code = KILLED.format(tests=str(ROOT / "tests"), directory=str(Path(__file__).parent), parent=str(tmp_path),
                         name=f"{custom}:Hanging", done='(directory.path / "notes.jsonl").exists()')  # fmt: skip
    code = code.replace("use=[", "patience=2.0, use=[")
    marked = os.environ | {"RLORA_TEST": str(tmp_path)}  # identifies its process
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120, env=marked)

    def is_running() -> bool:
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if str(tmp_path).encode() in path.read_bytes():
                    return True
        return False

    assert is_running()
    wait_for(lambda: not is_running())


def test_strict_stops_before_the_run(custom: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = Directory(tmp_path, use=[f"{custom}:Broken"], strict=True)
    message = r"trackers\.strict = true: .*mine\.py:Broken: ConnectionError: no key"
    with pytest.raises(RloraError, match=message), tracked(directory.run):
        raise AssertionError("the run has started")
    assert "training continues" not in capfd.readouterr().err


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "rlora.trackers.wandb_tracker", raising=False)
    with pytest.raises(RloraError, match=r"trackers\.use = 'wandb': .*pip install 'rlora\[wandb\]'"):
        make("wandb", Tracked("run", "id", str(tmp_path), "rlora"), -1)
    with pytest.raises(RloraError, match=r"trackers\.use.* = 'wandbb'"):
        validate(TABLE | {"trackers": {"use": ["wandbb"]}})


def test_two_trackers_of_one_name_both_receive_the_steps(custom: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "mine.py"
    other.write_text(CUSTOM.replace("notes.jsonl", "others.jsonl"))
    directory = Directory(tmp_path, use=[f"{custom}:Notes", f"{other}:Notes"])
    with tracked(directory.run):
        directory.step()
    counts = [(directory.path / name).read_text().count('"log"') for name in ("notes.jsonl", "others.jsonl")]
    assert counts == [1, 1]
    with pytest.raises(RloraError, match=r"trackers\.use = .*a tracker is named twice"):
        validate(TABLE | {"trackers": {"use": ["wandb", "wandb"]}})


def test_a_tracker_that_needs_a_local_directory_refuses_a_url(tmp_path: Path) -> None:
    with pytest.raises(
        RloraError, match=r"'tensorboard': it writes to a local directory, but the run is at s3://b/run"
    ):
        make("tensorboard", Tracked("run", "id", "s3://b/run", "rlora"), -1)


def trained(parent: Path, name: str) -> Directory:
    """A run that was killed and resumed, tracked by one of the ready trackers."""
    directory = Directory(parent, use=[name], samples_every=2)
    with tracked(directory.run):
        for _ in range(3):
            directory.step()
    directory.step()
    directory.step(bundle=False, shift=100.0)
    directory.cut(4)
    with tracked(directory.run):
        for _ in range(2):
            directory.step()
    return directory


@pytest.mark.skipif(not find_spec("tensorboard"), reason="needs tensorboard")
def test_tensorboard_has_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = trained(tmp_path, "tensorboard")
    events = EventAccumulator(str(directory.path / "tensorboard")).Reload()
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars == directory.numbers
    assert {"config/text_summary", "samples/text_summary"} <= set(events.Tags()["tensors"])


@pytest.mark.skipif(not find_spec("trackio"), reason="needs trackio")
def test_trackio_has_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    directory = trained(tmp_path, "trackio")
    code = (
        "import json\nfrom trackio.sqlite_storage import SQLiteStorage as S\n"
        "print(json.dumps([S.get_logs('rlora', 'run-abc123'), S.get_run_config('rlora', 'run-abc123')], default=str))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    logs, config = json.loads(out.stdout)
    logged = {name: [(line["step"], line[name]) for line in logs if name in line] for name in directory.numbers}
    assert logged == {name: [tuple(value) for value in values] for name, values in directory.numbers.items()}
    assert config["model"] == "-"
    assert any("samples" in line for line in logs)


@pytest.mark.skipif(not find_spec("mlflow"), reason="needs mlflow")
def test_mlflow_has_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    directory = trained(tmp_path, "mlflow")
    code = """
import json
from mlflow import MlflowClient

client = MlflowClient()
(experiment,) = [item for item in client.search_experiments() if item.name == "rlora"]
(run,) = client.search_runs([experiment.experiment_id])
history = client.get_metric_history
metrics = {name: [(e.step, e.value) for e in history(run.info.run_id, name)] for name in run.data.metrics}
samples = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
print(json.dumps([metrics, run.info.status, run.data.params["model"], run.data.tags["accuracy/after"], samples]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    metrics, *rest = json.loads(out.stdout)
    assert {name: [tuple(value) for value in values] for name, values in metrics.items()} == directory.numbers
    assert rest == ["FINISHED", "-", "0.9", ["samples/000000.json", "samples/000002.json", "samples/000004.json"]]


def records(file: Path) -> Iterator[bytes]:
    """Records of a .wandb file: 7 bytes of header, then LevelDB's log format, 32 KiB blocks with parts of records."""
    content, record = file.read_bytes(), b""
    for start in range(0, len(content), 32768):
        block, offset = content[start : start + 32768], 7 if start == 0 else 0
        while len(block) - offset >= 7:
            length, kind = struct.unpack_from("<HB", block, offset + 4)
            if kind == 0:
                break
            record += block[offset + 7 : offset + 7 + length]
            offset += 7 + length
            if kind in (1, 4):  # a full record, or its last part
                yield record
                record = b""


@pytest.mark.skipif(not find_spec("wandb"), reason="needs wandb")
def test_wandb_has_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    directory = trained(tmp_path, "wandb")
    from wandb.proto import wandb_internal_pb2

    logged: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((directory.path / "wandb").glob("offline-run-*-abc123/run-abc123.wandb")):
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") != "history":
                continue
            items = {
                item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item
            }
            for name in directory.numbers:
                if name in items:
                    logged.setdefault(name, []).append((int(items["_step"]), float(json.loads(items[name]))))
    assert logged == directory.numbers
