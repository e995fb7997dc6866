"""What each command takes: a dataclass per command, a docstring for each option."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from upath import UPath

from rlora.records import Style
from rlora.settings import Config

NOTHING = Config(model="", env="", reward="")


@dataclass(frozen=True, kw_only=True)
class OverConfig:
    """A command that takes the fields of a config besides its own options (`grammar.split`)."""

    config: tyro.conf.Suppress[tyro.conf.Fixed[Config]] = NOTHING
    changes: tyro.conf.Suppress[tyro.conf.Fixed[Mapping[str, Any]]] = field(default_factory=dict)  # by full names


@dataclass(frozen=True)
class Train(OverConfig):
    """Train a policy. Fields of the config override those of FILE."""

    file: tyro.conf.Positional[Path | None] = None
    """TOML config, such as launch/arithmetic.toml."""
    run_dir: UPath | None = None
    """Directory of the run, local or any URL that fsspec supports; by default a new one under runs/."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the run in --run-dir."""
    resume: UPath | None = None
    """Resume the run in this directory from its newest intact checkpoint, under its own config and the fields that are
    set by name. With FILE: start the run if it does not exist yet."""
    fork: str | None = None
    """Start a new run from RUN@STEP, or from the newest version of RUN, under its config. Any field may be set that the
    saved adapter does not depend on."""


@dataclass(frozen=True)
class Sweep(OverConfig):
    """Train many policies over one base, as members of a sweep. Fields of the config apply to all members."""

    file: tyro.conf.Positional[Path | None] = None
    """TOML config, such as launch/arithmetic.toml, or a file with the tables config, over, members and halving."""
    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Axis of the grid, FIELD=VALUE,VALUE,..., such as learner.rank=1,2,4,8. Several axes are combined."""
    member: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Single member besides those of the grid, NAME:FIELD=VALUE,..."""
    run_dir: Path | None = None
    """Local directory of the sweep; by default a new one under runs/."""
    resume: Path | None = None
    """Resume the sweep in this directory, each member from its newest checkpoint."""
    halve_at: str = ""
    """Steps, such as 12,24, after which only the best configurations continue."""
    keep: float = 0.5
    """Share of the configurations that continues after each step of --halve-at."""


@dataclass(frozen=True)
class Ask:
    """Ask a sweep to pause, resume or drop a member, from its next turn on. Nothing is deleted."""

    member: tyro.conf.Positional[Path]
    """Directory of the member, runs/SWEEP/MEMBER."""


@dataclass(frozen=True)
class Fork:
    """Add a member to a sweep, which starts from a version of another member."""

    source: tyro.conf.Positional[str]
    """Directory of the other member, runs/SWEEP/MEMBER, or MEMBER@STEP; its newest version by default."""
    name: tyro.conf.Positional[str]
    """Name of the new member."""
    changes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Fields that differ, each as FIELD=VALUE, such as learner.lr=1e-4."""


@dataclass(frozen=True)
class Scale:
    """Change the number of engines of a running run, from its next step on."""

    run: tyro.conf.Positional[UPath]
    """Directory of the run."""
    engines: tyro.conf.Positional[int]
    """Number of engines, 1 to the run's engine.max_replicas."""


@dataclass(frozen=True)
class Eval(OverConfig):
    """Answer held-out prompts under an adapter and report pass@k. Any field of the config may be set."""

    source: tyro.conf.Positional[str] = ""
    """RUN or RUN@STEP (the newest version by default), or a TOML config."""
    adapter: Path | None = None
    """Directory of a PEFT adapter to use instead of a run's."""
    base: tyro.conf.FlagCreatePairsOff[bool] = False
    """Use the base without any adapter. A TOML config does so unless --adapter is set."""
    prompts: int | None = None
    """Number of held-out prompts to answer, the first ones; evaluate.prompts by default."""
    samples: int = 1
    """Completions per prompt, n; pass@k is reported for k = 1, 2, 4, ... up to n."""
    temperature: float | None = None
    """Sampling temperature; by default 0 (greedy) for one sample, and sampling.temperature for several."""
    out: Path | None = None
    """File for the completions with their verdicts, as JSON lines; by default <run>/eval-<version>.jsonl or
    eval.jsonl."""


