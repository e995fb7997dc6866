"""rlora's losses compared with TRL's code: value and gradient on the same episodes.

    .venv/bin/python benchmarks/losses.py

The episodes are random and of unequal length, some of them truncated, with many tokens far off policy. Each has
logprobs of the current policy, of the update's start, of the engine, and of the reference. TRL's
`GRPOTrainer._compute_loss` runs on these logprobs in TRL's environment (see `peers.py`). Prints a table and, as its
last line, a JSON object: for each case the difference of the losses (`<case>/loss`), and the largest difference of the
gradients with respect to the logprobs, relative to the largest gradient (`<case>/gradient`). Exits with status 1 if
one is above 1e-5.
"""

import json
import math
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers import run, trl_python
from rich.console import Console
from rich.table import Table

from rlora.config import validate
from rlora.core.batch import microbatches, sample_of
from rlora.core.objectives import objective_of
from rlora.core.policy import Outputs
from rlora.records import Episode, Group, Prompt, Version
from rlora.settings import AlgorithmConfig

MAX_TOKENS, PROMPTS, G = 12, 3, 4
# rlora's settings, and TRL's equivalents
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"name": "grpo"}, {"loss_type": "grpo"}),
    "grpo, kl": ({"name": "grpo", "kl": 0.05}, {"loss_type": "grpo", "beta": 0.05}),
    "dr-grpo": ({"name": "dr-grpo"}, {"loss_type": "dr_grpo", "scale_rewards": False}),
    "dapo": ({"name": "dapo"}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo, dual clip, no cut-off ones": (
        {"name": "dapo", "dual_clip": 1.5, "truncated": "drop"},
        {"loss_type": "dapo", "epsilon_high": 0.28, "delta": 1.5, "mask_truncated": True},
    ),
    "gspo": (
        {"name": "gspo", "clip_low": 0.1, "clip_high": 0.15},
        {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.15, "level": "sequence", "correction": "sequence"},
    ),
    "cispo": ({"name": "cispo", "clip_high": 0.5}, {"loss_type": "cispo", "epsilon_high": 1.5}),
}


def main() -> None:
    groups, logprobs = episodes()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        work, measured = Path(directory) / "work.json", Path(directory) / "measured.json"
        rewards = [[episode.reward for episode in group.episodes] for group in groups]
        cut = [[episode.finish_reason == "length" for episode in group.episodes] for group in groups]
        settings = {name: trl for name, (_, trl) in CASES.items()}
        work.write_text(
            json.dumps({"cases": settings, "rewards": rewards, "cut": cut, "max_tokens": MAX_TOKENS, **logprobs})
        )
        run([trl_python(), Path(__file__).with_name("peer_losses.py"), work, measured])
        theirs = json.loads(measured.read_text())
    table = Table("case", "loss", "TRL's", "difference", "of the gradient")
    for name, (settings_of_ours, _) in CASES.items():
        loss, gradient = ours(groups, logprobs, settings_of_ours)
        of_trl = theirs[name]
        largest = max(abs(g) for g in of_trl["gradient"])
        off = max(abs(a - b) for a, b in zip(gradient, of_trl["gradient"], strict=True)) / largest
        figures[f"{name}/loss"], figures[f"{name}/gradient"] = abs(loss - of_trl["loss"]), off
        table.add_row(name, f"{loss:.7f}", f"{of_trl['loss']:.7f}", f"{abs(loss - of_trl['loss']):.1e}", f"{off:.1e}")
    Console().print(table)
    print(json.dumps(figures))
    sys.exit(max(figures.values()) > 1e-5)


def episodes() -> tuple[list[Group], dict[str, list[list[float]]]]:
    """Groups, and by policy the logprobs of each episode, one list of floats per episode, in order."""
    draw = random.Random(0)
    groups, logprobs = [], {name: [] for name in ("now", "start", "behaviour", "reference")}  # type: ignore[var-annotated]
    for _ in range(PROMPTS):
        of_group = []
        for _ in range(G):
            length = draw.randint(2, MAX_TOKENS)
            now = [math.log(draw.uniform(0.05, 0.9)) for _ in range(length)]
            logprobs["now"].append(now)
            for name, spread in (("start", 0.4), ("behaviour", 0.6), ("reference", 1.0)):
                logprobs[name].append([x + draw.gauss(0, spread) for x in now])
            reason = "length" if draw.random() < 0.25 else "stop"
            reward = float(draw.random() < 0.5)
            behaviour = tuple(logprobs["behaviour"][-1])
            of_group.append(Episode((7,) * length, behaviour, reason, Version("benchmark", 0), reward=reward))
        groups.append(Group(Prompt("", token_ids=(5, 6)), tuple(of_group)))
    return groups, logprobs


def ours(
    groups: list[Group], logprobs: dict[str, list[list[float]]], settings: dict[str, Any]
) -> tuple[float, list[float]]:
    """The loss, and its gradient with respect to each token's logprob, in the order of the episodes."""
    table = {"model": "-", "env": "-", "reward": "-", "sampling": {"max_tokens": MAX_TOKENS}, "algorithm": settings}
    algorithm: AlgorithmConfig = validate(table).algorithm
    objective = objective_of(algorithm, MAX_TOKENS)
    weight = objective.weights(groups)
    index_of = dict(zip((id(e) for group in groups for e in group.episodes), range(PROMPTS * G), strict=True))
    loss, gradients = 0.0, {index: torch.zeros(len(row)) for index, row in enumerate(logprobs["now"])}
    for group in groups:
        samples = []
        for episode in filter(objective.learns_from, group.episodes):
            index = index_of[id(episode)]
            fields = {"start_logprobs": logprobs["start"][index]}
            fields |= {"reference_logprobs": logprobs["reference"][index]} if algorithm.kl else {}
            sample = sample_of(group.prompt.token_ids, episode, weight=weight(episode))
            samples.append(
                sample.with_tokens(**{name: torch.tensor(values).double() for name, values in fields.items()})
            )
        advantages = objective.advantages(group, samples)
        credited = [sample.with_tokens(advantages=a) for sample, a in zip(samples, advantages, strict=True)]
        (row,) = microbatches([credited], 1000, torch.float32, torch.device("cpu"))
        indices = [index_of[id(sample.episode)] for sample in row.samples]
        now = torch.tensor([x for index in indices for x in logprobs["now"][index]]).double().requires_grad_()
        total, _ = objective.loss(Outputs(now), row)
        (gradient,) = torch.autograd.grad(total, now)
        loss += total.item()
        gradients |= dict(zip(indices, gradient.split(row.lengths.tolist()), strict=True))
    return loss, torch.cat([gradients[index] for index in range(PROMPTS * G)]).tolist()


if __name__ == "__main__":
    main()
