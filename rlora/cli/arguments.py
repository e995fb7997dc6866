"""What each command takes: a dataclass a command, a docstring for each option."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro
from upath import UPath

from rlora.records import Style
from rlora.settings import Config


@dataclass(frozen=True)
class Train:
    """Train a policy. FILE is a TOML config; every field below overrides what it says."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    file: tyro.conf.Positional[Path | None] = None
    """A TOML config, such as launch/arithmetic.toml."""
    run_dir: UPath | None = None
    """Where the run goes, a directory or any URL that fsspec knows; a fresh directory under runs/ by default."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace the run that is in --run-dir."""
    resume: UPath | None = None
    """Go on with the run that is here, from its newest whole bundle and under its own config. With a FILE it is begun
    where none is here yet."""
    changes: Annotated[tuple[str, ...], tyro.conf.arg(name="set")] = ()
    """With --resume: fields of the config to change, as NAME=VALUE, such as steps=200 learner.lr=1e-4."""
    fork: str | None = None
    """Start a new run from RUN@STEP, or the newest of RUN, under its config and what is given beside it: any field that
    the adapter does not hang on."""


@dataclass(frozen=True)
class Sweep:
    """Train many policies over one base, as members of a sweep. Every field below is of all of them."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    file: tyro.conf.Positional[Path | None] = None
    """A TOML config, such as launch/arithmetic.toml, or a file with tables over, members, halving and config."""
    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An axis, FIELD=VALUE,VALUE,..., such as learner.rank=1,2,4,8; several are combined."""
    member: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A single member, NAME:FIELD=VALUE,..., beside those of the axes."""
    run_dir: Path | None = None
    """Where the sweep goes, a local directory; by default a fresh one under runs/."""
    resume: Path | None = None
    """Go on with the sweep that is here: each member from its newest bundle."""
    halve_at: str = ""
    """Steps, such as 12,24, at which the better configurations go on and the others are dropped."""
    keep: float = 0.5
    """With --halve-at: the share of the configurations that goes on."""


@dataclass(frozen=True)
class Ask:
    """Ask a sweep to pause a member, to go on with it, or to drop it; from its next turn on. Nothing is deleted."""

    member: tyro.conf.Positional[Path]
    """The member's directory, runs/SWEEP/MEMBER."""


@dataclass(frozen=True)
class Fork:
    """Add a member to a sweep, which begins from a version of another."""

    source: tyro.conf.Positional[str]
    """The directory of the other, runs/SWEEP/MEMBER, or MEMBER@STEP; its newest version by default."""
    name: tyro.conf.Positional[str]
    """The new member's name."""
    changes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Fields that differ, each as FIELD=VALUE, such as learner.lr=1e-4."""


@dataclass(frozen=True)
class Scale:
    """Give a run that goes on more engines or fewer, from its next step on."""

    run: tyro.conf.Positional[UPath]
    """The run's directory."""
    engines: tyro.conf.Positional[int]
    """How many, 1 to the run's engine.max_replicas."""


@dataclass(frozen=True)
class Eval:
    """Answer held-out prompts under an adapter, with pass@k. Every field of the config may be given beside SOURCE."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    source: tyro.conf.Positional[str]
    """RUN or RUN@STEP, the newest by default, or a TOML config."""
    adapter: Path | None = None
    """The directory of an adapter in PEFT's format, in place of a run's."""
    base: tyro.conf.FlagCreatePairsOff[bool] = False
    """The base without any adapter; so it is with a TOML config unless --adapter is given."""
    prompts: int | None = None
    """How many held-out prompts to answer, the first ones; evaluate.prompts by default."""
    samples: int = 1
    """Completions a prompt, n: pass@k is told for k = 1, 2, 4, ... up to n."""
    temperature: float | None = None
    """Of the samples; by default 0, greedy, for one and sampling.temperature for several."""
    out: Path | None = None
    """Where completions go with their verdicts, as JSON lines; <run>/eval-<version>.jsonl or eval.jsonl by default."""


@dataclass(frozen=True)
class Grade:
    """Grade rows of {"gold", "prediction"}: adds "status" and "reward"."""

    file: tyro.conf.Positional[Path]
    """JSON lines."""
    out: Path
    """Where the rows go, with all that they had."""
    reward: str = "rlora.rewards.equivalence:math_answer"
    """The reward function: module:name or path/to/file.py:name."""
    style: Style = "auto"
    """Its form, where its parameters' names do not tell it."""
    deadline: float = 10.0
    """Seconds that a row may take; then its status is timeout."""
    first_deadline: float = 0.0
    """Seconds that the first row of each process may take, if more than `deadline`: for what loads a model then."""
    threshold: float = 1.0
    """Where the reward function gives a number, a row is correct from this one on."""
    workers: int = 2
    """Processes that grade."""


