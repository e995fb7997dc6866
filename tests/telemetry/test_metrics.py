import json
import re
from dataclasses import replace
from typing import Any

import pytest
from conftest import ROOT, episode, group

from rlora.records import STATUSES, Adapter, Receipt, SaveStats, UpdateStats
from rlora.rollout.requests import FleetStats
from rlora.rollout.stream import Collection
from rlora.telemetry.metrics import Metrics, sparkline, summarise

GROUPS = (
    group([1], episode([2, 3], 1.0), episode([4], 0.0)),
    group([1], episode([2, 3, 4], 0.0), episode([5, 6], 0.0)),
)
ADAPTER = Adapter("run", 1, b"{}", (2).to_bytes(8, "little") + b"{}")
UPDATE = UpdateStats(0.5, 0.1, 5e-4, 0.001, 0.0, tokens=3, seconds=2.0, skipped_in_a_row=0)


def test_metrics_by_hand() -> None:
    assert summarise(GROUPS, version=3) == {
        "reward/mean": 0.25,
        "reward/std": pytest.approx(0.4330127),
        "reward/max": 1.0,
        "reward/min": 0.0,
        "reward/informative_groups": 0.5,
        "completion/length": 2.0,
        "completion/truncated": 0.0,
        "completion/tokens": 8,
        "completion/env_tokens": 0,
        **{f"status/{name}": 0.0 for name in STATUSES},
        "staleness": 3.0,
    }


def log(*steps: int, update: UpdateStats = UPDATE) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    with Metrics(10) as metrics:
        metrics.start(steps[0], FleetStats(engines=1, busy_seconds=1.0, canaries={}, lost=0, replayed=0))
        for busy, step in enumerate(steps, start=1):
            with metrics.timed("swap"):
                pass
            collection = Collection(GROUPS, GROUPS, reward_seconds=0.1, late=0, stale=0)
            canaries = {"run": 0.1, "other": 0.2}
            fleet = FleetStats(engines=1, busy_seconds=1.0 + 4.0 * busy, canaries=canaries, lost=0, replayed=0)
            receipts, saved = [Receipt("", 0.01, 0.02)], SaveStats(0.01, 5000)
            lines.append(
                metrics.log(step, receipts, collection, update, fleet, saved, ADAPTER, {"accuracy/held_out": 0.5})
            )
    return [json.loads(json.dumps(line)) for line in lines]


def test_one_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    lines = log(0, 1, 2)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["rollout/tokens_per_second"] == 2.0
    assert lines[0]["learner/tokens_per_second"] == 1.5
    assert lines[0]["kl/behaviour"] == 0.001
    assert lines[0]["adapter"] == ADAPTER.digest
    assert lines[0]["swap/canary"] == 0.1  # of the run's policy, not of the other one
    assert (lines[0]["checkpoint/seconds"], lines[0]["checkpoint/bytes"]) == (0.01, 5000)
    assert 1e7 < lines[0]["memory/driver"] < 1e11
    printed = capsys.readouterr().out.splitlines()
    start = "step 1/10: reward 0.250, length 2.0 tokens, engine 2 tokens/s, learner 2 tokens/s, KL 0.00100, time 0.0 s"
    assert printed[0].startswith(start)
    assert re.search(r", left \d+ s, bottleneck \w+ \d+%$", printed[0])
    assert len(printed[0]) < 160
    advice = [line for line in printed if line.startswith("bottleneck ")]
    assert len(advice) == len({line.split(":")[0] for line in advice}) >= 1  # once per bottleneck


def test_failed_episodes_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failed = replace(episode([2], 0.0), status="error")
    monkeypatch.setitem(globals(), "GROUPS", (group([1], episode([2, 3], 1.0), failed, failed, failed),))
    log(0)
    assert ", errors 75%, time" in capsys.readouterr().out


def test_a_metric_that_is_not_finite_is_null() -> None:
    update = UpdateStats(float("nan"), float("inf"), 5e-4, None, None, 0, 1.0, skipped_in_a_row=1)
    (line,) = log(0, update=update)
    assert (line["loss"], line["grad/norm"], line["kl/behaviour"]) == (None, None, None)
    assert line["learner/tokens_per_second"] is None


def test_every_metric_is_documented() -> None:
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for name in log(0)[0]:
        assert f"`{name}`" in documented, name


def test_sparkline() -> None:
    assert sparkline([0, 1]) == "▁█"
    assert sparkline([3.0]) == "▁"
