"""What runs there are, and what to say of an adapter that one of them made."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import tomli_w
from upath import UPath

from rlora import runs
from rlora.checkpoint import Bundle, versions
from rlora.config import read
from rlora.metrics import sparkline
from rlora.records import RloraError


@dataclass(frozen=True)
class Past:
    """A run, as far as it has come."""

    name: str
    status: str  # running, finished, stopped or not readable
    steps: str  # done, of all
    best: str  # mean reward of a step, and which
    accuracy: str  # before and after, on held-out prompts
    origin: str  # what it was forked from


def past_runs(directory: UPath) -> Iterator[Past]:
    """The runs in a directory, by name."""
    for run in sorted(directory.iterdir(), key=lambda path: path.name) if directory.is_dir() else ():
        if (run / runs.CONFIG).exists():
            yield _past(run)


def _past(run: UPath) -> Past:
    try:
        config, origin = read(run / runs.CONFIG), runs.Origin.of(run)
    except RloraError:  # another release wrote it
        return Past(run.name, "not readable", "", "", "", "")
    done, summary = max(versions(run), default=0), runs.summary(run)
    status = "running" if runs.is_held(run) else "finished" if done >= config.steps else "stopped"
    lines = map(json.loads, runs.whole_lines(run))
    rewards = {line["step"]: line["reward/mean"] for line in lines if line["reward/mean"] is not None}
    best = max(rewards, key=lambda step: rewards[step], default=None)
    accuracy = [f"{summary[name]:.3f}" for name in ("accuracy/before", "accuracy/after") if name in summary]
    return Past(
        name=run.name,
        status=status,
        steps=f"{done}/{config.steps}",
        best="" if best is None else f"{rewards[best]:.3f} in step {best}",
        accuracy=" -> ".join(accuracy),
        origin="{run}@{version}".format(**origin.forked_from) if origin.forked_from else "",
    )


def card(run: UPath, bundle: Bundle, merged: str | None = None) -> str:
    """The model card of a version: its base, config, data and curve, with the metadata that model hubs read.

    `merged` is the dtype of the weights that it was merged into; without one it is of the adapter.
    """
    config = bundle.config
    before = [line for line in map(json.loads, runs.whole_lines(run)) if line["step"] < bundle.version]
    curve = [line["reward/mean"] or 0.0 for line in before]
    shown = before[:: max(1, len(before) // 10)]
    tags = ["lora", "reinforcement-learning", "rlora", config.algorithm.name]
    library = "transformers" if merged or config.learner.whole else "peft"
    head = {"base_model": config.model, "library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    return "\n".join([
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in head.items()),  # JSON is YAML
        "---",
        f"# {run.name}, version {bundle.version}",
        "",
        f"`{config.model}` after reinforcement learning with a low-rank policy, by rlora.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(run, bundle, merged).items()),
        "",
        "## Mean reward by step",
        "",
        *(["```", sparkline(curve, width=len(curve)), "```", ""] if curve else []),
        "| step | mean reward | completion tokens |",
        "|---|---|---|",
        *(f"| {line['step']} | {line['reward/mean'] or 0.0:.3f} | {line['completion/length']:.1f} |" for line in shown),
        "",
        "## Config",
        "",
        "```toml",
        tomli_w.dumps(asdict(config)).strip(),
        "```",
        "",
    ])  # fmt: skip


def _facts(run: UPath, bundle: Bundle, merged: str | None) -> dict[str, str]:
    config, adapter, learner, summary = bundle.config, bundle.adapter, bundle.config.learner, runs.summary(run)
    kind = f"rank-{learner.rank} LoRA adapter (alpha {learner.alpha:g}, {learner.targets})"
    what = "model, all weights" if learner.whole else kind
    facts = {
        "base": f"`{config.model}`",
        "what it is": f"{what}, {adapter.parameters:,} parameters" + (f", merged in {merged}" if merged else ""),
        "algorithm": config.algorithm.name,
        "data": f"`{config.env}` {json.dumps(config.env_args)}",
        "reward": ", ".join(f"`{reward}`" for reward in config.rewards),
        "trained": f"{bundle.version} steps of {config.prompts_per_step} prompts x {config.group_size} completions, "
        f"learning rate {learner.lr}, seed {config.seed}",
        "made with": ", ".join(f"{name} {version}" for name, version in bundle.origin.packages.items()),
        "SHA-256": f"`{adapter.digest}`",
    }
    if fork := bundle.origin.forked_from:
        facts["forked from"] = f"`{fork['run']}@{fork['version']}` (`{fork['digest'][:12]}`)"
    if summary.get("steps") == bundle.version and "accuracy/after" in summary:
        facts["accuracy"] = (
            f"{summary['accuracy/before']:.3f} before, {summary['accuracy/after']:.3f} after, greedily on "
            f"{summary['accuracy/prompts']} held-out prompts"
        )
    return facts