@dataclass(frozen=True)
class Check:
    """Try the reward functions on golds, on other prompts' golds and on empty completions; exits with 1 for a fault."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    source: tyro.conf.Positional[str]
    """A TOML config, or the directory of a run."""


@dataclass(frozen=True)
class Show:
    """Show a prompt as the policy reads it, with its special tokens, and what ends its message."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    what: tyro.conf.Positional[Literal["prompt"]]
    """What to show."""
    source: tyro.conf.Positional[str]
    """The directory of a run, or a TOML config."""
    number: int = 0
    """Which of the training prompts, from 0."""


@dataclass(frozen=True)
class Plan:
    """Say what a run would take of memory, about how long a step, and what to change where it does not fit."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    source: tyro.conf.Positional[str]
    """A TOML config, or the directory of a run."""
    gpu: str | None = None
    """A kind of card, such as h100-80; by default what this machine has."""
    gpus: int = 1
    """How many of them."""


@dataclass(frozen=True)
class Export:
    """Write an adapter of a run in PEFT's format, or the whole model with it merged in, and a model card."""

    run: tyro.conf.Positional[str]
    """RUN or RUN@STEP, the newest by default."""
    to: Path
    """The directory to write; it must not be there yet."""
    merge: tyro.conf.FlagCreatePairsOff[bool] = False
    """Add the adapter into the base's weights and write them all."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of merged weights, bfloat16 by default, which loses part of a small update and says how much. An adapter is
    always written in fp32."""


@dataclass(frozen=True)
class Replay:
    """Compute updates of a run again from its bundles, and say whether each comes out bit for bit."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    run: tyro.conf.Positional[str]
    """RUN or RUN@STEP. Fields of the config given beside it, such as another loss, change what is computed."""
    step: int | None = None
    """The update to compute, as in RUN@STEP: that from version STEP to STEP + 1. By default all whose bundles are
    kept."""


@dataclass(frozen=True)
class Runs:
    """List runs: how far they are, their best mean reward, and what they were forked from."""

    directory: tyro.conf.Positional[UPath] = field(default_factory=lambda: UPath("runs"))
    """Where they lie side by side, or a sweep."""
    plot: Path | None = None
    """Of a sweep: draw the curves of its members, and their rewards by learning rate and rank, into this file."""


@dataclass(frozen=True)
class Submit:
    """Train on a Ray cluster, as a job of it. What `rlora train` takes may follow FILE.

    It sends the working directory, follows the job, and exits as the job does. Ctrl-C asks whether to stop it.
    """

    file: tyro.conf.Positional[Path | None] = None
    """A TOML config in the working directory."""
    address: str | None = None
    """The dashboard of the head node, http://HOST:8265; by default RAY_ADDRESS, or the cluster of this machine."""
    working_dir: Path = Path()
    """The directory to send, at most 100 MiB without what its .gitignore names; the job runs in a copy of it."""
    entrypoint_cpus: float = 1.0
    """Ray CPUs for the process of `rlora train` itself; engines and learners reserve their own."""
    entrypoint_gpus: float = 0.0
    """Ray GPUs for that process, which computes nothing."""
    name: str | None = None
    """The job's id; Ray makes one by default."""
    detach: tyro.conf.FlagCreatePairsOff[bool] = False
    """Return once the job is submitted."""
    follow: str | None = None
    """Follow this job, which was submitted before, in place of submitting one."""


@dataclass(frozen=True)
class Jobs:
    """List the jobs that rlora has submitted to a Ray cluster."""

    address: str | None = None
    """The dashboard of the head node, http://HOST:8265; by default RAY_ADDRESS, or the cluster of this machine."""
    stop: str | None = None
    """Ask this job to stop, in place of listing."""


Given = TypeVar("Given", Train, Sweep, Eval, Check, Show, Plan, Replay)
