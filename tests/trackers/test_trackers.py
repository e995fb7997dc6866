"""Trackers, each by its own library: they have what metrics.jsonl has, after a death and a resume too."""

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
    """A run's directory as a run makes it, step by step."""

    def __init__(self, place: Path, **trackers: Any) -> None:
        self.place = place / "run"
        (self.place / "bundles" / "0").mkdir(parents=True)
        table = TABLE | {"trackers": trackers}
        self.config: Config = validate(table)
        (self.place / "config.toml").write_text(tomli_w.dumps(table | {"provenance": {"id": "abc123"}}))
        (self.place / "summary.json").write_text(json.dumps({"accuracy/after": 0.9}))
        self.lines: list[dict[str, Any]] = []

    @property
    def run(self) -> Any:
        return SimpleNamespace(place=UPath(self.place), config=self.config)

    def step(self, bundle: bool = True, shift: float = 0.0) -> None:
        """A line, and the bundle after it."""
        number = len(self.lines)
        self.lines.append({"step": number, **FIGURES, "reward/max": number + shift})
        self.write()
        if bundle:
            made = self.place / "bundles" / str(number + 1)
            made.mkdir()
            groups = [group([1], episode([2], 0.5)), group([1], episode([3], 1.0))]
            (made / "update.parquet").write_bytes(episodes.encode(groups))

    def cut(self, steps: int) -> None:
        """What a resume does after a death: the lines that have no bundle come again."""
        del self.lines[steps:]
        self.write()

    def write(self) -> None:
        (self.place / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in self.lines))

    @property
    def numbers(self) -> dict[str, list[tuple[int, float]]]:
        """Each figure by step, as trackers should have it."""
        names = {name for line in self.lines for name in line} - {"step"}
        return {
            name: [(line["step"], float(line[name])) for line in self.lines if line[name] is not None]
            for name in names
            if any(line[name] is not None for line in self.lines)
        }


OWN = """
import json, os, time
from pathlib import Path

class Notes:
    def __init__(self, tracked, last):
        self.file = Path(tracked.directory) / "notes.jsonl"
        self.where = f"at {self.file.name}"
        self.note("start", tracked.name, tracked.id, last, tracked.flat["model"])

    def note(self, *what):
        with self.file.open("a") as file:
            file.write(json.dumps(what) + "\\n")

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
        raise ConnectionError("nobody there")

class Dying(Notes):
    def log(self, step, figures):
        os.kill(os.getpid(), 9)

class Unmade:
    def __init__(self, tracked, last):
        raise ConnectionError("no key")
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(OWN)
    return str(tmp_path / "mine.py")


def notes(directory: Directory) -> list[list[Any]]:
    return [json.loads(line) for line in (directory.place / "notes.jsonl").read_text().splitlines()]


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_tracker_is_told_each_step_once(own: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = Directory(tmp_path, use=[f"{own}:Notes"], samples_every=2)
    with tracked(made.run):
        made.step()
        made.step(bundle=False)  # a resume would make it come again
        wait_for(lambda: any((made.place / "trackers").glob("*-Notes.json")))
    assert re.search(r"^tracker .*mine\.py:Notes: at notes\.jsonl$", capfd.readouterr().out, re.MULTILINE)
    told = notes(made)
    assert told[0] == ["start", "run", "abc123", -1, "-"]
    figures = {name: value for name, value in FIGURES.items() if value is not None} | {"update/skipped": 0.0}
    assert told[1] == ["log", 0, figures | {"reward/max": 0.0}]
    kind, step, columns, rows = told[2]
    assert (kind, step, columns[1:5]) == ("samples", 0, ["prompt", "completion", "answer", "reward"])
    assert [row[4] for row in rows] == [0.5, 1.0]
    assert told[3:] == [["finish", False, {"accuracy/after": 0.9}]]
    with tracked(made.run):
        made.step()  # with the bundle that the line before has not had
    assert notes(made)[4:] == [
        ["start", "run", "abc123", 0, "-"],
        *(["log", step, figures | {"reward/max": float(step)}] for step in (1, 2)),
        notes(made)[7],
        ["finish", False, {"accuracy/after": 0.9}],
    ]


KILLED = """
import os, sys
sys.path[:0] = [{tests!r}, {here!r}]
from test_trackers import *

