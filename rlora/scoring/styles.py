"""Calling convention of each style: the values that its functions get, and what they may return; see `signatures`."""

import json
import math
import numbers
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

from rlora.records import RewardInput
from rlora.scoring.results import FaultError, as_number, as_numbers, not_none, show


@dataclass(frozen=True)
class Call:
    """One call of a reward function: its inputs, and what a TRL function logs during the call."""

    inputs: RewardInput
    episodes: Sequence[int]  # indices in the group
    chat: bool = False  # TRL's conversational format
    metrics: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))  # from `log_metric`
    columns: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))  # from `log_extra`

    @property
    def episode(self) -> int:
        """Index of the first episode, which is the only one if the style's calls get one episode."""
        return self.episodes[0]

    def repeat(self, value: Any) -> list[Any]:
        """Return the value once per episode."""
        return [value] * len(self.episodes)

    def select(self, values: Sequence[Any]) -> list[Any]:
        """Return the values of this call's episodes. `values` has one value per episode of the group."""
        return [values[episode] for episode in self.episodes]

    def log_metric(self, name: str, value: Any) -> None:
        """Add a value to a metric, which is logged as the mean of its values."""
        self.metrics[name].append(value)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Add a column with a value per episode."""
        self.columns[column].extend(values)

    def logged(self, index: int) -> dict[str, float]:
        """Return the numbers to log for the episode at `index` of this call: each metric's mean, each column's item."""
        metrics = {name: [as_number(value) for value in values] for name, values in self.metrics.items()}
        means = {name: math.fsum(v) / len(v) for name, values in metrics.items() if (v := not_none(values))}
        return means | as_numbers({name: v[index] for name, v in self.columns.items() if index < len(v)})


@dataclass(frozen=True)
class _Style:
    """How functions of one style are called, and what they may return."""

    values: Mapping[str, Callable[[Call], Any]]  # compute a value for a call; by name, in the order of arguments
    description: str  # the signature, for errors
    one_at_a_time: bool = False  # each call gets one episode
    lists: bool = False  # values are lists, even with one episode per call
    columns: bool = False  # gets the prompt's columns by name
    allows_status: bool = False  # may return a status in place of a number
    allows_dict: bool = False  # may return a dict with "score"
    allows_none: bool = True  # may return None, which excludes the episode


class _EpisodeState(SimpleNamespace):
    """Stand-in for TRL's environment, with the items of the episode's `state` (`records.Agent.reply`) as attributes."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the episode's state has no {name!r}; set state[{name!r}] in the env's reply()")


def _prompt(call: Call, chat: bool = False) -> Any:
    text = call.inputs.prompt
    if (chat or call.chat) and isinstance(text, str):
        return [{"role": "user", "content": text}]
    return text if isinstance(text, str) else [dict(message) for message in text]


class _Message(dict[str, Any]):
    """A chat message whose items are also attributes, like those of verifiers."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"a chat message has no {name!r}; use one of {', '.join(self)}")


def _with_attributes(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert chat messages for verifiers' functions, which read items or attributes."""
    return [_Message(message) for message in messages]


def _messages(inputs: RewardInput, episode: int) -> list[dict[str, str]]:
    messages = inputs.messages[episode] if inputs.messages else ()
    return [dict(message) for message in messages] or [{"role": "assistant", "content": inputs.completions[episode]}]


def _responses(call: Call) -> list[str]:
    """Return all text after the prompt, per episode; in a single turn, the completion."""
    return call.select(call.inputs.responses or call.inputs.completions)


def _queries(call: Call) -> list[str]:
    """Return the prompt and all text after the prompt, with special tokens, per episode."""
    if call.inputs.queries:
        return call.select(call.inputs.queries)
    return [call.inputs.prompt_text + text for text in call.select(call.inputs.completions)]


def _ids(call: Call) -> list[list[int]]:
    return [list(ids) for ids in call.select(call.inputs.completion_ids)]


