"""What is trained on: prompts, reward, the base's tokenizer. All that can be wrong with them is found here."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlora.base import context_length, load_tokenizer, locate, stop_token_ids
from rlora.config import Config
from rlora.plugin import load
from rlora.records import Prompt, Reward, RloraError


@dataclass(frozen=True)
class Task:
    base: str  # where the frozen base is loaded from
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    reward: Reward
    prompts: list[Prompt]  # to train on
    held_out: list[Prompt]  # the first `evaluate.prompts` of them
    dropped: int  # prompts left out because they are too long


def load_task(config: Config) -> Task:
    """Load env, reward and tokenizer. Raises RloraError that names the field where one of them is not usable."""
    reward = as_reward(config.reward, load("reward", config.reward))
    make_env = load("env", config.env)
    try:
        env = make_env(**config.env_args)
        train, held_out = list(env.train()), list(islice(env.held_out(), config.evaluate.prompts))
    except RloraError:
        raise
    except Exception as error:
        raise RloraError(
            f"env = {config.env!r} with env_args = {config.env_args!r}: it raised {type(error).__name__}: {error}; "
            "give the arguments that it takes, and let it have train() and held_out() that return Prompts"
        ) from error
    for method, prompts in (("train", train), ("held_out", held_out)):
        for prompt in prompts:
            _refuse_what_is_no_prompt(f"env = {config.env!r}: its {method}()", prompt)
    where = locate(config.model)
    limit = context_length(where)
    if limit is not None and config.max_model_len > limit:
        raise RloraError(
            f"sampling.max_prompt_tokens + sampling.max_tokens = {config.max_model_len}: "
            f"the context of {config.model} is {limit} tokens; lower one of them"
        )
    tokenizer = load_tokenizer(where)
    fitting = tokenise(train, tokenizer, config.sampling.max_prompt_tokens)
    fitting_held_out = tokenise(held_out, tokenizer, config.sampling.max_prompt_tokens)
    if not fitting:
        raise RloraError(
            f"env = {config.env!r}: none of its {len(train)} training prompts has 1 to "
            f"{config.sampling.max_prompt_tokens} tokens; raise sampling.max_prompt_tokens or look at the data"
        )
    return Task(
        base=where,
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids(where, tokenizer),
        reward=reward,
        prompts=fitting,
        held_out=fitting_held_out,
        dropped=len(train) - len(fitting) + len(held_out) - len(fitting_held_out),
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


def tokenise(prompts: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Prompt]:
    """The prompts of at most `max_tokens` tokens, with their `token_ids`. Text becomes tokens here and nowhere else.

    A plain string is one user message where the tokenizer has a chat template, and bare text where it has none.
    """
    tokenised = []
    ids: Any
    for prompt in prompts:
        if tokenizer.chat_template:
            text = prompt.text
            messages = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(turn) for turn in text]
            try:
                ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            except TemplateError as error:
                raise RloraError(
                    f"env: the model's chat template takes no {messages!r} ({error}); let the env give what it takes"
                ) from error
        elif isinstance(prompt.text, str):
            ids = tokenizer.encode(prompt.text)
        else:
            raise RloraError(
                "model: its tokenizer has no chat template, but the env's prompts are chat messages; "
                "use an instruct model, or an env whose prompts are plain strings"
            )
        if 0 < len(ids) <= max_tokens:
            tokenised.append(replace(prompt, token_ids=tuple(ids)))
    return tokenised


def as_reward(spec: str, function: Callable[..., Any]) -> Reward:
    """The function that `reward` = `spec` names as a Reward; its form is told by the names of its two parameters.

    `f(completion, answer) -> float` scores one completion, `f(completions, answers) -> list[float]` a whole group.
    """
    try:
        names = list(inspect.signature(function).parameters)[:2]
    except (TypeError, ValueError):
        names = []
    if names == ["completions", "answers"]:
        batch: Reward = function
        return batch
    if names == ["completion", "answer"]:
        return lambda completions, answers: [function(*pair) for pair in zip(completions, answers, strict=True)]
    raise RloraError(
        f"reward = {spec!r}: its first parameters are ({', '.join(names)}); "
        "write f(completion, answer) -> float, or f(completions, answers) -> list[float] for a whole group"
    )
