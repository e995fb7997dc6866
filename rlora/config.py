"""One frozen config, read from TOML and the command line. All validation is here."""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from upath import UPath

from rlora.records import RloraError
from rlora.settings import PRESETS, AlgorithmConfig, Config, LearnerConfig

# A token's probability would depend on which others were cut off or penalised; the learner could not know it.
_UNLEARNABLE = {"top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
_ARGUMENT = re.compile(r"(env_args|reward_args|chat\.template_args)\.[^.]+")

_SETS = ("evaluate", "sets")
_TAKEN = ("held_out", "before", "after", "prompts", "version")  # what accuracy/NAME has already

_ADAPTER = TypeAdapter(Config)
_PACKAGE = Path(__file__).parent


def read(path: Path | UPath) -> Config:
    """The config in a TOML file, or in a run's `config.toml`. Raises RloraError that names each field at fault."""
    return validate(read_table(path), f"{path}: ")


def read_table(path: Path | UPath) -> dict[str, Any]:
    """The tables of such a file, before any of their values is checked. Raises RloraError where it is not TOML.

    Where there is no launch/NAME.toml in the working directory, nor launch/gpu/NAME.toml, it is the recipe of that name
    in the installed package.
    """
    if path.parts[:1] == ("launch",) and not path.is_file() and (recipe := _PACKAGE / path).is_file():
        path = recipe
    try:
        data = path.read_bytes()
        table = tomllib.loads(data.decode("utf-8-sig").replace("\r\n", "\n"))
    except OSError as error:
        found = [*_PACKAGE.glob("launch/*.toml"), *_PACKAGE.glob("launch/gpu/*.toml")]
        recipes = ", ".join(str(recipe.relative_to(_PACKAGE)) for recipe in sorted(found))
        raise RloraError(
            f"{path}: can't be read ({error.strerror}); name a TOML file with a config, or one that comes with rlora: "
            f"{recipes}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data:
            raise RloraError(f"{path}: not valid TOML: it looks like UTF-16; save it as UTF-8") from None
        raise RloraError(f"{path}: not valid TOML: {error}") from None
    table.pop("provenance", None)  # what made a run; not a setting
    check_learnable(table)
    check_learnable(table["sampling"] if isinstance(table.get("sampling"), dict) else ())
    return table


def validate(values: Config | dict[str, Any], source: str = "") -> Config:
    """A config whose every value has its type and range. Raises RloraError with a line for each field at fault."""
    table = asdict(values) if isinstance(values, Config) else values
    given = table.get("algorithm")
    if isinstance(given, dict):
        table = table | {"algorithm": PRESETS.get(str(given.get("name")), {}) | given}
    try:
        config = _ADAPTER.validate_json(json.dumps(table, default=str))  # JSON, like TOML, has lists for tuples
    except ValidationError as error:
        raise RloraError(source + explain(error)) from None
    if config.learner.full_finetuning:
        _refuse_beside_all_weights(config, source)
    if config.learner.shard:
        _refuse_to_shard(config.learner, source)
    _refuse_values(config.scoring.environment, source)
    _refuse_what_makes_no_sense(config, source)
    return config


def _refuse_values(names: Sequence[str], source: str) -> None:
    """Raise RloraError, which does not show it, for what is no name of a variable: it may be a secret."""
    for number, name in enumerate(names):
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise RloraError(
                f"{source}scoring.environment: its item {number} is no name of an environment variable; give names "
                "alone, such as JUDGE_KEY, and set their values where rlora is started"
            )


def _refuse_what_makes_no_sense(config: Config, source: str) -> None:
    """Raise RloraError for parts of an algorithm that do not go together."""
    a, keeps = config.algorithm, config.checkpoint
    functions = config.rewards
    senseless = [
        (len(config.reward_weights) not in (0, len(functions)), "reward_weights",
         f"there are {len(functions)} reward functions; give as many weights, or leave them out"),
        ((config.env and not functions) or len(set(functions)) < len(functions), "reward",
         "name one reward function or more, each once"),
        (keeps.keep_best and keeps.keep_last <= config.max_staleness and not config.learner.full_finetuning,
         "checkpoint.keep_last", f"with max_staleness = {config.max_staleness} a version is gone before it is known to "
         f"be the best; set it to {config.max_staleness + 1} or more, or checkpoint.keep_best to 0"),
        (keeps.best_by == "accuracy" and not (config.evaluate.every and config.evaluate.prompts), "checkpoint.best_by",
         "held-out accuracy is only known where evaluate.every and evaluate.prompts are set; set both, or use reward"),
        (keeps.keep_best and keeps.best_by == "accuracy" and 0 < config.evaluate.every >= keeps.keep_last > 0,
         "checkpoint.keep_last", f"with evaluate.every = {config.evaluate.every} a version may be gone before its "
         "accuracy is known; set it above that"),
        (bool(names := [name for name in config.evaluate.sets if not re.fullmatch(r"\w+", name) or name in _TAKEN]),
         "evaluate.sets", f"{', '.join(names)}: use letters, digits and _, and none of {', '.join(_TAKEN)}"),
        (len(set(config.trackers.use)) < len(config.trackers.use), "trackers.use",
         "one is named twice; name each once"),
        (not all(config.chat.think), "chat.think", "both tags have to be something; leave it out for the usual ones"),
        (not all(config.chat.stop), "chat.stop", "an empty string would end every message; leave it out"),
        (a.of_group and config.group_size == 1, "group_size",
         f"algorithm.advantage = {a.advantage!r} is relative to the other completions of a prompt; set it to 2 or "
         "more, or use whitened or gae"),
        (0 < a.dual_clip <= 1 + a.clip_high, "algorithm.dual_clip",
         f"a token inside the clip would be cut too; set it above {1 + a.clip_high:g} (3 is usual), or to 0"),
        (a.dual_clip and a.loss not in ("clip", "gspo"), "algorithm.dual_clip",
         f"algorithm.loss = {a.loss!r} has no clipped surrogate to bound; set it to 0"),
        (a.loss == "gspo" and a.correction.startswith("token"), "algorithm.correction",
         "GSPO's ratio is its episode's, and so must this one be; use episode-truncate, episode-mask or none"),
        (a.loss == "gspo" and not a.of_group, "algorithm.advantage",
         "each token has its own, but GSPO has one ratio for a whole episode; use algorithm.loss = \"clip\", or "
         "advantages of a group"),
        (a.kl_of("loss") and a.kl_estimator == "k1", "algorithm.kl_estimator",
         "in the loss its gradient is 0 on average, at any distance; use k2 or k3, or algorithm.kl_in = \"reward\""),
        (a.kl_of("reward") and a.kl_estimator != "k1", "algorithm.kl_estimator",
         "in the reward it pushes tokens that are too rare further down; use k1, or algorithm.kl_in = \"loss\""),
        (a.target_kl and a.epochs * a.minibatches == 1, "algorithm.target_kl",
         "the one minibatch of an update starts where the update does; set it to 0, or more minibatches or epochs"),
        (a.bootstrap_truncated and a.drop_truncated, "algorithm.bootstrap_truncated",
         "algorithm.drop_truncated learns nothing from those completions; leave one of them out"),
        (a.kl and config.learner.full_finetuning, "algorithm.kl",
         "the reference policy is the base with the adapter off, and without an adapter the base itself is trained; "
         "set it to 0"),
        (a.advantage == "gae" and config.learner.full_finetuning, "algorithm.advantage",
         "the critic is an adapter beside the policy's, on a base that stays; it needs learner.adapter = \"lora\""),
        (a.advantage == "gae" and config.critic.warmup >= config.steps, "critic.warmup",
         f"the policy would never learn in {config.steps} steps; set it below `steps`"),
        (a.bootstrap_truncated and a.advantage != "gae", "algorithm.bootstrap_truncated",
         "only a critic knows what would follow; set algorithm.advantage = \"gae\", or leave it out"),
        (a.refills and not a.of_group, "algorithm.refills",
         "groups whose rewards agree do carry a gradient here; set it to 0"),
        (a.minibatches > config.prompts_per_step, "algorithm.minibatches",
         f"there are {config.prompts_per_step} groups a step (prompts_per_step), and a group stays whole; set it to "
         "that or less"),
        (a.overlong_tokens >= config.sampling.max_tokens, "algorithm.overlong_tokens",
         f"a completion has {config.sampling.max_tokens} at most (sampling.max_tokens); set it below that"),
        (bool(a.overlong_penalty) != bool(a.overlong_tokens), "algorithm.overlong_penalty",
         f"algorithm.overlong_tokens is {a.overlong_tokens}; set both, or leave both out"),
    ]  # fmt: skip
    for is_so, name, why in senseless:
        if is_so:
            raise RloraError(f"{source}{name} = {attrgetter(name)(config)!r}: {why}")


def _refuse_beside_all_weights(config: Config, source: str) -> None:
    """Raise RloraError for what needs an adapter."""
    for name in ("rank", "alpha", "targets", "head", "rslora", "init", "start_from", "quantise", "shard"):
        if (value := getattr(config.learner, name)) != getattr(LearnerConfig(), name):
            raise RloraError(
                f'{source}learner.{name} = {value!r}: there is no adapter (learner.adapter = "none"); leave it out'
            )
    if config.evaluate.every:
        raise RloraError(
            f'{source}evaluate.every = {config.evaluate.every}: with learner.adapter = "none" an engine holds one '
            "version at a time, and training would wait for each evaluation; set it to 0"
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


def check_learnable(names: Iterable[str]) -> None:
    """Raise RloraError for a sampling option whose distribution the learner could not reproduce."""
    for name in names:
        if name in _UNLEARNABLE:
            raise RloraError(
                f"sampling.{name}: training samples from the policy's own distribution, or the learner could not know "
                "the probability of what was sampled; remove it (sampling.temperature is the only such setting)"
            )


def explain(error: ValidationError) -> str:
    """One line a field at fault: its name, its value, what it must be, and what it means."""
    lines: dict[str, str] = {}  # by the field: one that may be of several types has a fault for each
    for fault in error.errors():
        depth = 4 if fault["loc"][:2] == _SETS else 2  # below that stand the types that a field may have
        name = ".".join(str(part) for i, part in enumerate(fault["loc"]) if i < depth or isinstance(part, int))
        if argument := _ARGUMENT.match(".".join(map(str, fault["loc"]))):
            name, value = argument[0], fault["input"]
            line = f"{name} = {value!r}: use text, a number, true or false, or a list of them"
        elif fault["loc"][:2] == ("scoring", "environment"):  # which may hold a secret by mistake
            name = "scoring.environment"
            line = f"{name}: give a list of names of environment variables, without their values"
        elif fault["type"] == "missing":
            line = f"{name}: not set, and it has no default; set it in the file or by --{name}"
        elif fault["type"] == "unexpected_keyword_argument":
            line = f"{name} = {fault['input']!r}: no such field; {like(name)}"
        else:
            line = f"{name} = {fault['input']!r}: {fault['msg'].replace('Input', 'it')}. {_doc(fault['loc'])}"
        lines.setdefault(name, line)
    return "\n".join(lines.values())


ELSEWHERE = {  # names of TRL's and verl's, and ours
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
    """What to do about a field that there is not: what it is called here, the names that are like it, or where all
    stand."""
    if ours := ELSEWHERE.get(name.rpartition(".")[2]):
        return f"here it is {ours}"
    table = asdict(Config(model="", env="", reward=""))
    names = [f"{section}.{field}" for section, of in table.items() if isinstance(of, dict) for field in of] + [*table]
    same = [each for each in names if each.rpartition(".")[2] == name.rpartition(".")[2]]
    near = " or ".join(same or get_close_matches(name, names, 2))
    return f"did you mean {near}?" if near else "`rlora train --help` lists them all"


def _doc(loc: tuple[int | str, ...]) -> str:
    """The one-line doc of the field at `loc`."""
    schema = _ADAPTER.json_schema()
    properties = schema["properties"]
    doc = properties.get(loc[0], {}).get("description", "")
    if loc[:2] == _SETS and len(loc) > 3:
        return str(schema["$defs"]["SetConfig"]["properties"].get(loc[3], {}).get("description", ""))
    for part in loc[1:]:
        section = str(loc[0]).capitalize() + "Config"
        properties = schema["$defs"].get(section, {}).get("properties", {})
        doc = properties.get(part, {}).get("description", doc)
    return str(doc)


_ARGUMENTS = {"env_args": "env", "reward_args": "reward"}  # and what they are arguments of


def changed(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a config with fields changed, which `changes` has by their full names, such as learner.rank.

    Where another plug-in is named the arguments of the one before go, and where another algorithm is what its name set.
    """
    merged = deepcopy(dict(table))
    for arguments, plug_in in _ARGUMENTS.items():
        if plug_in in changes and plug_in in table and _listed(table[plug_in]) != _listed(changes[plug_in]):
            merged[arguments] = {}
    for name, value in changes.items():
        of: Any = merged
        *sections, last = name.split(".")
        for section in sections:
            of = of.setdefault(section, {}) if isinstance(of, dict) else None
        if isinstance(of, dict):  # else what is in the way is at fault, and the check tells of it
            of[last] = value
    before = table.get("algorithm")
    if "algorithm.name" in changes and isinstance(merged["algorithm"], dict):
        name = str(before.get("name", "")) if isinstance(before, dict) else ""
        _leave_preset(merged["algorithm"], PRESETS.get(name, {}), changes.keys())
    return merged


def by_full_names(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables, of any depth, by their full names."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        inner = isinstance(value, Mapping)
        found |= by_full_names(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def flattened(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of some tables by their full names."""
    sections = {name for name, value in asdict(Config(model="", env="", reward="")).items() if isinstance(value, dict)}
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, Mapping) and name in sections:
            flat |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            flat[name] = value
    return flat


def _listed(plug_in: Any) -> Any:
    return list(plug_in) if isinstance(plug_in, tuple) else [plug_in] if isinstance(plug_in, str) else plug_in


def _leave_preset(algorithm: dict[str, Any], was: dict[str, Any], given: Iterable[str]) -> None:
    """Take out what the name before set, so that the new one can; what was given beside it stays."""
    kept = {name.removeprefix("algorithm.") for name in given}
    for name in (PRESETS.get(algorithm["name"], {}) | was).keys() - kept:
        if name in algorithm and algorithm[name] == was.get(name, getattr(AlgorithmConfig(), name)):
            del algorithm[name]


_FIXED = (
    "model", "learner.adapter", "learner.rank", "learner.alpha", "learner.targets", "learner.head", "learner.rslora",
    "learner.start_from",
)  # fmt: skip


def check_same_policy(before: Config, after: Config, option: str) -> None:
    """Raise RloraError where a saved adapter would be of another base, rank, scale or set of matrices."""
    critics = [config.critic.rank if config.algorithm.advantage == "gae" else 0 for config in (before, after)]
    for name, (was, now) in differences(before, after).items():
        if name in _FIXED or (critics[0] != critics[1] and name in ("critic.rank", "algorithm.advantage")):
            raise RloraError(
                f"{name} = {now!r}: {option} goes on with an adapter that was trained with {was!r}, and the saved "
                "adapter cannot be used with another value; leave it out, or start a new run"
            )


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """The fields that differ, by their full names: before and after."""
    return _differences(json.loads(json.dumps(asdict(before))), json.loads(json.dumps(asdict(after))), "")


def _differences(before: Any, after: Any, name: str) -> dict[str, tuple[Any, Any]]:
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return {name: (before, after)} if before != after else {}
    return {
        path: values
        for key in before | after
        for path, values in _differences(before.get(key), after.get(key), f"{name}.{key}".strip(".")).items()
    }
