"""Prompts, reward functions and tokenizer of a run, validated before anything starts."""

import inspect
import json
import logging
import math
import os
import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rlora.model.base import context_length, load_tokenizer, locate, stop_token_ids, vocabulary_size
from rlora.model.chat import Chat
from rlora.plugin import env_of, file_of, load, location_prefix, pickled
from rlora.records import Episode, Group, Messages, Prompt, RloraError, without_surrogates
from rlora.rollout.check import Report, check
from rlora.rollout.given import example_of
from rlora.rollout.toolset import Toolset, is_agent, toolset_of
from rlora.scoring.pool import Pool
from rlora.scoring.worker import Setup
from rlora.settings import Config

_log = logging.getLogger(__name__)

HELD_OUT = "held_out"  # name of the evaluation set that holds the run's held-out prompts


@dataclass(frozen=True)
class Task:
    """Prompts, tokenizer and reward functions of a policy, as `load_task` returns them."""

    base: str  # path of the frozen base model
    chat: Chat
    stop: tuple[str, ...]  # strings that end the policy's message
    agent: bool  # whether the env replies to the policy, or has tools
    prompts: list[Prompt]  # training prompts
    held_out: list[Prompt]  # the first `evaluate.prompts` held-out prompts
    dropped: int  # prompts that are not used because they are empty or longer than `sampling.max_prompt_tokens`
    checked: Report = field(default_factory=Report)  # result of the reward check
    scoring: Setup = field(default_factory=Setup)  # what the processes run that score and that reply for the env
    sets: Mapping[str, list[Prompt]] = field(default_factory=dict)  # evaluation sets by name, including `held_out`
    examples: list[Group] = field(default_factory=list)  # of `prompts`, with the given completions, for SFT and pairs
    held_out_examples: list[Group] = field(default_factory=list)
    tools: Toolset | None = None  # of the env


@dataclass(frozen=True)
class ServedPolicy:
    """A policy that engines sample, with its config and task."""

    policy: str  # unique within the job
    config: Config
    task: Task
    number: int = 0  # of the first version to be served


def load_task(config: Config) -> Task:
    """Load the env's prompts and the tokenizer, and check the reward functions by calling them (`rollout.check`).

    Without an env the task has no prompts, and nothing is checked. Raises RloraError that names the invalid field.
    """
    if not config.env:
        return bare_task(config)
    plugin = load("env", config.env)
    env, (train, held_out) = _load_prompts("env", config.env, plugin, config.env_args, config.evaluate.prompts)
    if config.algorithm.supervised:
        return _load_examples(config, env, train, held_out)
    agent = is_agent(env)
    scoring = setup_of(config, agent)
    with closing(Pool(scoring, 1)) as pool:  # the same processes as in the run
        task = bare_task(config)
        if task.chat.template and hasattr(env, "reply") and _may_reply_with_messages(env):
            task.chat.check_replies()
        tools = toolset_of(env, task.chat)
        if any(prompt.tools for prompt in (*train, *held_out)):
            raise RloraError(f"env = {config.env!r}: its prompts have tools, which nobody calls; set the env's tools")
        fitting = tokenise(train, task.chat, config.sampling.max_prompt_tokens, tools)
        fitting_held_out = tokenise(held_out, task.chat, config.sampling.max_prompt_tokens, tools)
        _check_vocabulary(config, vocabulary_size(task.base), [*fitting, *fitting_held_out])
        if not fitting:
            lengths = [len(prompt.token_ids) for prompt in tokenise(train, task.chat, sys.maxsize, tools)]
            shortest = f" (the shortest has {min(lengths)})" if lengths else ""
            raise RloraError(
                f"env = {config.env!r}: none of its {len(train)} training prompts has 1 to "
                f"{config.sampling.max_prompt_tokens} tokens{shortest}; raise sampling.max_prompt_tokens, or shorten "
                "the prompts"
            )
        return replace(
            task,
            stop=(*getattr(env, "stop", ()), *task.stop),
            agent=agent,
            tools=tools,
            prompts=fitting,
            held_out=fitting_held_out,
            dropped=len(train) - len(fitting) + len(held_out) - len(fitting_held_out),
            checked=check(config, env, task.chat, pool, fitting, fitting_held_out, is_instance=env is plugin),
            scoring=scoring,
            sets=({HELD_OUT: fitting_held_out} if fitting_held_out else {})
            | _load_evaluation_sets(config, task, env, tools),
        )