def text_answer(call: Call) -> Any:
    """Return the answer as in data sets of other frameworks, where numbers are text."""
    answer = call.inputs.answer
    is_number = isinstance(answer, (numbers.Number, Decimal)) and not isinstance(answer, bool)
    return str(answer) if is_number else deepcopy(answer)


def _column(call: Call, name: str, default: Callable[[Call], Any]) -> Any:
    columns = call.inputs.columns
    return deepcopy(columns[name]) if name in columns else default(call)


def _data_source(call: Call) -> Any:
    return _column(call, "data_source", lambda call: "")


def _ground_truth(call: Call) -> Any:
    return _column(call, "ground_truth", text_answer)


def _extra_infos(call: Call) -> list[dict[str, Any]]:
    """Return the column `extra_info`, or all columns, with verl's keys `num_turns` and `rollout_reward_scores`."""
    column = _column(call, "extra_info", lambda call: deepcopy(dict(call.inputs.columns)))
    if not isinstance(column, Mapping | None):
        raise FaultError(
            f"needs extra_info, and the prompt's column extra_info is {show(column)}; make the column a dict"
        )
    turns = [1 + len(_messages(call.inputs, episode)) for episode in call.episodes]
    return [{**deepcopy(column or {}), "num_turns": count, "rollout_reward_scores": {}} for count in turns]


def _info(call: Call) -> Any:
    """Return verifiers' `info`, a dict, which data sets can contain as JSON."""
    column = _column(call, "info", lambda call: {})
    try:
        info = json.loads(column) if isinstance(column, str) else column or {}
    except ValueError:
        info = column
    if not isinstance(info, Mapping):
        raise FaultError(
            f"needs info, and the prompt's column info is {show(column)}; make the column a dict, or a dict as JSON"
        )
    return info


def _task(call: Call) -> Any:
    return _column(call, "task", lambda call: "default")


def _verifiers_state(call: Call, episode: int) -> dict[str, Any]:
    """Return verifiers' `state`: the env's state of the episode, and the rollout."""
    rollout = {
        "prompt": _with_attributes(_prompt(call, chat=True)),
        "completion": _with_attributes(_messages(call.inputs, episode)),
    }
    rollout |= {"answer": text_answer(call), "info": _info(call), "task": _task(call)}
    return {**deepcopy(dict(call.inputs.states[episode])), **rollout}


