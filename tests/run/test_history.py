import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import adapter
from upath import UPath

from rlora.rollout.cursor import Cursor
from rlora.rollout.task import Task, load_task
from rlora.run import directory
from rlora.run.checkpoint import Bundle, bundle_path
from rlora.run.history import list_runs
from rlora.settings import Config
from rlora.store import write_directory


@pytest.fixture
def task(config: Callable[..., Config]) -> Task:
    return load_task(config())


def trained(run: UPath, config: Config, task: Task, steps: int, **sources: dict[str, object]) -> None:
    """Write the directory of a run of `steps` steps."""
    directory.create(run, config, task, **sources)
    lines = [{"step": step, "reward/mean": step / 10, "completion/length": 9.5} for step in range(steps)]
    (run / directory.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    bundle = Bundle(directory.Provenance.current(run, task), adapter(steps), b"", Cursor(), config)
    write_directory(bundle_path(run, steps), bundle.files)


def test_the_progress_of_each_run(tmp_path: Path, config: Callable[..., Config], task: Task) -> None:
    path = UPath(tmp_path)
    trained(path / "done", config(steps=3), task, 3)
    directory.summarise(path / "done", {"accuracy/before": 0.25, "accuracy/after": 0.75})
    source: dict[str, object] = {"run": "done", "version": 2, "digest": "00ff", "id": "1"}
    trained(path / "forked", config(steps=9), task, 5, forked_from=source)
    trained(path / "started", config(steps=2), task, 2, started_from=source)
    (path / "no run").mkdir()
    (path / "old").mkdir()
    (path / "old" / "config.toml").write_text("fields = 'of another release'")
    with directory.locked(path / "forked"):
        listed = [(run.name, run.status, run.steps, run.best, run.accuracy, run.origin) for run in list_runs(path)]
    assert listed == [
        ("done", "finished", "3/3", "0.200 at version 2", "0.250 -> 0.750", ""),
        ("forked", "running", "5/9", "0.400 at version 4", "", "done@2"),
        ("old", "not readable", "", "", "", ""),
        ("started", "finished", "2/2", "0.100 at version 1", "", "done@2"),
    ]
    assert [run.status for run in list_runs(path)] == ["finished", "stopped", "not readable", "finished"]
    assert list(list_runs(path / "nowhere")) == []


@pytest.mark.parametrize(
    ("name", "shown"), [("held_out/nll", "nll 1.214 -> 1.010"), ("held_out/accuracy", "1.214 -> 1.010")]
)
def test_runs_on_given_completions_show_their_held_out_figure(
    name: str, shown: str, tmp_path: Path, config: Callable[..., Config], task: Task
) -> None:
    trained(UPath(tmp_path) / "sft", config(steps=2), task, 2)
    directory.summarise(UPath(tmp_path) / "sft", {f"{name}/before": 1.2143, f"{name}/after": 1.0103})
    assert [run.accuracy for run in list_runs(UPath(tmp_path))] == [shown]