made = Directory(Path({place!r}), use=[{name!r}])
with tracked(made.run):
    made.step(), made.step(), made.step(bundle=False)
    wait_for(lambda: {done})
    os.kill(os.getpid(), 9)
"""


def test_after_a_death_nothing_comes_twice(own: str, tmp_path: Path) -> None:
    name = f"{own}:Notes"
    code = KILLED.format(tests=str(ROOT / "tests"), here=str(Path(__file__).parent), place=str(tmp_path), name=name,
                         done='any((made.place / "trackers").glob("*-Notes.json"))')  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120)
    made = Directory.__new__(Directory)
    made.place, made.config = tmp_path / "run", validate(TABLE | {"trackers": {"use": [name]}})
    wait_for(lambda: notes(made)[-1][0] == "finish")  # its process ends by itself
    assert notes(made)[-1][1] is True  # failed
    assert [note[1] for note in notes(made) if note[0] == "log"] == [0, 1]
    made.lines = [json.loads(line) for line in (made.place / "metrics.jsonl").read_text().splitlines()]
    made.cut(2)
    with tracked(made.run):
        made.step(), made.step()
    assert [note[1] for note in notes(made) if note[0] == "log"] == [0, 1, 2, 3]


def test_one_that_hangs_or_fails_holds_nothing_up(own: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = Directory(tmp_path, use=[f"{own}:Hanging", f"{own}:Failing", f"{own}:Unmade"], patience=8.0)
    began = time.monotonic()
    with tracked(made.run):
        for _ in range(3):
            made.step()
        assert time.monotonic() - began < 2
    assert time.monotonic() - began < 20
    told = capfd.readouterr().err
    assert f"tracker {own}:Failing: ConnectionError: nobody there; training goes on" in told
    assert f"tracker {own}:Unmade: ConnectionError: no key; training goes on" in told
    assert f"tracker {own}:Hanging: it has not ended after trackers.patience = 8 s" in told
    assert told.count("nobody there") == 1


def test_one_whose_process_dies_is_told_of(own: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = Directory(tmp_path, use=[f"{own}:Dying"])
    with tracked(made.run):
        made.step(), made.step()
        wait_for(lambda: "Dying" in capfd.readouterr().err)


def test_one_that_hangs_ends_after_the_death_of_its_run(own: str, tmp_path: Path) -> None:
    """Also where its run was killed, and nobody waits for it."""
    code = KILLED.format(tests=str(ROOT / "tests"), here=str(Path(__file__).parent), place=str(tmp_path),
                         name=f"{own}:Hanging", done='(made.place / "notes.jsonl").exists()')  # fmt: skip
    code = code.replace("use=[", "patience=2.0, use=[")
    marked = os.environ | {"RLORA_TEST": str(tmp_path)}  # by which its process is known
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120, env=marked)

    def there() -> bool:
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if str(tmp_path).encode() in path.read_bytes():
                    return True
        return False

    assert there()
    wait_for(lambda: not there())


def test_strict_stops_before_the_run(own: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = Directory(tmp_path, use=[f"{own}:Unmade"], strict=True)
    message = r"trackers\.strict = true: .*mine\.py:Unmade: ConnectionError: no key"
    with pytest.raises(RloraError, match=message), tracked(made.run):
        raise AssertionError("the run has begun")
    assert "training goes on" not in capfd.readouterr().err


def test_a_package_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "rlora.trackers.wandb_tracker", raising=False)
    with pytest.raises(RloraError, match=r"trackers\.use = 'wandb': .*pip install 'rlora\[wandb\]'"):
        make("wandb", Tracked("run", "id", str(tmp_path), "rlora"), -1)
    with pytest.raises(RloraError, match=r"trackers\.use.* = 'wandbb'"):
        validate(TABLE | {"trackers": {"use": ["wandbb"]}})


def test_two_of_one_name_are_told_each(own: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "mine.py"
    other.write_text(OWN.replace("notes.jsonl", "others.jsonl"))
    made = Directory(tmp_path, use=[f"{own}:Notes", f"{other}:Notes"])
    with tracked(made.run):
        made.step()
    told = [(made.place / name).read_text().count('"log"') for name in ("notes.jsonl", "others.jsonl")]
    assert told == [1, 1]
    with pytest.raises(RloraError, match=r"trackers\.use = .*one is named twice"):
        validate(TABLE | {"trackers": {"use": ["wandb", "wandb"]}})


def test_what_a_tracker_can_not_do_at_a_url_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        RloraError, match=r"'tensorboard': it writes to a local directory, and the run is at s3://b/run"
    ):
        make("tensorboard", Tracked("run", "id", "s3://b/run", "rlora"), -1)


def trained(place: Path, name: str) -> Directory:
    """A run that was killed and resumed, tracked by one of the ready trackers."""
    made = Directory(place, use=[name], samples_every=2)
    with tracked(made.run):
        for _ in range(3):
            made.step()
    made.step()
    made.step(bundle=False, shift=100.0)
    made.cut(4)
    with tracked(made.run):
        for _ in range(2):
            made.step()
    return made


@pytest.mark.skipif(not find_spec("tensorboard"), reason="needs tensorboard")
def test_tensorboard_has_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = trained(tmp_path, "tensorboard")
    events = EventAccumulator(str(made.place / "tensorboard")).Reload()
    scalars = {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars == made.numbers
    assert {"config/text_summary", "samples/text_summary"} <= set(events.Tags()["tensors"])


@pytest.mark.skipif(not find_spec("trackio"), reason="needs trackio")
def test_trackio_has_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    made = trained(tmp_path, "trackio")
    code = (
        "import json\nfrom trackio.sqlite_storage import SQLiteStorage as S\n"
        "print(json.dumps([S.get_logs('rlora', 'run-abc123'), S.get_run_config('rlora', 'run-abc123')], default=str))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    logs, config = json.loads(out.stdout)
    found = {name: [(each["step"], each[name]) for each in logs if name in each] for name in made.numbers}
    assert found == {name: [tuple(each) for each in values] for name, values in made.numbers.items()}
    assert config["model"] == "-"
    assert any("samples" in each for each in logs)


@pytest.mark.skipif(not find_spec("mlflow"), reason="needs mlflow")
def test_mlflow_has_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    made = trained(tmp_path, "mlflow")
    code = """
