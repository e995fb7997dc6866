"""What is trained on: prompts, rewards, the base's tokenizer. All that can be wrong with them is found here."""

import inspect
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rlora.model.base import context_length, load_tokenizer, locate, stop_token_ids, vocabulary_size
from rlora.model.chat import Chat
from rlora.plugin import at, env_of, file_of, load, pickled
from rlora.records import Messages, Prompt, RloraError, without_surrogates
from rlora.rollout.check import Report, check
from rlora.scoring.pool import Pool
from rlora.scoring.worker import Setup
from rlora.settings import Config

HELD_OUT = "held_out"  # the name of the run's own held-out prompts among the sets


@dataclass(frozen=True)
class Task:
    base: str  # where the frozen base is loaded from
    chat: Chat
    stop: tuple[str, ...]  # strings that end the policy's message
    agent: bool  # whether the env answers it
    prompts: list[Prompt]  # to train on
    held_out: list[Prompt]  # the first `evaluate.prompts` of them
    dropped: int  # prompts left out because they are too long
    checked: Report = field(default_factory=Report)  # what trying the reward functions came to
    scoring: Setup = field(default_factory=Setup)  # what the processes run that score, and reply for the env
    sets: Mapping[str, list[Prompt]] = field(default_factory=dict)  # to evaluate on, `held_out` among them


@dataclass(frozen=True)
class ServedPolicy:
    """A policy that engines sample, and what for."""

    policy: str  # unique in the job
    config: Config
    task: Task
    number: int = 0  # of the first version that will be served


def load_task(config: Config) -> Task:
    """Load env and tokenizer, and try the reward functions. Raises RloraError that names the field at fault.

    Without an env there are no prompts of its own.
    """
    if not config.env:
        return bare_task(config)
    plugged = load("env", config.env)
    env, (train, held_out) = _prompts_of("env", config.env, plugged, config.env_args, config.evaluate.prompts)
    agent = hasattr(env, "reply")
    scoring = setup_of(config, agent)
    with closing(Pool(scoring, 1)) as pool:  # as it is in the run, to try it
        task = bare_task(config)
        if task.chat.template and agent and _may_say_messages(env):
            task.chat.check_replies()
        fitting = tokenise(train, task.chat, config.sampling.max_prompt_tokens)
        fitting_held_out = tokenise(held_out, task.chat, config.sampling.max_prompt_tokens)
        _refuse_unknown_tokens(config, vocabulary_size(task.base), [*fitting, *fitting_held_out])
        if not fitting:
            raise RloraError(
                f"env = {config.env!r}: none of its {len(train)} training prompts has 1 to "
                f"{config.sampling.max_prompt_tokens} tokens; raise sampling.max_prompt_tokens or look at the data"
            )
        return replace(
            task,
            stop=(*getattr(env, "stop", ()), *task.stop),
            agent=agent,
            prompts=fitting,
            held_out=fitting_held_out,
            dropped=len(train) - len(fitting) + len(held_out) - len(fitting_held_out),
            checked=check(config, env, task.chat, pool, fitting, fitting_held_out, ready_made=env is plugged),
            scoring=scoring,
            sets=({HELD_OUT: fitting_held_out} if fitting_held_out else {}) | _sets_of(config, task, env),
        )


def _sets_of(config: Config, task: Task, own: Any) -> dict[str, list[Prompt]]:
    """The prompts of `evaluate.sets`. Raises RloraError for one that has none, or whose env replies in another way."""
    sets = {}
    for name, each in config.evaluate.sets.items():
        field, args = f"evaluate.sets.{name}", each.env_args if each.env else {**config.env_args, **each.env_args}
        spec = each.env or config.env
        plugged = load(f"{field}.env", spec)
        env, (held_out,) = _prompts_of(f"{field}.env", spec, plugged, args, each.prompts, ("held_out",))
        if hasattr(env, "reply") != hasattr(own, "reply") or (hasattr(env, "reply") and type(env) is not type(own)):
            raise RloraError(
                f"{field}.env = {each.env!r}: the env of the run, {config.env!r}, replies in all sets or in none; use "
                "its class with other arguments, or evaluate on this env by `rlora eval`"
            )
        sets[name] = tokenise(held_out, task.chat, config.sampling.max_prompt_tokens)
        _refuse_unknown_tokens(config, vocabulary_size(task.base), sets[name])
        if not sets[name]:
            raise RloraError(
                f"{field}: none of the {len(held_out)} prompts that its held_out() gives has 1 to "
                f"{config.sampling.max_prompt_tokens} tokens; name an env that has some, or leave the set out"
            )
    return sets


