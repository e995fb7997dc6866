"""SFT and DPO as whole commands, on real Ray and without an engine."""

import json
from pathlib import Path

import pytest
from commands import metrics, rlora
from conftest import exit_status

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("nothing_stays_behind")]
TOML = """
model = "demo:smollm2-135m"
env = "rlora.envs.examples:Examples"
env_args = {{ path = "{path}", held_out_share = 0.2 }}
steps = 4
prompts_per_step = 4
algorithm = {{ name = "{name}" }}
sampling = {{ max_tokens = 16, max_prompt_tokens = 48 }}
learner = {{ lr = 1e-3 }}
evaluate = {{ prompts = 8, every = 2 }}
"""


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_run_learns_resumes_and_replays(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": f"What is {a} + {b}?"}
        | ({"completion": str(a + b)} if name == "sft" else {"chosen": str(a + b), "rejected": str(a + b + 1)})
        for a in range(1, 7)
        for b in range(1, 7)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, run = tmp_path / "run.toml", tmp_path / "run"
    file.write_text(TOML.format(path=tmp_path / "rows.jsonl", name=name))
    done = rlora("train", str(file), "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    assert "engine on" not in done.stdout
    lines, summary = metrics(run), json.loads((run / "summary.json").read_text())
    assert [line.get("held_out/version") for line in lines] == [0, None, 2, None]
    if name == "sft":
        assert summary["held_out/nll/after"] < 0.5 * summary["held_out/nll/before"]
    else:
        assert summary["held_out/margin/after"] > summary["held_out/margin/before"] == 0
    assert all(line["engine/count"] == 0 and line["completion/tokens"] > 0 for line in lines)
    assert exit_status("train", "--resume", str(run), "--steps", "5") == 0
    assert exit_status("replay", str(run)) == 0
    assert "5 of 5 updates bit for bit" in capsys.readouterr().out
