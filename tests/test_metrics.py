import json
from pathlib import Path

import pytest
from conftest import episode, group

from rlora.delivery import FleetStats
from rlora.metrics import Metrics, sparkline, summarise
from rlora.records import STATUSES, Proof, UpdateStats
from rlora.rollout import Collection

GROUPS = (
    group([1], episode([2, 3], 1.0), episode([4], 0.0)),
    group([1], episode([2, 3, 4], 0.0), episode([5, 6], 0.0)),
)
UPDATE = UpdateStats(0.5, 0.1, 5e-4, 0.001, 0.0, tokens=3, seconds=2.0, skipped_in_a_row=0)


def test_figures_by_hand() -> None:
    assert summarise(GROUPS, version=3) == {
        "reward/mean": 0.25,
        "reward/max": 1.0,
        "reward/informative_groups": 0.5,
        "completion/length": 2.0,
        "completion/truncated": 0.0,
        "completion/tokens": 8,
        "completion/env_tokens": 0,
        **{f"status/{name}": 0.0 for name in STATUSES},
        "staleness": 3.0,
    }


def log(path: Path, *steps: int, update: UpdateStats = UPDATE) -> None:
    with Metrics(path, steps=10) as metrics:
        metrics.start(steps[0], FleetStats(engines=1, busy_seconds=1.0, canary=None, lost=0, replayed=0))
        for busy, step in enumerate(steps, start=1):
            with metrics.timed("swap"):
                pass
            collection = Collection(GROUPS, GROUPS, reward_seconds=0.1, late=0, stale=0)
            fleet = FleetStats(engines=1, busy_seconds=1.0 + 4.0 * busy, canary=0.1, lost=0, replayed=0)
            metrics.log(step, [Proof("", 0.01, 0.02)], collection, update, fleet)


def test_a_line_a_step_and_a_resumed_run_does_its_steps_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    log(path, 0, 1, 2)
    log(path, 2, 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[0]["rollout/tokens_per_second"] == 2.0
    assert lines[0]["learner/tokens_per_second"] == 1.5
    assert lines[0]["kl/behaviour"] == 0.001
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 1/10: reward 0.250, completion length 2.0 tokens, engine 2 tokens/s")
    assert "time left" in printed[0]


def test_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    log(
        tmp_path / "m.jsonl",
        0,
        update=UpdateStats(float("nan"), float("inf"), 5e-4, None, None, 0, 1.0, skipped_in_a_row=1),
    )
    line = json.loads((tmp_path / "m.jsonl").read_text())
    assert (line["loss"], line["grad/norm"], line["kl/behaviour"]) == (None, None, None)
    assert line["learner/tokens_per_second"] is None


def test_every_metric_is_documented(tmp_path: Path) -> None:
    log(tmp_path / "m.jsonl", 0)
    documented = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    for name in json.loads((tmp_path / "m.jsonl").read_text()):
        assert f"`{name}`" in documented, name


def test_sparkline() -> None:
    assert sparkline([0, 1]) == "▁█"
    assert sparkline([3.0]) == "▁"