def _prompts_of(
    field: str, spec: str, plugged: Any, args: Mapping[str, Any], count: int,
    methods: Sequence[str] = ("train", "held_out"),
) -> tuple[Any, list[list[Prompt]]]:  # fmt: skip
    """The env, and what its methods give: all training prompts, the first `count` held-out ones.

    Raises RloraError that names the field.
    """
    try:
        env = env_of(plugged, args)
        given = [list(islice(getattr(env, name)(), count if name == "held_out" else None)) for name in methods]
    except RloraError:
        raise
    except Exception as error:
        line = at(error, spec.rpartition(":")[0], file_of(plugged))
        raise RloraError(
            f"{line}{field} = {spec!r} with env_args = {args!r}: it raised {type(error).__name__}: "
            f"{error}; give the arguments that it takes, and let it have train() and held_out() that return Prompts"
        ) from error
    for method, prompts in zip(methods, given, strict=True):
        for number, prompt in enumerate(prompts):
            _refuse_what_is_no_prompt(f"{field} = {spec!r}: its {method}()", prompt, number)
            prompts[number] = replace(prompt, text=_whole(prompt.text))
    return env, given


def bare_task(config: Config) -> Task:
    """The base, its tokenizer and the reward functions, without an env. Raises RloraError where they don't fit."""
    where = locate(config.model)
    limit = context_length(where)
    if limit is not None and config.max_model_len > limit:
        raise RloraError(
            f"sampling.max_prompt_tokens + sampling.max_tokens = {config.max_model_len}: "
            f"the context of {config.model} is {limit} tokens; lower one of them"
        )
    tokenizer = load_tokenizer(where)
    chat = Chat(tokenizer, config.chat, stop_token_ids(where, tokenizer))
    scoring = setup_of(config, agent=False)
    return Task(where, chat, config.chat.stop, agent=False, prompts=[], held_out=[], dropped=0, scoring=scoring)


def _refuse_unknown_tokens(config: Config, size: int, prompts: Sequence[Prompt]) -> None:
    """Raise RloraError where a prompt has a token that the model has no embedding of."""
    largest = max((max(prompt.token_ids) for prompt in prompts), default=0)
    if largest >= size:
        raise RloraError(
            f"model = {config.model!r}: its tokenizer gives token {largest}, and the model has {size} embeddings; use "
            "the tokenizer that the model was saved with, or resize its embeddings and save it again"
        )


def setup_of(config: Config, agent: bool) -> Setup:
    """What the processes run that score; with an `agent`, its replies too."""
    return Setup(
        rewards=config.rewards,
        style=config.scoring.style,
        reward_args=config.reward_args,
        env=config.env if agent else "",
        env_args=config.env_args,
        directory=str(Path.cwd()),
        deadline=config.scoring.deadline,
        first_deadline=config.scoring.first_deadline,
        memory_mib=config.scoring.memory_mib,
        concurrency=config.scoring.concurrency,
        environment=_environment(config.scoring.environment),
        seed=config.seed,
        given=pickled("reward", config.rewards) | (pickled("env", [config.env]) if agent else {}),
    )


def _environment(names: Sequence[str]) -> dict[str, str]:
    """The variables of this process's environment that reward functions get. Raises RloraError where one is not set."""
    for name in names:
        if name not in os.environ:
            raise RloraError(
                f"scoring.environment: {name} is not set in the environment of this process; export it, or leave it out"
            )
    return {name: os.environ[name] for name in names}


def _refuse_what_is_no_prompt(source: str, given: Any, number: int) -> None:
    """Raise RloraError where an env's method, `source`, gives anything but a Prompt of text or chat messages."""
    at = f" (prompt {number})"
    if not isinstance(given, Prompt):
        raise RloraError(f"{source} gave {given!r}; give a rlora.records.Prompt(text, answer) for each problem{at}")
    text: Any = given.text
    if not isinstance(text, str) and not (isinstance(text, Sequence) and text and all(map(_is_message, text))):
        raise RloraError(
            f"{source} gave a Prompt whose text is {text!r}; give a string, or a list of chat messages, "
            f'{{"role": ..., "content": ...}} with a string each{at}'
        )
    columns: Any = given.columns
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns):
        raise RloraError(f"{source} gave a Prompt whose columns are {columns!r}; give a dict of them by name{at}")
    try:
        pickle.dumps((given.answer, dict(columns)))
    except Exception as error:  # of any object
        raise RloraError(
            f"{source} gave a Prompt whose answer or columns can't be sent to the processes of reward functions "
            f"({type(error).__name__}: {error}); give plain data{at}"
        ) from error


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))


def _whole(text: str | Messages) -> str | Messages:
    """A prompt without halves of surrogate pairs, as replies are."""
    if isinstance(text, str):
        return without_surrogates(text)
    return [{k: without_surrogates(v) if isinstance(v, str) else v for k, v in turn.items()} for turn in text]


def _may_say_messages(env: Any) -> bool:
    """Whether an agent's reply may be chat messages: unless its annotation says that it gives strings only."""
    said = inspect.signature(env.reply).return_annotation
    return said not in (str, str | None, "str", "str | None", "Optional[str]", "None | str")


def tokenise(prompts: Iterable[Prompt], chat: Chat, max_tokens: int) -> list[Prompt]:
    """The prompts of at most `max_tokens` tokens, with their `token_ids`."""
    tokenised = [replace(prompt, token_ids=chat.prompt_ids(prompt.text)) for prompt in prompts]
    return [prompt for prompt in tokenised if 0 < len(prompt.token_ids) <= max_tokens]
