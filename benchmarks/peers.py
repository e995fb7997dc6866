"""TRL + PEFT compared with rlora: the same training on this machine, one after the other, in one run.

    .venv/bin/python benchmarks/peers.py            up to 30 steps per side, an hour or more
    .venv/bin/python benchmarks/peers.py --quick    one step per side, without the time to a reward

Both sides train benchmarks/peers.toml: the same base in bf16, the same prompts in the same order, the same groups,
reward, rank-1 adapter on every linear layer (fp32 masters), loss, Adam and constant learning rate, on all cores.
Start-up (imports, loading the model, Ray, vLLM) is not counted for either side. The last line printed is a JSON object.
`step_ratio` is TRL's seconds per step divided by rlora's, over the same first steps. `time_to_reward_ratio` compares
the training seconds up to and including the first step whose mean reward is 0.8; it is null if a side does not reach
that.

TRL runs in a separate environment, .venv-trl, which the first run creates. It samples with transformers' `generate`,
because its vLLM mode does not start on vLLM's CPU build ("'Parameter' object has no attribute 'weight_loader'"). The
sampling and the trained model are then the same, so its ratio is exactly 1 and nothing is clipped. rlora weights each
token by the truncated ratio of learner to engine, omits groups without signal from its update, and saves every version
within its step time; TRL saves nothing.
"""

import argparse
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from rlora import machine
from rlora.config import read
from rlora.plugin import load
from rlora.rollout.stream import prompt_at
from rlora.rollout.task import load_task
from rlora.settings import Config

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path(__file__).with_suffix(".toml")
TRL = ROOT / ".venv-trl"
STEPS = 30  # at most, per side
COMPARED = 3  # first steps, for the seconds per step
TARGET = 0.8  # mean reward of a step, for the time to reward

# The fastest settings for TRL on CPU, of 8 to 128 rows per pass, eager and sdpa attention, with and without bf16
# autocast: eager saves a quarter of the update, autocast a tenth; 128 rows take 18 GiB and are slower.
TRL_MACHINE = {"rows": 32, "attention": "eager", "autocast": True}


@dataclass(frozen=True)
class Side:
    """The measurements of one side, one value per step."""

    seconds: list[float]
    rewards: list[float]  # mean per step
    lengths: list[float]  # mean completion tokens

    def seconds_to_reward(self) -> float | None:
        """Seconds up to and including the first step whose mean reward is TARGET; None if no step reaches it."""
        reached = next((step for step, reward in enumerate(self.rewards) if reward >= TARGET), None)
        return None if reached is None else sum(self.seconds[: reached + 1])


def run(command: list[str | Path]) -> None:
    """Run a command on all cores, with its output on stderr. Raises CalledProcessError if it fails."""
    environment = {"OMP_NUM_THREADS": str(machine.cores()), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=sys.stderr, check=True)


def trl_python() -> Path:
    """The Python of TRL's environment, which is created on first use with rlora's torch and transformers versions."""
    shared = (f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("torch", "transformers"))
    requirements = ["trl==1.16.*", "peft==0.21.2", "datasets", "accelerate", *shared]
    python, complete = TRL / "bin" / "python", TRL / ".complete"
    if not complete.exists() or complete.read_text().split() != requirements:
        run([sys.executable, "-m", "venv", TRL])
        run([python, "-m", "pip", "install", *requirements])
        complete.write_text("\n".join(requirements))
    return python


def describe(config: Config, steps: int) -> dict[str, Any]:
    """The description of the training for the TRL side."""
    task = load_task(config)
    reward = load("reward", config.reward)
    learner, count = config.learner, config.prompts_per_step
    ordered = (prompt_at(task.prompts, index, config.seed) for index in range(steps * count))
    prompts = [{"text": prompt.text, "answer": prompt.answer, "token_ids": prompt.token_ids} for prompt in ordered]
    return TRL_MACHINE | {
        "base": task.base,
        "steps": [prompts[start : start + count] for start in range(0, len(prompts), count)],
        "target": TARGET,
        "reward_file": inspect.getsourcefile(reward),
        "reward_name": reward.__name__,
        "seed": config.seed,
        "group_size": config.group_size,
        "max_tokens": config.sampling.max_tokens,
        "temperature": config.sampling.temperature,
        "rank": learner.rank,
        "alpha": learner.alpha,
        "lr": learner.lr,
        "betas": learner.betas,
        "eps": learner.eps,
        "max_grad_norm": learner.max_grad_norm,
    }


