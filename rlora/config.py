"""One frozen config, read from TOML and the command line. All validation is here."""

import importlib
import importlib.util
import json
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from rlora.records import MAX_RANK, RloraError

# A token's probability would depend on which others were cut off or penalised; the learner could not know it.
_UNLEARNABLE = {"top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}


def _absolute(directory: str) -> str:
    """A local directory from the root, for an actor's working directory is another; anything else as it is."""
    return str(Path(directory).absolute()) if directory and Path(directory).is_dir() else directory


Directory = Annotated[str, AfterValidator(_absolute)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]

_STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True)
class SamplingConfig:
    __pydantic_config__ = _STRICT

    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Temperature of training rollouts; the learner's logprobs use it too."""
    max_tokens: Count = 256
    """Longest completion, in tokens."""
    max_prompt_tokens: Count = 512
    """Longest prompt, in tokens. Longer ones are left out when the data is loaded, and counted."""


@dataclass(frozen=True)
class EngineConfig:
    __pydantic_config__ = _STRICT

    replicas: Count = 1
    """How many engines sample; Ray places each by its resources."""
    cpus: Annotated[float, Field(ge=0)] = 0.5
    """Ray CPUs that a replica reserves. Below 1 by default: engine and learner take turns."""
    gpus: Annotated[float, Field(ge=0)] = 0.5
    """Ray GPUs that a replica reserves for each of its `tensor_parallel_size`, where the cluster has GPUs."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of a replica; 0 shares the cores out over all that compute at once."""
    kv_cache_gib: Count = 2
    """Memory for keys and values of a replica on CPU, in GiB."""
    max_num_seqs: Count = 128
    """Completions that a replica samples at a time."""
    tensor_parallel_size: Count = 1
    """GPUs of a replica."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a GPU's memory that a replica may use."""
    max_replicas: Count = 8
    """The most engines that `rlora scale` may ask for while a run goes on."""
    patience: Positive = 120.0
    """Seconds in which an engine has to take a swap; one that does not is replaced."""
    straggler_seconds: Positive = 120.0
    """Seconds that a step waits for its last groups once half are there; later ones count for later steps, or not."""


@dataclass(frozen=True)
class LearnerConfig:
    __pydantic_config__ = _STRICT

    adapter: Literal["lora", "none"] = "lora"
    """What is trained: a low-rank adapter, or, with `none`, all weights: the baseline, whose lr is a tenth or less."""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 1
    """Rank r of the adapter, 1 to 8: W' = W + (alpha / r) B A. Experts share it, each has at least 1."""
    alpha: Positive = 32.0
    """Scale of the adapter; with alpha / r the best learning rate hardly depends on the rank."""
    targets: Literal["all", "attention", "mlp"] = "all"
    """Which weight matrices it is over; `all` is attention, MLP and experts. Attention alone learns clearly worse."""
    head: bool = False
    """Whether it is over the output head too, where that is not tied to the embeddings."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) in place of alpha / r."""
    init: Literal["uniform", "orthonormal"] = "uniform"
    """How A starts: uniform within 1 / sqrt(d_in), or with orthonormal rows. B starts at 0."""
    start_from: Directory = ""
    """The directory of an adapter in PEFT's format to start from; by default a fresh one, whose policy is the base."""
    lr: Positive = 1e-4
    """Learning rate of Adam."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """Constant, or linear from lr at the first step down to 0 after the last (`steps`; a resumed run may have more)."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: Positive = 1e-12
    """Adam's epsilon; small, because gradients of an adapter can be tiny."""
    max_grad_norm: Positive = 1.0
    """The gradient is scaled down to this norm where it is longer."""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """Cap of the importance ratio p_learner / p_behaviour of a token."""
    microbatch_tokens: Count = 2048
    """Tokens in one forward pass, each prompt's once; lower it where memory is short."""
    checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, up to half more time."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Hold the learner's base in 8 or 4 bit; engines keep `dtype`, and the importance ratio bridges the gap."""
    max_bad_updates: Count = 3
    """Updates in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    replicas: Count = 1
    """How many learners share each update (data-parallel); Ray places each by its resources."""
    shard: bool = False
    """Divide the base's layers among the `replicas`, 2 or more; embeddings and output head stay whole on each."""
    cpus: Annotated[float, Field(ge=0)] = 0.5
    """Ray CPUs that a learner reserves."""
    gpus: Annotated[float, Field(ge=0)] = 0.5
    """Ray GPUs that a learner reserves, where the cluster has GPUs."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of a learner; 0 takes all cores, or its share where `max_staleness` lets engines run beside it."""

    @property
    def whole(self) -> bool:
        """Whether all weights are trained: then there is no adapter."""
        return self.adapter == "none"


@dataclass(frozen=True)
class EvaluateConfig:
    __pydantic_config__ = _STRICT

    prompts: Annotated[int, Field(ge=0)] = 100
    """Held-out prompts, the first that the env gives, to answer greedily before and after training; 0 is none."""
    threshold: float = 1.0
    """A completion counts as correct from this reward on."""


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = _STRICT

    model: Directory
    """The frozen base: a hub id, a local directory, or demo:smollm2-135m."""
    env: str
    """Where prompts come from: module:Name or path/to/file.py:Name."""
    reward: str
    """What scores completions: module:name or path/to/file.py:name."""
    env_args: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments of the env; on the command line also --env-args.NAME VALUE. A file's go with the file's env only."""
    steps: Count = 100
    """Steps to train in all, those before a --resume included; each makes one new adapter version."""
    prompts_per_step: Count = 16
    """Prompts a step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Completions a prompt (G), 2 or more: an advantage is relative to its group's mean."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Versions that an episode may be behind the learner; 0 is on policy, 1 samples while the learner updates."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Times in a row that a lost engine or learner is started again before the run does without it, or stops."""
    seed: int = 0
    """Seed of the order of prompts, the adapter's A, and sampling."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen base, in the engine and in the learner. The adapter's masters and Adam are always fp32."""
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def max_model_len(self) -> int:
        return self.sampling.max_prompt_tokens + self.sampling.max_tokens


