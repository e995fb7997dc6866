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
    """Base class of the commands that take fields of the config besides their own options (`grammar.split`)."""

    config: tyro.conf.Suppress[tyro.conf.Fixed[Config]] = NOTHING
    changes: tyro.conf.Suppress[tyro.conf.Fixed[Mapping[str, Any]]] = field(default_factory=dict)  # by full names


@dataclass(frozen=True)
class Train(OverConfig):
    """Train a policy. Each field of the config is an option too, which overrides the field in FILE."""

    file: tyro.conf.Positional[Path | None] = None
    """TOML config, such as launch/arithmetic.toml."""
    run_dir: UPath | None = None
    """Directory of the new run: a local path, or any URL that fsspec supports. By default a new directory in runs/."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Delete the run that is in --run-dir, and start a new run there."""
    resume: UPath | None = None
    """Resume the run in this directory from its newest intact checkpoint. The run keeps its config, except for fields
    that are set by options. With FILE: start the run if the directory contains none; if it does, FILE must agree with
    the run's config."""
    fork: str | None = None
    """Start a new run from version STEP of a run (RUN@STEP), or from the newest version (RUN). The new run has the
    config of the existing run, except for fields that are set by options. Base, rank, scale and matrices of the adapter
    can't be changed."""


@dataclass(frozen=True)
class Sweep(OverConfig):
    """Train many policies over one base, as members of a sweep. Each member is a run with a directory of its own. Each
    field of the config is an option too, and applies to all members."""

    file: tyro.conf.Positional[Path | None] = None
    """TOML config, such as launch/arithmetic.toml, or a file with the tables config, over, members and halving."""
    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Field of the config and its values, FIELD=VALUE,VALUE,..., such as learner.rank=1,2,4,8. If the option is
    repeated, the sweep has a member for each combination of the values."""
    member: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Additional member and the fields that differ in it, NAME:FIELD=VALUE,... The option can be repeated."""
    run_dir: Path | None = None
    """Local directory of the new sweep. By default a new directory in runs/."""
    resume: Path | None = None
    """Resume the sweep in this directory, each member from its newest checkpoint."""
    halve_at: str = ""
    """Steps, such as 12,24, after which only the best configurations continue (successive halving). Members that differ
    only in the seed are one configuration. By default all members do all steps."""
    keep: float = 0.5
    """Share of the configurations, above 0 and below 1, that continues after each step of --halve-at, rounded up."""


@dataclass(frozen=True)
class Ask:
    """Ask a sweep to pause (`rlora pause`), resume (`rlora go`) or drop (`rlora drop`) a member. The sweep carries out
    the request before its next step, or once the sweep is resumed. The member's files are kept."""

    member: tyro.conf.Positional[Path]
    """Directory of the member, such as runs/SWEEP/MEMBER."""


@dataclass(frozen=True)
class Fork:
    """Add a member to a sweep, starting from a version of another member."""

    source: tyro.conf.Positional[str]
    """Directory of the other member, such as runs/SWEEP/MEMBER, whose newest version is used, or
    runs/SWEEP/MEMBER@STEP for version STEP."""
    name: tyro.conf.Positional[str]
    """Name of the new member."""
    changes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Fields of the config in which the new member differs from the other one, each as FIELD=VALUE, such as
    learner.lr=1e-4."""


@dataclass(frozen=True)
class Scale:
    """Change the number of engines of a running run, from its next step on."""

    run: tyro.conf.Positional[UPath]
    """Directory of the run."""
    engines: tyro.conf.Positional[int]
    """Number of engines, 1 to the run's engine.max_replicas."""


@dataclass(frozen=True)
class Eval(OverConfig):
    """Answer held-out prompts with an adapter and report pass@k. Each field of the config is an option too."""

    source: tyro.conf.Positional[str] = ""
    """Directory of a run: RUN for the newest version, RUN@STEP for version STEP. Or a TOML config."""
    adapter: Path | None = None
    """Directory of an adapter in PEFT's format, which is evaluated instead of a version of a run."""
    base: tyro.conf.FlagCreatePairsOff[bool] = False
    """Evaluate the base without an adapter. This is the default for a TOML config."""
    prompts: int | None = None
    """Number of held-out prompts to answer, the first ones that the env returns. By default evaluate.prompts."""
    samples: int = 1
    """Completions per prompt, n; pass@k is reported for k = 1, 2, 4, ... up to n."""
    temperature: float | None = None
    """Sampling temperature, 0.01 or more, or 0 for greedy decoding. By default greedy decoding for one sample, and
    sampling.temperature for several. sampling.top_k, top_p and min_p apply unless decoding is greedy."""
    out: Path | None = None
    """File for the completions with rewards and statuses, as JSON lines. By default RUN/eval-VERSION.jsonl, or
    eval.jsonl in the working directory if no version of a run is evaluated."""


@dataclass(frozen=True)
class Grade:
    """Grade answers in a file. Adds "status" and "reward" to each row with "gold" (reference answer) and
    "prediction"."""

    file: tyro.conf.Positional[Path]
    """File to grade: JSON lines, each an object with "gold" and a text "prediction"."""
    out: Path
    """File for the graded rows, with all their fields."""
    reward: str = "rlora.rewards.equivalence:math_answer"
    """Reward function: module:name or path/to/file.py:name."""
    style: Style = "auto"
    """Calling convention of the reward function (docs/rewards.md). `auto` infers the convention from the function's
    parameter names and source."""
    deadline: float = 10.0
    """Time limit in seconds per row; a row that exceeds it has the status timeout."""
    first_deadline: float = 0.0
    """Time limit in seconds for the first row in each process, in which the function may load a model. Values below
    --deadline, such as the default, have no effect."""
    threshold: float = 1.0
    """Smallest number from which a row counts as correct, if the reward function returns numbers."""
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
    """Show a prompt as the policy reads it, with special tokens, and the tokens and strings that end the policy's
    message."""

    what: tyro.conf.Positional[Literal["prompt"]] = "prompt"
    """What to show."""
    source: tyro.conf.Positional[str] = ""
    """Directory of a run, or a TOML config."""
    number: int = 0
    """Index of the training prompt, from 0."""