def _load_examples(config: Config, env: Any, train: Sequence[Prompt], held_out: Sequence[Prompt]) -> Task:
    """Return the task of an algorithm that learns from given completions. Raises RloraError for an invalid example."""
    task = bare_task(config)
    _check_tokenizer(config, task.chat, getattr(env, "tokenized_by", config.model))
    if not train:
        raise RloraError(f"env = {config.env!r}: its train() returned no examples; use a data set that has some")
    tools = toolset_of(env, task.chat)
    schemas = tuple(tools.schemas.values()) if tools else ()
    offered = [[replace(prompt, tools=prompt.tools or schemas) for prompt in part] for part in (train, held_out)]
    parts = [[example_of(prompt, task.chat, config, n) for n, prompt in enumerate(part)] for part in offered]
    if not any(reward for group in parts[0] for reward in group.rewards):
        raise RloraError(f"env = {config.env!r}: the weights of all examples are 0; give some a weight above 0")
    size = vocabulary_size(task.base)
    groups = [*parts[0], *parts[1]]
    _check_vocabulary(config, size, [g.prompt for g in groups], [e for group in groups for e in group.episodes])
    # the completions belong to the data's identity, as `run.directory.prompts_digest` sees it
    prompts = [replace(group.prompt, completions=group.episodes) for group in parts[0]]
    return replace(task, prompts=prompts, examples=parts[0], held_out_examples=parts[1])


def _load_evaluation_sets(config: Config, task: Task, train_env: Any, tools: Toolset | None) -> dict[str, list[Prompt]]:
    """Return the prompts of `evaluate.sets`. Raises RloraError if a set is empty, or if its env replies differently."""
    sets = {}
    for name, settings in config.evaluate.sets.items():
        field = f"evaluate.sets.{name}"
        args = config.evaluation_args(name)
        spec = settings.env or config.env
        plugin = load(f"{field}.env", spec)
        env, (held_out,) = _load_prompts(f"{field}.env", spec, plugin, args, settings.prompts, ("held_out",))
        replies, train_env_replies = is_agent(env), is_agent(train_env)
        if replies != train_env_replies or (replies and type(env) is not type(train_env)):
            raise RloraError(
                f"{field}.env = {settings.env!r}: it must be of the class of the run's env, {config.env!r}, because "
                f"only that class replies in this run; unset {field}.env and set {field}.env_args, or evaluate on this "
                "env with `rlora eval`"
            )
        if toolset_of(env, task.chat) != tools:
            raise RloraError(f"{field}: its env has other tools, or another max_calls, than the run's env; unset them")
        held_out = [replace(prompt, evaluation_set=name) for prompt in held_out]
        sets[name] = tokenise(held_out, task.chat, config.sampling.max_prompt_tokens, tools)
        _check_vocabulary(config, vocabulary_size(task.base), sets[name])
        if not sets[name]:
            raise RloraError(
                f"{field}: none of the {len(held_out)} prompts from its held_out() has 1 to "
                f"{config.sampling.max_prompt_tokens} tokens; raise sampling.max_prompt_tokens, name a different env, "
                "or remove the set"
            )
    return sets


def _load_prompts(
    field: str, spec: str, plugin: Any, args: Mapping[str, Any], count: int,
    methods: Sequence[str] = ("train", "held_out"),
) -> tuple[Any, list[list[Prompt]]]:  # fmt: skip
    """Construct the env, and return it with the prompts of its `methods`: at most `count` of them from held_out().

    Raises RloraError that names the field.
    """
    try:
        env = env_of(plugin, args)
        parts = [list(islice(getattr(env, name)(), count if name == "held_out" else None)) for name in methods]
    except RloraError:
        raise
    except Exception as error:
        prefix = location_prefix(error, spec.rpartition(":")[0], file_of(plugin))
        raise RloraError(
            f"{prefix}{field} = {spec!r} with env_args = {args!r}: it raised {type(error).__name__}: {error}; "
            "fix env_args, or the env, which needs methods train() and held_out() that return Prompts"
        ) from error
    for method, prompts in zip(methods, parts, strict=True):
        for number, prompt in enumerate(prompts):
            _check_prompt(f"{field} = {spec!r}: its {method}()", prompt, number)
            completions = tuple(c if isinstance(c, Episode) else _without_surrogates(c) for c in prompt.completions)
            prompts[number] = replace(prompt, text=_without_surrogates(prompt.text), completions=completions)
    return env, parts