_PROMPT_VALUES: dict[str, Callable[[Call], Any]] = {
    "answer": lambda call: deepcopy(call.inputs.answer),
    "prompt": _prompt,
    "prompt_text": lambda call: call.inputs.prompt_text,
    "step": lambda call: call.inputs.step,
    "steps": lambda call: call.inputs.steps,
}
STYLES: dict[str, _Style] = {
    "completion": _Style(
        {
            "completion": lambda call: call.inputs.completions[call.episode],
            **_PROMPT_VALUES,
            "completion_ids": lambda call: list(call.inputs.completion_ids[call.episode]),
            "messages": lambda call: _messages(call.inputs, call.episode),
            "state": lambda call: deepcopy(dict(call.inputs.states[call.episode])),
        },
        "f(completion, answer) -> float for one completion",
        one_at_a_time=True, columns=True, allows_status=True, allows_dict=True,
    ),
    "group": _Style(
        {
            "completions": lambda call: call.select(call.inputs.completions),
            "answers": lambda call: [deepcopy(call.inputs.answer) for _ in call.episodes],
            **_PROMPT_VALUES,
            "completion_ids": _ids,
            "messages": lambda call: [_messages(call.inputs, episode) for episode in call.episodes],
            "states": lambda call: [deepcopy(dict(state)) for state in call.select(call.inputs.states)],
        },
        "f(completions, answers) -> list[float] for a group",
        columns=True, allows_status=True, allows_dict=True,
    ),
    "trl": _Style(
        {
            "prompts": lambda call: [_prompt(call) for _ in call.episodes],
            "completions": lambda call: (
                [_messages(call.inputs, episode) for episode in call.episodes]
                if call.chat
                else call.select(call.inputs.completions)
            ),
            "completion_ids": _ids,
            "completions_ids": _ids,  # the spelling of TRL's documentation until 0.20
            "trainer_state": lambda call: SimpleNamespace(
                global_step=call.inputs.step, max_steps=call.inputs.steps, epoch=call.inputs.epoch
            ),
            "environments": lambda call: [
                _EpisodeState(**deepcopy(dict(state))) for state in call.select(call.inputs.states)
            ],
            "log_extra": lambda call: call.log_extra,
            "log_metric": lambda call: call.log_metric,
        },
        "TRL's f(prompts, completions, **kwargs) -> list[float | None]",
        columns=True,
    ),
    "verl": _Style(
        {
            "data_source": _data_source,
            "solution_str": lambda call: _responses(call)[0],
            "ground_truth": _ground_truth,
            "extra_info": lambda call: _extra_infos(call)[0],
        },
        "verl's f(data_source, solution_str, ground_truth, extra_info) -> float | dict",
        one_at_a_time=True, allows_dict=True, allows_none=False,
    ),
    "verl-batch": _Style(
        {
            "data_sources": lambda call: call.repeat(_data_source(call)),
            "solution_strs": _responses,
            "ground_truths": lambda call: [_ground_truth(call) for _ in call.episodes],
            "extra_infos": _extra_infos,
        },
        "verl's f(data_sources, solution_strs, ground_truths, extra_infos) -> list",
        allows_dict=True, allows_none=False,
    ),
    "openrlhf": _Style(
        {
            "queries": _queries,
            "prompts": lambda call: call.repeat(call.inputs.prompt_text),
            "labels": lambda call: [text_answer(call) for _ in call.episodes],
        },
        "OpenRLHF's f(queries, prompts, labels) -> tensor | dict",
        one_at_a_time=True, lists=True, allows_none=False,
    ),
    "verifiers": _Style(
        {
            "completion": lambda call: _with_attributes(_messages(call.inputs, call.episode)),
            "answer": text_answer,
            "prompt": lambda call: _with_attributes(_prompt(call, chat=True)),
            "info": _info,
            "task": _task,
            "state": lambda call: _verifiers_state(call, call.episode),
        },
        "verifiers' f(completion, answer, prompt, info, state) -> float, on messages",
        one_at_a_time=True, columns=True, allows_none=False,
    ),
    "verifiers-group": _Style(
        {
            "completions": lambda call: [
                _with_attributes(_messages(call.inputs, episode)) for episode in call.episodes
            ],
            "answers": lambda call: [text_answer(call) for _ in call.episodes],
            "prompts": lambda call: [_with_attributes(_prompt(call, chat=True)) for _ in call.episodes],
            "infos": lambda call: [_info(call) for _ in call.episodes],
            "tasks": lambda call: [_task(call) for _ in call.episodes],
            "states": lambda call: [_verifiers_state(call, episode) for episode in call.episodes],
        },
        "verifiers' f(completions, answers, prompts, infos, states) -> list[float], on lists of messages",
        allows_none=False,
    ),
    "areal": _Style(
        {
            "prompt": lambda call: call.inputs.prompt_text,
            "completions": lambda call: _responses(call)[0],
            "prompt_ids": lambda call: list(call.inputs.prompt_ids),
            "completion_ids": lambda call: _ids(call)[0],
        },
        "AReaL's f(prompt, completions, prompt_ids, completion_ids, answer, **kwargs) -> float, for one completion",
        one_at_a_time=True, columns=True, allows_none=False,
    ),
}  # fmt: skip
_BUILD = "create the object in the function's file, and remove the parameter or give the parameter a default"
UNAVAILABLE = {  # values that other frameworks pass and rlora does not have, with the fix
    "trl": {"environments": "use an agent (an env with reply()), or return the data as a column of the prompts"},
    "verl": {
        "reward_router_address": "set reward_args.reward_router_address to the address of your reward model",
        "reward_model_tokenizer": _BUILD,
    },
    "verifiers": {"parser": _BUILD, "judge": _BUILD, "judge_client": _BUILD},
}
UNAVAILABLE |= {"verl-batch": UNAVAILABLE["verl"], "verifiers-group": UNAVAILABLE["verifiers"]}
