"""What is trained on: prompts, rewards, the base's tokenizer. All that can be wrong with them is found here."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rlora.base import context_length, load_tokenizer, locate, stop_token_ids
from rlora.chat import Chat
from rlora.config import Config
from rlora.plugin import at, load
from rlora.records import Prompt, RloraError
from rlora.rewards.isolation import Pool
from rlora.rewards.worker import Setup


@dataclass(frozen=True)
class Task:
    base: str  # where the frozen base is loaded from
    chat: Chat
    stop: tuple[str, ...]  # strings that end the policy's message
    agent: bool  # whether the env answers it
    prompts: list[Prompt]  # to train on
    held_out: list[Prompt]  # the first `evaluate.prompts` of them
    dropped: int  # prompts left out because they are too long


def load_task(config: Config) -> Task:
    """Load env and tokenizer, and try the reward functions. Raises RloraError that names the field at fault."""
    make_env = load("env", config.env)
    try:
        env = make_env(**config.env_args)
        train, held_out = list(env.train()), list(islice(env.held_out(), config.evaluate.prompts))
    except RloraError:
        raise
    except Exception as error:
        module = getattr(sys.modules[make_env.__module__], "__file__", None) or ""
        line = at(error, config.env.rpartition(":")[0], module)
        raise RloraError(
            f"{line}env = {config.env!r} with env_args = {config.env_args!r}: it raised {type(error).__name__}: "
            f"{error}; give the arguments that it takes, and let it have train() and held_out() that return Prompts"
        ) from error
    for method, prompts in (("train", train), ("held_out", held_out)):
        for prompt in prompts:
            _refuse_what_is_no_prompt(f"env = {config.env!r}: its {method}()", prompt)
    agent = hasattr(env, "reply")
    with closing(Pool(setup_of(config, agent), 1)):  # as it is in the run: only to see that all can be loaded
        pass
    where = locate(config.model)
    limit = context_length(where)
    if limit is not None and config.max_model_len > limit:
        raise RloraError(
            f"sampling.max_prompt_tokens + sampling.max_tokens = {config.max_model_len}: "
            f"the context of {config.model} is {limit} tokens; lower one of them"
        )
    tokenizer = load_tokenizer(where)
    chat = Chat(tokenizer, config.chat, stop_token_ids(where, tokenizer))
    fitting = tokenise(train, chat, config.sampling.max_prompt_tokens)
    fitting_held_out = tokenise(held_out, chat, config.sampling.max_prompt_tokens)
    if not fitting:
        raise RloraError(
            f"env = {config.env!r}: none of its {len(train)} training prompts has 1 to "
            f"{config.sampling.max_prompt_tokens} tokens; raise sampling.max_prompt_tokens or look at the data"
        )
    return Task(
        base=where,
        chat=chat,
        stop=(*getattr(env, "stop", ()), *config.chat.stop),
        agent=agent,
        prompts=fitting,
        held_out=fitting_held_out,
        dropped=len(train) - len(fitting) + len(held_out) - len(fitting_held_out),
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
        memory_mib=config.scoring.memory_mib,
        concurrency=config.scoring.concurrency,
    )


def _refuse_what_is_no_prompt(source: str, given: Any) -> None:
    """Raise RloraError where an env's method, `source`, gives anything but a Prompt of text or chat messages."""
    if not isinstance(given, Prompt):
        raise RloraError(f"{source} gave {given!r}; give a rlora.records.Prompt(text, answer) for each problem")
    text: Any = given.text
    if not isinstance(text, str) and not (isinstance(text, Sequence) and text and all(map(_is_message, text))):
        raise RloraError(
            f"{source} gave a Prompt whose text is {text!r}; give a string, or a list of chat messages, "
            '{"role": ..., "content": ...} with a string each'
        )


def _is_message(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))


def tokenise(prompts: Iterable[Prompt], chat: Chat, max_tokens: int) -> list[Prompt]:
    """The prompts of at most `max_tokens` tokens, with their `token_ids`."""
    tokenised = [replace(prompt, token_ids=chat.prompt_ids(prompt.text)) for prompt in prompts]
    return [prompt for prompt in tokenised if 0 < len(prompt.token_ids) <= max_tokens]