def bare_task(config: Config) -> Task:
    """Return a task without an env: base model, tokenizer and reward functions. Its lists of prompts are empty.

    Raises RloraError if the config's longest sequence exceeds the model's context, or if the tokenizer does not support
    the `chat` settings.
    """
    base = locate(config.model)
    limit = context_length(base)
    if limit is not None and config.max_model_len > limit:
        raise RloraError(
            f"sampling.max_prompt_tokens + sampling.max_tokens = {config.max_model_len}: "
            f"the context length of {config.model} is {limit}; lower one of the two settings"
        )
    tokenizer = load_tokenizer(base)
    size, further = vocabulary_size(base), config.chat.stop_token_ids
    if unknown := [token for token in further if token >= size]:
        raise RloraError(f"chat.stop_token_ids: {unknown[0]} is not one of the model's {size} tokens; remove it")
    chat = Chat(tokenizer, config.chat, tuple(dict.fromkeys((*stop_token_ids(base, tokenizer), *further))))
    scoring = setup_of(config, agent=False)
    return Task(base, chat, config.chat.stop, agent=False, prompts=[], held_out=[], dropped=0, scoring=scoring)


def _check_tokenizer(config: Config, chat: Chat, model: str) -> None:
    """Raise RloraError if tokens of `model`, which the examples have, mean something else to the config's model."""
    if model == config.model:
        return
    try:
        vocabulary = load_tokenizer(locate(model)).get_vocab()
    except RloraError as error:
        _log.warning("env = %r: its tokens can't be compared with those of %r: %s", config.env, config.model, error)
        return
    if vocabulary != chat.tokenizer.get_vocab():
        raise RloraError(
            f"env = {config.env!r}: its examples have tokens of {model!r}, and those of model = {config.model!r} are "
            "different; use a model with the same tokenizer"
        )


def _check_vocabulary(config: Config, size: int, prompts: Sequence[Prompt], episodes: Sequence[Episode] = ()) -> None:
    """Raise RloraError if a prompt or an episode contains a token for which the model has no embedding."""
    parts = [*(prompt.token_ids for prompt in prompts), *(episode.completion_ids for episode in episodes)]
    largest = max(map(max, parts), default=0)
    if largest >= size:
        raise RloraError(
            f"model = {config.model!r}: its tokenizer produces token {largest}, but the model has {size} embeddings; "
            "use the tokenizer that the model was saved with, or resize the model's embeddings and save the model again"
        )


def setup_of(config: Config, agent: bool) -> Setup:
    """Return the setup of the scoring processes, which run the reward functions and, if `agent`, the env's `reply`.

    Raises RloraError if a variable of `scoring.environment` is not set.
    """
    return Setup(
        rewards=config.rewards,
        style=config.scoring.style,
        reward_args=config.reward_args,
        env=config.env if agent else "",
        env_args={"": config.env_args} | {name: config.evaluation_args(name) for name in config.evaluate.sets},
        directory=str(Path.cwd()),
        deadline=config.scoring.deadline,
        first_deadline=config.scoring.first_deadline,
        memory_mib=config.scoring.memory_mib,
        concurrency=config.scoring.concurrency,
        environment=_environment(config.scoring.environment),
        seed=config.seed,
        objects=pickled("reward", config.rewards) | (pickled("env", [config.env]) if agent else {}),
    )


def _environment(names: Sequence[str]) -> dict[str, str]:
    """Return the values of the environment variables `names`. Raises RloraError if a variable is not set."""
    for name in names:
        if name not in os.environ:
            raise RloraError(
                f"scoring.environment: {name} is not set in the environment of this process; export {name}, or "
                "remove the name from scoring.environment"
            )
    return {name: os.environ[name] for name in names}


