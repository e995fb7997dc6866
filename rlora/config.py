"""Reads a config from TOML and from fields by their full names, and validates it."""

import json
import logging
import re
import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict
from difflib import get_close_matches
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from upath import UPath

from rlora.records import RloraError
from rlora.settings import PRESETS, SUPERVISED, AlgorithmConfig, Config
from rlora.settings.earlier import REPLACED, replaced
from rlora.settings.fields import Tag, tagged

_log = logging.getLogger(__name__)

# With these the probabilities of a token differ from the model's in a way that the learner does not compute.
_UNLEARNABLE = {
    "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "logit_bias", "bad_words",
    "allowed_token_ids", "ignore_eos",
}  # fmt: skip
_ARGUMENT = re.compile(r"(env_args|reward_args|chat\.template_args)\.[^.]+")
_SETS = ("evaluate", "sets")
_SECRET = "scoring.environment"  # its value is never shown: it may hold a secret by mistake

_ADAPTER = TypeAdapter(Config)
_PACKAGE = Path(__file__).parent


def read(path: Path | UPath) -> Config:
    """Read the config in a TOML file, or in a run's `config.toml`. Raises RloraError with a line per broken rule."""
    return validate(read_table(path), f"{path}: ")


def read_table(path: Path | UPath) -> dict[str, Any]:
    """Read the tables of a TOML file without validating them. Raises RloraError if the file can't be read or is not
    TOML.

    A path launch/NAME.toml or launch/gpu/NAME.toml that does not exist in the working directory is looked up among the
    recipes of the installed package.
    """
    if path.parts[:1] == ("launch",) and not path.is_file() and (recipe := _PACKAGE / path).is_file():
        path = recipe
    try:
        data = path.read_bytes()
        table = tomllib.loads(data.decode("utf-8-sig").replace("\r\n", "\n"))
    except OSError as error:
        files = [*_PACKAGE.glob("launch/*.toml"), *_PACKAGE.glob("launch/gpu/*.toml")]
        recipes = ", ".join(str(file.relative_to(_PACKAGE)) for file in sorted(files))
        raise RloraError(
            f"{path}: can't be read ({error.strerror}); name a TOML file, or a recipe that comes with rlora: {recipes}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data:
            raise RloraError(f"{path}: not valid TOML: it looks like UTF-16; save it as UTF-8") from None
        raise RloraError(f"{path}: not valid TOML: {error}; correct the file, which must be TOML in UTF-8") from None
    is_of_run = table.pop("provenance", None) is not None  # written into a run's config.toml; not a setting
    if not is_of_run and (old := REPLACED & by_full_names(table).keys()):
        new = by_full_names({"algorithm": replaced(table["algorithm"])})
        fields = ", ".join(f"{name} = {new[name]!r}" for name in new if name.endswith(("kl_estimator", "truncated")))
        remedy = f"write {fields} instead" if fields else "remove them"
        _log.warning("%s: %s: fields of an earlier release; %s", path, ", ".join(sorted(old)), remedy)
    return table


def validate(values: Config | dict[str, Any], source: str = "") -> Config:
    """Return a config whose values have their types and ranges and break no rule.

    `values` is a config, or its tables. Raises RloraError with a line per field at fault. `source`, such as "a.toml: ",
    starts the message.
    """
    table = asdict(values) if isinstance(values, Config) else values
    algorithm = table.get("algorithm")
    if isinstance(algorithm, dict):
        table = {"reward": ""} | table if algorithm.get("name") in SUPERVISED else table
        table = table | {"algorithm": PRESETS.get(str(algorithm.get("name")), {}) | replaced(algorithm)}
    try:
        config = _ADAPTER.validate_json(json.dumps(table, default=str))  # JSON, like TOML, has lists instead of tuples
    except ValidationError as error:
        raise RloraError(source + explain(error)) from None
    lines = [f"{name}{_shown(config, name)}: {reason}" for name, reason in config.problems()]
    if lines:
        raise RloraError(source + "\n".join(lines))
    return config


def _shown(config: Config, name: str) -> str:
    return "" if name == _SECRET else f" = {attrgetter(name)(config)!r}"


def check_learnable(names: Iterable[str]) -> None:
    """Raise RloraError if `names` has a sampling option, such as repetition_penalty, for which the learner can't
    compute the probabilities of the sampled tokens."""
    for name in names:
        if name in _UNLEARNABLE:
            raise RloraError(f"sampling.{name}: {like(name)}")


def explain(error: ValidationError) -> str:
    """Return a line per field at fault: name and value of the field, the rule that is broken, and the field's doc."""
    lines: dict[str, str] = {}  # by field: one with a union of types has a fault for each type
    for fault in error.errors():
        depth = 4 if fault["loc"][:2] == _SETS else 2  # deeper entries are the types of a union
        name = ".".join(str(part) for i, part in enumerate(fault["loc"]) if i < depth or isinstance(part, int))
        if argument := _ARGUMENT.match(".".join(map(str, fault["loc"]))):
            name, value = argument[0], fault["input"]
            line = f"{name} = {value!r}: use text, a number, true or false, or a list of them"
        elif ".".join(map(str, fault["loc"][:2])) == _SECRET:
            name = _SECRET
            line = f"{name}: not a list of text; give a list of names of environment variables, without the values"
        elif fault["type"] == "missing":
            line = f"{name}: not set, and it has no default; set {name} in the file, or give --{name}"
        elif fault["type"] == "unexpected_keyword_argument":
            line = f"{name} = {fault['input']!r}: no such field; {like(name)}"
        else:
            advice = doc(*fault["loc"]) or f"Set the fields of this section, each as {name}.FIELD"
            line = f"{name} = {fault['input']!r}: {fault['msg'].replace('Input', 'it')}. {advice}"
        lines.setdefault(name, line)
    return "\n".join(lines.values())


ELSEWHERE = {  # names in TRL and verl, and the field here
    "learning_rate": "learner.lr", "num_generations": "group_size", "train_batch_size": "prompts_per_step",
    "generation_batch_size": "prompts_per_step", "per_device_train_batch_size": "prompts_per_step",
    "max_completion_length": "sampling.max_tokens", "max_response_length": "sampling.max_tokens",
    "max_new_tokens": "sampling.max_tokens", "max_prompt_length": "sampling.max_prompt_tokens", "beta": "algorithm.kl",
    "kl_loss_coef": "algorithm.kl", "epsilon": "algorithm.clip_low", "epsilon_high": "algorithm.clip_high",
    "loss_type": "algorithm.name", "adv_estimator": "algorithm.name", "reward_funcs": "reward",
    "report_to": "trackers.use", "logger": "trackers.use", "test_freq": "evaluate.every",
    "eval_steps": "evaluate.every", "max_steps": "steps", "lora_r": "learner.rank", "lora_rank": "learner.rank",
    "lora_alpha": "learner.alpha", "lora_target_modules": "learner.targets", "lr_scheduler_type": "learner.lr_schedule",
    "gradient_checkpointing": "learner.checkpointing", "model_name_or_path": "model",
    "tensor_model_parallel_size": "engine.tensor_parallel_size",
}  # fmt: skip


def like(name: str) -> str:
    """Return a hint for a field that does not exist: why there is no such sampling option, rlora's name if TRL or verl
    has the field, else similar names."""
    if (last := name.rpartition(".")[2]) in _UNLEARNABLE:
        return (
            "with this option the learner can't compute the probabilities of the sampled tokens; remove "
            f"sampling.{last} (sampling.temperature, top_k, top_p and min_p can change the distribution)"
        )
    if field := ELSEWHERE.get(last):
        return f"use {field}"
    sections = asdict(Config(model="", env="", reward=""))
    names = [*flattened(sections)] + ([] if "." in name else [*sections])
    equal = [field for field in names if field.rpartition(".")[2] == last]
    similar = " or ".join(equal or get_close_matches(name, names, 2))
    return f"did you mean {similar}?" if similar else "`rlora train --help` lists all fields"


def doc(*path: int | str) -> str:
    """Return the doc of the field at `path`, such as "learner", "rank".

    If the path ends below a field, for example at a type of its union, this is the doc of the innermost field. Empty if
    no field on the path has a doc.
    """
    definitions = (schema := _schema())["$defs"]
    node, text = schema, ""
    for part in path:
        node = node.get("properties", {}).get(part) or node.get("additionalProperties") or {}
        text = str(node.get("description", text)).replace("\n", " ")
        node = definitions.get(node.get("$ref", "").rpartition("/")[2], node)
    return text


@cache
def _schema() -> dict[str, Any]:
    return _ADAPTER.json_schema()


_ARGUMENTS = {"env_args": "env", "reward_args": "reward"}  # and the field that names what takes them


def changed(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the tables of a config with `changes`, which are values by full names such as learner.rank.

    If a different env or reward is named, the arguments of the previous one are dropped. If a different algorithm is
    named, the fields that the previous name set take the defaults of the new one.
    """
    merged = deepcopy(dict(table))
    for arguments, plug_in in _ARGUMENTS.items():
        if plug_in in changes and plug_in in table and _listed(table[plug_in]) != _listed(changes[plug_in]):
            merged[arguments] = {}
    for name, value in changes.items():
        *sections, last = name.split(".")
        section: Any = merged
        for part in sections:
            section = section.setdefault(part, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):  # otherwise a value stands where a section should, and validation reports it
            section[last] = value
    previous = table.get("algorithm")
    if "algorithm.name" in changes and isinstance(merged["algorithm"], dict):
        name = str(previous.get("name", "")) if isinstance(previous, dict) else ""
        _drop_preset(merged["algorithm"], PRESETS.get(name, {}), changes.keys())
    return merged


def _drop_preset(algorithm: dict[str, Any], preset: dict[str, Any], named: Iterable[str]) -> None:
    """Remove the fields that the previous name set, except those that are `named` themselves."""
    kept = {name.removeprefix("algorithm.") for name in named}
    for name in (PRESETS.get(algorithm["name"], {}) | preset).keys() - kept:
        if name in algorithm and algorithm[name] == preset.get(name, getattr(AlgorithmConfig(), name)):
            del algorithm[name]


def _listed(plug_in: Any) -> Any:
    return list(plug_in) if isinstance(plug_in, tuple) else [plug_in] if isinstance(plug_in, str) else plug_in


def by_full_names(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables, of any depth, by full name. `prefix` starts each name."""
    values: dict[str, Any] = {}
    for name, value in table.items():
        is_table = isinstance(value, Mapping)
        values |= by_full_names(value, f"{prefix}{name}.") if is_table else {f"{prefix}{name}": value}
    return values


def flattened(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the sections in `tables` by their full names."""
    sections = {name for name, value in asdict(Config(model="", env="", reward="")).items() if isinstance(value, dict)}
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, Mapping) and name in sections:
            flat |= {f"{name}.{field}": field_value for field, field_value in value.items()}
        else:
            flat[name] = value
    return flat


def check_same_policy(saved: Config, config: Config, option: str) -> None:
    """Raise RloraError if an adapter that was trained under `saved` does not fit `config`.

    The base, the rank, the scale and the set of matrices must be equal, and the same for a critic. `option`, such as
    --resume, is named in the message.
    """
    critics = [side.critic.rank if side.algorithm.advantage == "gae" else 0 for side in (saved, config)]
    fixed = {*tagged(Config, Tag.POLICY)}
    if critics[0] != critics[1]:
        fixed |= {"critic.rank", "algorithm.advantage"}
    for name, (old, new) in differences(saved, config).items():
        if name in fixed:
            raise RloraError(
                f"{name} = {new!r}: {option} continues an adapter that was trained with {old!r}, and this adapter does "
                f"not fit a different value; set {name} to {old!r}, or start a new run"
            )


def differences(first: Config, second: Config) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, by full name: the value in `first` and the value in `second`."""
    return _differences(json.loads(json.dumps(asdict(first))), json.loads(json.dumps(asdict(second))), "")


def _differences(first: Any, second: Any, name: str) -> dict[str, tuple[Any, Any]]:
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return {name: (first, second)} if first != second else {}
    return {
        path: values
        for key in first | second
        for path, values in _differences(first.get(key), second.get(key), f"{name}.{key}".strip(".")).items()
    }