import json
from mlflow import MlflowClient

client = MlflowClient()
(experiment,) = [each for each in client.search_experiments() if each.name == "rlora"]
(run,) = client.search_runs([experiment.experiment_id])
history = client.get_metric_history
metrics = {name: [(e.step, e.value) for e in history(run.info.run_id, name)] for name in run.data.metrics}
samples = [each.path for each in client.list_artifacts(run.info.run_id, "samples")]
print(json.dumps([metrics, run.info.status, run.data.params["model"], run.data.tags["accuracy/after"], samples]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    metrics, *others = json.loads(out.stdout)
    assert {name: [tuple(each) for each in values] for name, values in metrics.items()} == made.numbers
    assert others == ["FINISHED", "-", "0.9", ["samples/000000.json", "samples/000002.json", "samples/000004.json"]]


def records(file: Path) -> Iterator[bytes]:
    """Of a .wandb file: a header of 7 bytes, then LevelDB's log format, blocks of 32 KiB of pieces of records."""
    content, record = file.read_bytes(), b""
    for start in range(0, len(content), 32768):
        block, place = content[start : start + 32768], 7 if start == 0 else 0
        while len(block) - place >= 7:
            length, kind = struct.unpack_from("<HB", block, place + 4)
            if kind == 0:
                break
            record += block[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or its last piece
                yield record
                record = b""


@pytest.mark.skipif(not find_spec("wandb"), reason="needs wandb")
def test_wandb_has_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    made = trained(tmp_path, "wandb")
    from wandb.proto import wandb_internal_pb2

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((made.place / "wandb").glob("offline-run-*-abc123/run-abc123.wandb")):
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") != "history":
                continue
            items = {
                item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item
            }
            for name in made.numbers:
                if name in items:
                    found.setdefault(name, []).append((int(items["_step"]), float(json.loads(items[name]))))
    assert found == made.numbers