def _check_prompt(source: str, prompt: Any, number: int) -> None:
    """Raise RloraError unless `source`, an env's method, returned a Prompt of text or chat messages."""
    suffix = f" (prompt {number})"
    if not isinstance(prompt, Prompt):
        raise RloraError(
            f"{source} returned {prompt!r}; return a rlora.records.Prompt(text, answer) for each problem{suffix}"
        )
    text: Any = prompt.text
    if not isinstance(text, str) and not (_are_messages(text) and (text or prompt.completions)):
        raise RloraError(
            f"{source} returned a Prompt whose text is {text!r}; use a string, or a list of chat messages, "
            f'{{"role": ..., "content": ...}} with string values{suffix}'
        )
    for name, values in (("completions", prompt.completions), ("tools", prompt.tools)):
        if not isinstance(values, list | tuple):
            raise RloraError(f"{source} returned a Prompt whose {name} are {values!r:.200}; use a tuple{suffix}")
    for completion in prompt.completions:
        if not isinstance(completion, str | Episode) and not (_are_messages(completion) and completion):
            raise RloraError(
                f"{source} returned a Prompt with the completion {completion!r:.200}; use a string, an Episode, or a "
                f'list of chat messages, {{"role": ..., "content": ...}} with string values{suffix}'
            )
    for messages in (text, *prompt.completions):
        if fault := "" if isinstance(messages, str | Episode) else next(filter(None, map(_fault_of, messages)), ""):
            raise RloraError(f"{source} returned a Prompt with a chat message {fault}{suffix}")
    weight: Any = prompt.weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise RloraError(f"{source} returned a Prompt whose weight is {weight!r}; use a number of 0 or more{suffix}")
    columns: Any = prompt.columns
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns):
        raise RloraError(
            f"{source} returned a Prompt whose columns are {columns!r}; use a dict with column names as keys{suffix}"
        )
    try:
        pickle.dumps((prompt.answer, dict(columns)))
    except Exception as error:  # pickling runs arbitrary code of the object
        raise RloraError(
            f"{source} returned a Prompt whose answer or columns can't be sent to the processes of reward functions "
            f"({type(error).__name__}: {error}); use plain data{suffix}"
        ) from error


def _are_messages(value: Any) -> bool:
    """Return whether a value is a list of chat messages, possibly empty."""
    return isinstance(value, Sequence) and all(
        isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )


def _fault_of(message: Mapping[str, Any]) -> str:
    """Return what is wrong with a chat message besides its role and content; "" if nothing is."""
    thought, calls = message.get("reasoning_content") or "", message.get("tool_calls") or []
    if not isinstance(thought, str):
        return f"whose reasoning_content is {thought!r:.200}; use a string"
    if not isinstance(calls, list | tuple) or not all(map(_is_call, calls)):
        return (
            f"whose tool_calls are {calls!r:.200}; use a list of "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
        )
    try:
        json.dumps(calls, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"whose tool_calls are not JSON ({error}), {calls!r:.200}; use strings, numbers, lists and objects"
    return ""


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return False
    return bool(function["name"]) and isinstance(function.get("arguments"), Mapping | str)


def _without_surrogates(text: str | Messages) -> str | Messages:
    """Return the text of a prompt with lone surrogates replaced by question marks, as in an env's replies."""
    if isinstance(text, str):
        return without_surrogates(text)
    return [{k: without_surrogates(v) if isinstance(v, str) else v for k, v in message.items()} for message in text]


def _may_reply_with_messages(env: Any) -> bool:
    """Return whether the env's reply may be chat messages: True unless its return annotation allows strings only."""
    annotation = inspect.signature(env.reply).return_annotation
    return annotation not in (str, str | None, "str", "str | None", "Optional[str]", "None | str")


def tokenise(prompts: Iterable[Prompt], chat: Chat, max_tokens: int, tools: Toolset | None = None) -> list[Prompt]:
    """Tokenise prompts, with the schemas of the env's `tools`. Returns those of 1 to `max_tokens` tokens."""
    offered = [replace(prompt, tools=tuple(tools.schemas.values())) if tools else prompt for prompt in prompts]
    tokenised = [replace(prompt, token_ids=chat.prompt_ids(prompt.text, prompt.tools)) for prompt in offered]
    return [prompt for prompt in tokenised if 0 < len(prompt.token_ids) <= max_tokens]