@dataclass(frozen=True)
class Plan(OverConfig):
    """Predict the memory and the time per step of a run, and what to change if the run does not fit."""

    source: tyro.conf.Positional[str] = ""
    """TOML config, or the directory of a run."""
    gpu: str | None = None
    """Kind of GPU, such as h100-80; an unknown kind prints the list. By default this machine's kind of GPU, or its CPU
    if it has no GPU."""
    gpus: int = 1
    """Number of GPUs to plan for."""


@dataclass(frozen=True)
class Export:
    """Write an adapter of a run in PEFT's format, or the model with the adapter merged in, and a model card."""

    run: tyro.conf.Positional[str]
    """Directory of a run: RUN for the newest version, RUN@STEP for version STEP."""
    to: Path
    """Directory to write, which must not exist yet."""
    merge: tyro.conf.FlagCreatePairsOff[bool] = False
    """Add the adapter to the base's weights, and write a model instead of an adapter."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Data type of merged weights (--merge). `bfloat16`, the default, rounds away part of a small update, and the
    command reports how much. `float32` keeps the update. An adapter is always written in fp32."""


@dataclass(frozen=True)
class Report:
    """Write one HTML page about runs: curves, update of the weights, completions, config and lineage. The page needs no
    network."""

    runs: tyro.conf.Positional[tuple[UPath, ...]]
    """Directories of runs or of sweeps. Several runs are drawn in the same charts."""
    out: Path = Path("report.html")
    """File to write."""
    episodes_mib: float = 4.0
    """Limit in MiB for the completions on the page, compressed. Evenly spaced steps are selected that fit. `0` leaves
    the completions out."""
    watch: float | None = None
    """Write the page again after each step, until all runs are finished. The value is the number of seconds between two
    checks, after which an open page also loads itself again."""


@dataclass(frozen=True)
class Replay(OverConfig):
    """Recompute updates of a run from its checkpoints, and report whether each is equal bit for bit. Each field of the
    config is an option too, such as a different loss."""

    run: tyro.conf.Positional[str] = ""
    """Directory of a run: RUN for all updates, RUN@STEP for the update that starts from version STEP."""
    step: int | None = None
    """Version from which the update to recompute starts, as in RUN@STEP. By default all updates are recomputed whose
    checkpoints before and after the update are kept."""


@dataclass(frozen=True)
class Runs:
    """List runs: status, steps, best mean reward, and the run and version that each comes from."""

    directory: tyro.conf.Positional[UPath] = field(default_factory=lambda: UPath("runs"))
    """Directory that contains the runs, or a sweep."""
    plot: Path | None = None
    """For a sweep: image file for the members' reward curves, and for their rewards by learning rate and rank."""


@dataclass(frozen=True)
class Submit:
    """Train on a Ray cluster, as one of its jobs. Arguments of `rlora train` may follow FILE.

    The command sends the working directory, prints the job's output until the job ends, and exits with 0 if the job
    succeeded, else with 1. Ctrl-C asks whether to stop the job.
    """

    file: tyro.conf.Positional[Path | None] = None
    """TOML config in the working directory."""
    address: str | None = None
    """Address of the dashboard of the cluster's head node, http://HOST:8265. By default the environment variable
    RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or the cluster on this machine."""
    working_dir: Path = Path()
    """Directory to send, at most 100 MiB without the files that a .gitignore in it names. The job runs in a copy."""
    entrypoint_cpus: float = 1.0
    """Number of Ray CPUs for the process of `rlora train`; engines and learners reserve their own."""
    entrypoint_gpus: float = 0.0
    """Number of Ray GPUs for the process of `rlora train`. The default is 0, because the process does not compute."""
    name: str | None = None
    """Id of the job. By default Ray generates an id."""
    detach: tyro.conf.FlagCreatePairsOff[bool] = False
    """Exit after the job is submitted, without following the job."""
    follow: str | None = None
    """Id of a job that was submitted earlier, whose output is printed; no job is submitted."""


@dataclass(frozen=True)
class Jobs:
    """List the jobs that rlora has submitted to a Ray cluster."""

    address: str | None = None
    """Address of the dashboard of the cluster's head node, http://HOST:8265. By default the environment variable
    RAY_API_SERVER_ADDRESS or RAY_ADDRESS, or the cluster on this machine."""
    stop: str | None = None
    """Id of a job to stop, instead of listing jobs. A run in the job saves its state first."""


@dataclass(frozen=True)
class Completion:
    """Print the script by which a shell completes commands, options and fields of the config."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "tcsh"]]
    """The shell."""


COMMANDS: dict[str, type] = {
    "train": Train, "sweep": Sweep, "pause": Ask, "go": Ask, "drop": Ask, "fork": Fork, "eval": Eval, "check": Check,
    "plan": Plan, "replay": Replay, "runs": Runs, "report": Report, "export": Export, "grade": Grade, "show": Show,
    "scale": Scale, "submit": Submit, "jobs": Jobs, "completion": Completion,
}  # fmt: skip

AnyOverConfig = TypeVar("AnyOverConfig", Train, Sweep, Eval, Check, Show, Plan, Replay)