@dataclass(frozen=True)
class Grade:
    """Grade rows of {"gold", "prediction"}: adds "status" and "reward" to each."""

    file: tyro.conf.Positional[Path]
    """JSON lines to grade."""
    out: Path
    """File for the graded rows, with all their fields."""
    reward: str = "rlora.rewards.equivalence:math_answer"
    """Reward function: module:name or path/to/file.py:name."""
    style: Style = "auto"
    """Calling convention of the reward function; `auto` infers it from the names of its parameters."""
    deadline: float = 10.0
    """Time limit in seconds per row; a row that exceeds it has the status timeout."""
    first_deadline: float = 0.0
    """Time limit in seconds for the first row of each process, if longer than --deadline: it may load a model."""
    threshold: float = 1.0
    """Smallest number at which a row counts as correct, if the reward function returns numbers."""
    workers: int = 2
    """Number of processes that grade."""


@dataclass(frozen=True)
class Check(OverConfig):
    """Try the reward functions on gold answers, on other prompts' gold answers and on empty completions. The exit
    status is 1 if a fault is found."""

    source: tyro.conf.Positional[str] = ""
    """TOML config, or the directory of a run."""


@dataclass(frozen=True)
class Show(OverConfig):
    """Show a prompt as the policy reads it, with its special tokens, and what ends the policy's message."""

    what: tyro.conf.Positional[Literal["prompt"]] = "prompt"
    """What to show."""
    source: tyro.conf.Positional[str] = ""
    """Directory of a run, or a TOML config."""
    number: int = 0
    """Index of the training prompt, from 0."""


@dataclass(frozen=True)
class Plan(OverConfig):
    """Predict a run's memory and about how long a step takes, and what to change if it does not fit."""

    source: tyro.conf.Positional[str] = ""
    """TOML config, or the directory of a run."""
    gpu: str | None = None
    """Kind of GPU, such as h100-80; by default the GPUs of this machine."""
    gpus: int = 1
    """Number of GPUs."""


@dataclass(frozen=True)
class Export:
    """Write an adapter of a run in PEFT's format, or the model with the adapter merged in, and a model card."""

    run: tyro.conf.Positional[str]
    """RUN or RUN@STEP; the newest version by default."""
    to: Path
    """Directory to write, which must not exist yet."""
    merge: tyro.conf.FlagCreatePairsOff[bool] = False
    """Add the adapter to the base's weights and write all of them."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Data type of merged weights. The default, bfloat16, loses part of a small update and reports how much. An adapter
    is always written in fp32."""


@dataclass(frozen=True)
class Replay(OverConfig):
    """Recompute updates of a run from its checkpoints, and report whether each is equal bit for bit. Any field of the
    config may be set, such as another loss."""

    run: tyro.conf.Positional[str] = ""
    """RUN or RUN@STEP."""
    step: int | None = None
    """Update to recompute, from version STEP to STEP + 1, as in RUN@STEP; by default all whose checkpoints are kept."""


@dataclass(frozen=True)
class Runs:
    """List runs: status, steps, best mean reward, and the run that each was forked from."""

    directory: tyro.conf.Positional[UPath] = field(default_factory=lambda: UPath("runs"))
    """Directory that contains the runs, or a sweep."""
    plot: Path | None = None
    """For a sweep: file for a picture of the members' curves, and of their rewards by learning rate and rank."""


@dataclass(frozen=True)
class Submit:
    """Train on a Ray cluster, as one of its jobs. Arguments of `rlora train` may follow FILE.

    It sends the working directory, follows the job, and exits with its status. Ctrl-C asks whether to stop the job.
    """

    file: tyro.conf.Positional[Path | None] = None
    """TOML config in the working directory."""
    address: str | None = None
    """Dashboard of the head node, http://HOST:8265; by default RAY_ADDRESS, or the cluster on this machine."""
    working_dir: Path = Path()
    """Directory to send, at most 100 MiB without the files that its .gitignore names; the job runs in a copy."""
    entrypoint_cpus: float = 1.0
    """Ray CPUs for the process of `rlora train`; engines and learners reserve their own."""
    entrypoint_gpus: float = 0.0
    """Ray GPUs for the process of `rlora train`, which does not compute."""
    name: str | None = None
    """Id of the job; Ray generates one by default."""
    detach: tyro.conf.FlagCreatePairsOff[bool] = False
    """Return after the job is submitted."""
    follow: str | None = None
    """Follow this job, submitted earlier, instead of submitting one."""


@dataclass(frozen=True)
class Jobs:
    """List the jobs that rlora has submitted to a Ray cluster."""

    address: str | None = None
    """Dashboard of the head node, http://HOST:8265; by default RAY_ADDRESS, or the cluster on this machine."""
    stop: str | None = None
    """Ask this job to stop, instead of listing jobs."""


AnyOverConfig = TypeVar("AnyOverConfig", Train, Sweep, Eval, Check, Show, Plan, Replay)
