"""benchmarks/gpu.py with a tiny model on a CPU: each part runs, and the learner is right."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

BENCHMARK = ROOT / "benchmarks" / "gpu.py"


@pytest.mark.vllm
def test_each_part_runs_on_a_cpu():
    command = [sys.executable, str(BENCHMARK), "--device", "cpu"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout
    found = json.loads(out.splitlines()[-1])
    assert found["correct"]["as_expected"], found["correct"]["rows"]
    assert found["correct"]["rows"][1]["logprobs, mean difference"] > 0  # bf16 rounds, so the comparison is of two
    assert found["attention"]["kernels"]
    assert found["profile"]["launches"] > 0
    assert {row["side"] for row in found["speed"]["rows"]} == {"rlora", "rlora, checkpointing", "peft"}
    assert all(row["fresh, tokens/s"] > 0 for row in found["speed"]["rows"])
    assert [row["rank"] for row in found["engine"]["rows"]] == [1, 8]
    assert all(row["swap_median_s"] > 0 and row["canary_furthest_nats"] < 0.1 for row in found["engine"]["rows"])
    assert found["whole"]["rows"][0]["time/step"] > 0
    assert "learner on CPU" in found["whole"]["placed"]


def test_a_machine_without_a_gpu_is_told_so():
    run = subprocess.run(
        [sys.executable, str(BENCHMARK)], check=False, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert run.returncode == 2
    assert "--device cpu" in run.stderr
