"""TRL + PEFT beside rlora: the same GRPO work on this machine, one after the other, in one run.

    .venv/bin/python benchmarks/peers.py            up to 30 steps a side, an hour or more
    .venv/bin/python benchmarks/peers.py --quick    one step a side; no time to reward

Both sides train benchmarks/peers.toml: the same base in bf16, the same prompts in the same order, the same groups,
reward, rank-1 adapter over every linear layer (fp32 masters), loss, Adam and a constant learning rate, on all cores.
Start-up (imports, loading the model, Ray, vLLM) counts on neither side. The last line printed is one JSON object. In
it, `step_ratio` is TRL's seconds a step over rlora's, over the same first steps; `time_to_reward_ratio` compares the
training seconds up to and including the first step whose mean reward is 0.8, and is null where a side does not get
there.

TRL lives in an environment of its own, .venv-trl, which the first run makes. It samples with transformers' `generate`:
its vLLM path does not start on vLLM's CPU build ("'Parameter' object has no attribute 'weight_loader'"). The model that
sampled is then the one that learns, so its ratio is exactly 1 and nothing is clipped. rlora weighs each token by the
truncated ratio of learner to engine, leaves groups without signal out of its update, and saves every version within
its steps; TRL saves nothing.
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
STEPS = 30  # at most, on each side
COMPARED = 3  # first steps, for the seconds a step
TARGET = 0.8  # mean reward of a step, for the time to reward

# What was fastest for TRL on CPU, of 8 to 128 rows in a pass, eager and sdpa attention, bf16 autocast and none: eager
# saves a quarter of the update and autocast a tenth; 128 rows take 18 GiB and are slower.
TRL_MACHINE = {"rows": 32, "attention": "eager", "autocast": True}


@dataclass(frozen=True)
class Side:
    """What one side measured: a figure a step."""

    seconds: list[float]
    rewards: list[float]  # means
    lengths: list[float]  # mean completion tokens

    def seconds_to_reward(self) -> float | None:
        """Seconds up to and including the first step whose mean reward is TARGET, None where there is none."""
        reached = next((step for step, reward in enumerate(self.rewards) if reward >= TARGET), None)
        return None if reached is None else sum(self.seconds[: reached + 1])


def run(command: list[str | Path]) -> None:
    """Run a command on all cores; what it prints goes to stderr. Raises CalledProcessError where it fails."""
    environment = {"OMP_NUM_THREADS": str(machine.cores()), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=sys.stderr, check=True)


def trl_python() -> Path:
    """The Python of TRL's environment, made on first use with rlora's versions of torch and transformers."""
    shared = (f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("torch", "transformers"))
    requirements = ["trl==1.16.*", "peft==0.21.2", "datasets", "accelerate", *shared]
    python, complete = TRL / "bin" / "python", TRL / ".complete"
    if not complete.exists() or complete.read_text().split() != requirements:
        run([sys.executable, "-m", "venv", TRL])
        run([python, "-m", "pip", "install", *requirements])
        complete.write_text("\n".join(requirements))
    return python


def describe(config: Config, steps: int) -> dict[str, Any]:
    """All that the TRL side has to know of the work."""
    task = load_task(config)
    reward = load("reward", config.reward)
    learner, count = config.learner, config.prompts_per_step
    places = (prompt_at(task.prompts, place, config.seed) for place in range(steps * count))
    prompts = [{"text": prompt.text, "answer": prompt.answer, "token_ids": prompt.token_ids} for prompt in places]
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
    """TRL's figures; it stops at the first step whose mean reward is TARGET."""
    work, measured = scratch / "work.json", scratch / "measured.json"
    work.write_text(json.dumps(describe(read(CONFIG), steps)))
    run([trl_python(), Path(__file__).with_name("peer_trl.py"), work, measured])
    return Side(**json.loads(measured.read_text()))


def train_rlora(steps: int, scratch: Path) -> Side:
    """rlora's figures, of the command that a user runs."""
    directory = scratch / "rlora"
    options = ["--steps", str(steps), "--run-dir", directory, "--evaluate.prompts", "0"]
    run([sys.executable, "-m", "rlora", "train", CONFIG, *options])
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    seconds, rewards, lengths = (
        [row[name] for row in rows] for name in ("time/step", "reward/mean", "completion/length")
    )
    return Side(seconds, rewards, lengths)


def compare(trl: Side, rlora: Side) -> dict[str, Any]:
    """The figures by their names in the JSON line; a ratio is TRL's over rlora's."""
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
    """TRL's figure over rlora's, None where one of them is missing."""
    trl, rlora = figures[f"trl/{name}"], figures[f"rlora/{name}"]
    return None if trl is None or rlora is None else trl / rlora


def table(figures: Mapping[str, Any], steps: int) -> Table:
    """The figures for reading."""
    compared = figures["steps_compared"]
    shown = Table("", "TRL + PEFT", "rlora", "TRL / rlora", title="The same GRPO work")
    rows = {
        f"seconds a step, mean of the first {compared}": ("seconds_per_step", "step_ratio"),
        f"seconds to a mean reward of {TARGET}": ("seconds_to_reward", "time_to_reward_ratio"),
    }
    for label, (name, of) in rows.items():
        cells = [figures[f"{side}/{name}"] for side in ("trl", "rlora")]
        shown.add_row(label, *(f"not within {steps} steps" if cell is None else f"{cell:.1f}" for cell in cells),
                      "-" if figures[of] is None else f"{figures[of]:.2f}")  # fmt: skip
    for label, name in (("mean reward", "rewards"), ("completion tokens", "completion_lengths")):
        first_last = [figures[f"{side}/{name}"] for side in ("trl", "rlora")]
        shown.add_row(f"{label}, first and last step", *(f"{cell[0]:.2f}, {cell[-1]:.2f}" for cell in first_last), "")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps a side at most (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one step a side")
    given = parser.parse_args()
    steps = 1 if given.quick else given.steps
    with tempfile.TemporaryDirectory() as directory:
        sides = train_trl(steps, Path(directory)), train_rlora(steps, Path(directory))
    figures = compare(*sides)
    Console().print(table(figures, steps))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