def train_trl(steps: int, scratch: Path) -> Side:
    """Measure TRL, which stops at the first step whose mean reward is TARGET."""
    work, measured = scratch / "work.json", scratch / "measured.json"
    work.write_text(json.dumps(describe(read(CONFIG), steps)))
    run([trl_python(), Path(__file__).with_name("peer_trl.py"), work, measured])
    return Side(**json.loads(measured.read_text()))


def train_rlora(steps: int, scratch: Path) -> Side:
    """Measure the `rlora train` command."""
    directory = scratch / "rlora"
    options = ["--steps", str(steps), "--run-dir", directory, "--evaluate.prompts", "0"]
    run([sys.executable, "-m", "rlora", "train", CONFIG, *options])
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    seconds, rewards, lengths = (
        [row[name] for row in rows] for name in ("time/step", "reward/mean", "completion/length")
    )
    return Side(seconds, rewards, lengths)


def compare(trl: Side, rlora: Side) -> dict[str, Any]:
    """The figures of the JSON line; a ratio is TRL's figure divided by rlora's."""
    compared = min(COMPARED, len(trl.seconds), len(rlora.seconds))
    figures: dict[str, Any] = {"steps_compared": compared}
    for name, side in (("trl", trl), ("rlora", rlora)):
        figures |= {
            f"{name}/seconds_per_step": fmean(side.seconds[:compared]),
            f"{name}/seconds_to_reward": side.seconds_to_reward(),
            f"{name}/seconds": side.seconds,
            f"{name}/rewards": side.rewards,
            f"{name}/completion_lengths": side.lengths,
        }
    ratios = {
        "step_ratio": ratio(figures, "seconds_per_step"),
        "time_to_reward_ratio": ratio(figures, "seconds_to_reward"),
    }
    return ratios | figures


def ratio(figures: Mapping[str, Any], name: str) -> float | None:
    """TRL's figure divided by rlora's; None if one of them is missing."""
    trl, rlora = figures[f"trl/{name}"], figures[f"rlora/{name}"]
    return None if trl is None or rlora is None else trl / rlora


def table(figures: Mapping[str, Any], steps: int) -> Table:
    """The figures as a table."""
    compared = figures["steps_compared"]
    shown = Table("", "TRL + PEFT", "rlora", "TRL / rlora", title="The same training")
    rows = {
        f"seconds per step, mean of the first {compared}": ("seconds_per_step", "step_ratio"),
        f"seconds to a mean reward of {TARGET}": ("seconds_to_reward", "time_to_reward_ratio"),
    }
    for label, (name, ratio_name) in rows.items():
        cells = [figures[f"{side}/{name}"] for side in ("trl", "rlora")]
        shown.add_row(label, *(f"not within {steps} steps" if cell is None else f"{cell:.1f}" for cell in cells),
                      "-" if figures[ratio_name] is None else f"{figures[ratio_name]:.2f}")  # fmt: skip
    for label, name in (("mean reward", "rewards"), ("completion tokens", "completion_lengths")):
        first_last = [figures[f"{side}/{name}"] for side in ("trl", "rlora")]
        shown.add_row(f"{label}, first and last step", *(f"{cell[0]:.2f}, {cell[-1]:.2f}" for cell in first_last), "")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="maximum steps per side (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one step per side")
    options = parser.parse_args()
    steps = 1 if options.quick else options.steps
    with tempfile.TemporaryDirectory() as directory:
        sides = train_trl(steps, Path(directory)), train_rlora(steps, Path(directory))
    figures = compare(*sides)
    Console().print(table(figures, steps))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