_ADAPTER = TypeAdapter(Config)


def read(path: Path) -> Config:
    """The config in a TOML file, or in a run's `config.toml`. Raises RloraError that names each field at fault."""
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise RloraError(f"{path}: can't be read ({error.strerror}); name a TOML file with a config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RloraError(f"{path}: not valid TOML: {error}") from None
    table.pop("provenance", None)  # what made a run; not a setting
    refuse_unlearnable(name for section in (table, table.get("sampling", {})) for name in section)
    return validate(table, f"{path}: ")


def validate(values: Config | dict[str, Any], source: str = "") -> Config:
    """A config whose every value has its type and range. Raises RloraError with a line for each field at fault."""
    table = asdict(values) if isinstance(values, Config) else values
    try:
        config = _ADAPTER.validate_json(json.dumps(table, default=str))  # JSON, like TOML, has lists for tuples
    except ValidationError as error:
        raise RloraError(source + explain(error)) from None
    if config.learner.whole:
        _refuse_beside_all_weights(config, source)
    if config.learner.shard:
        _refuse_to_shard(config.learner, source)
    return config


def _refuse_beside_all_weights(config: Config, source: str) -> None:
    """Raise RloraError for what needs an adapter."""
    for name in ("rank", "alpha", "targets", "head", "rslora", "init", "start_from", "quantise", "shard"):
        if (value := getattr(config.learner, name)) != getattr(LearnerConfig(), name):
            raise RloraError(
                f'{source}learner.{name} = {value!r}: there is no adapter (learner.adapter = "none"); leave it out'
            )
    if config.max_staleness:
        raise RloraError(
            f'{source}max_staleness = {config.max_staleness}: with learner.adapter = "none" an engine holds one '
            "version at a time, so sampling can't overlap with learning; set max_staleness to 0"
        )


def _refuse_to_shard(learner: LearnerConfig, source: str) -> None:
    """Raise RloraError where the base can't be divided."""
    if learner.quantise != "none":
        raise RloraError(
            f"{source}learner.shard = true: a base in {learner.quantise} can't be divided; leave one of learner.shard "
            "and learner.quantise off"
        )
    if learner.replicas == 1:
        raise RloraError(
            f"{source}learner.shard = true: there is one learner, and none to share the base with; set "
            "learner.replicas to 2 or more, each on a GPU of its own"
        )


def refuse_unlearnable(names: Iterable[str]) -> None:
    """Raise RloraError for a sampling option whose distribution the learner could not reproduce."""
    for name in names:
        if name in _UNLEARNABLE:
            raise RloraError(
                f"sampling.{name}: training samples from the policy's own distribution, or the learner could not know "
                "the probability of what was sampled; remove it (sampling.temperature is the only such setting)"
            )


def explain(error: ValidationError) -> str:
    """One line a field at fault: its name, its value, what it must be, and what it means."""
    lines = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "missing":
            lines.append(f"{name}: not set, and it has no default; set it in the file or by --{name}")
        elif fault["type"] == "unexpected_keyword_argument":
            lines.append(f"{name} = {fault['input']!r}: no such field; `rlora train --help` lists them all")
        else:
            lines.append(f"{name} = {fault['input']!r}: {fault['msg'].replace('Input', 'it')}. {_doc(fault['loc'])}")
    return "\n".join(lines)


def _doc(loc: tuple[int | str, ...]) -> str:
    """The one-line doc of the field at `loc`."""
    schema = _ADAPTER.json_schema()
    properties = schema["properties"]
    doc = properties.get(loc[0], {}).get("description", "")
    for part in loc[1:]:
        section = str(loc[0]).capitalize() + "Config"
        properties = schema["$defs"].get(section, {}).get("properties", {})
        doc = properties.get(part, {}).get("description", doc)
    return str(doc)


def load(field: str, spec: str) -> Any:
    """The object that a field names as `module:name` or `path/to/file.py:name`. Raises RloraError where it can't.

    A module may lie in the working directory; a file may import what lies beside it.
    """
    where, _, name = spec.rpartition(":")
    if not where:
        raise RloraError(f"{field} = {spec!r}: write module:name or path/to/file.py:name")
    is_file = where.endswith(".py")
    home = str(Path(where).absolute().parent if is_file else Path.cwd())
    if home not in sys.path:
        sys.path.append(home)  # last: a file called like an installed package must not take its place
    try:
        if is_file:
            file = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert file is not None
            assert file.loader is not None
            module = importlib.util.module_from_spec(file)
            sys.modules.setdefault(file.name, module)  # dataclasses look their module up there
            file.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except FileNotFoundError:
        raise RloraError(f"{field} = {spec!r}: there is no file {where}; give its path from here") from None
    except Exception as error:
        raise RloraError(f"{field} = {spec!r}: importing {where} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise RloraError(f"{field} = {spec!r}: {where} has no {name!r}; it is spelt otherwise or is missing")
    return getattr(module, name)
