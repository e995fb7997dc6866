"""The values that functions of each style get, by name, and what they may return; `signatures` has the table."""

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
from rlora.scoring.results import FaultError, as_number, as_numbers, known, show


@dataclass(frozen=True)
class Call:
    """One call of a function: of which episodes, and what it logs."""

    case: RewardInput
    episodes: Sequence[int]
    chat: bool = False  # TRL's conversational format
    metrics: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    columns: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))

    @property
    def only(self) -> int:
        return self.episodes[0]

    def each(self, value: Any) -> list[Any]:
        """It, for each episode."""
        return [value] * len(self.episodes)

    def of(self, values: Sequence[Any]) -> list[Any]:
        """Those of its episodes."""
        return [values[episode] for episode in self.episodes]

    def log_metric(self, name: str, value: Any) -> None:
        self.metrics[name].append(value)

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        self.columns[column].extend(values)

    def logged(self, place: int) -> dict[str, float]:
        """What was logged of the episode at a place: the means of metrics, and its value of a column of numbers."""
        of_metrics = {name: [as_number(value) for value in values] for name, values in self.metrics.items()}
        means = {name: math.fsum(v) / len(v) for name, values in of_metrics.items() if (v := known(values))}
        return means | as_numbers({name: v[place] for name, v in self.columns.items() if place < len(v)})


@dataclass(frozen=True)
class _Form:
    """How functions of one style are called, and what they may return."""

    values: Mapping[str, Callable[[Call], Any]]  # what there is by name; for strange names by position, in this order
    about: str
    one_at_a_time: bool = False
    lists: bool = False  # of one, where it is called with one at a time
    columns: bool = False  # whether it gets the prompt's by name
    statuses: bool = False  # may return a status in place of a number
    dicts: bool = False  # or a dict
    nothing: bool = True  # or None


class _State(SimpleNamespace):
    """An agent's episode, where TRL gives its environment: what `reply` has kept in `state` are its attributes."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the episode's state has no {name!r}; let the env's reply keep it there")


def _prompt(call: Call, chat: bool = False) -> Any:
    text = call.case.prompt
    if (chat or call.chat) and isinstance(text, str):
        return [{"role": "user", "content": text}]
    return text if isinstance(text, str) else [dict(turn) for turn in text]


class _Message(dict[str, Any]):
    """A chat message whose items are also its attributes, as verifiers' messages have them."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"a message has no {name!r}, only {', '.join(self)}")


def _both(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Chat messages for verifiers' functions, which read them as dicts or by attributes."""
    return [_Message(message) for message in messages]


def _messages(case: RewardInput, episode: int) -> list[dict[str, str]]:
    said = case.messages[episode] if case.messages else ()
    return [dict(turn) for turn in said] or [{"role": "assistant", "content": case.completions[episode]}]


def _responses(call: Call) -> list[str]:
    """All that followed the prompt: of one turn the completion."""
    return call.of(call.case.responses or call.case.completions)


def _queries(call: Call) -> list[str]:
    """The prompt and all that followed it, special tokens included."""
    if call.case.queries:
        return call.of(call.case.queries)
    return [call.case.prompt_text + text for text in call.of(call.case.completions)]


def _ids(call: Call) -> list[list[int]]:
    return [list(ids) for ids in call.of(call.case.completion_ids)]


def text_answer(call: Call) -> Any:
    """The answer as other frameworks' data sets hold it: a number is text."""
    answer = call.case.answer
    is_number = isinstance(answer, (numbers.Number, Decimal)) and not isinstance(answer, bool)
    return str(answer) if is_number else deepcopy(answer)


def _column(call: Call, name: str, default: Callable[[Call], Any]) -> Any:
    columns = call.case.columns
    return deepcopy(columns[name]) if name in columns else default(call)


def _data_source(call: Call) -> Any:
    return _column(call, "data_source", lambda call: "")


def _ground_truth(call: Call) -> Any:
    return _column(call, "ground_truth", text_answer)


def _extra_infos(call: Call) -> list[dict[str, Any]]:
    """The column, or all columns, and what verl adds: how many turns there were, and rewards of tools (none here)."""
    given = _column(call, "extra_info", lambda call: deepcopy(dict(call.case.columns)))
    if not isinstance(given, Mapping | None):
        raise FaultError(f"needs extra_info, and the prompt's column is {show(given)}; let it be a dict")
    turns = [1 + len(_messages(call.case, episode)) for episode in call.episodes]
    return [{**deepcopy(given or {}), "num_turns": count, "rollout_reward_scores": {}} for count in turns]


def _info(call: Call) -> Any:
    """verifiers' `info`, a dict that data sets hold as JSON too."""
    given = _column(call, "info", lambda call: {})
    try:
        info = json.loads(given) if isinstance(given, str) else given or {}
    except ValueError:
        info = given
    if not isinstance(info, Mapping):
        raise FaultError(f"needs info, and the prompt's column is {show(given)}; let it be a dict, or one as JSON")
    return info


def _task(call: Call) -> Any:
    return _column(call, "task", lambda call: "default")


def _state(call: Call, episode: int) -> dict[str, Any]:
    """verifiers' `state`: what the env kept, and what the rollout is of."""
    rollout = {"prompt": _both(_prompt(call, chat=True)), "completion": _both(_messages(call.case, episode))}
    rollout |= {"answer": text_answer(call), "info": _info(call), "task": _task(call)}
    return {**deepcopy(dict(call.case.states[episode])), **rollout}


_OF_PROMPT: dict[str, Callable[[Call], Any]] = {
    "answer": lambda call: deepcopy(call.case.answer),
    "prompt": _prompt,
    "prompt_text": lambda call: call.case.prompt_text,
    "step": lambda call: call.case.step,
    "steps": lambda call: call.case.steps,
}
FORMS: dict[str, _Form] = {
    "completion": _Form(
        {
            "completion": lambda call: call.case.completions[call.only],
            **_OF_PROMPT,
            "completion_ids": lambda call: list(call.case.completion_ids[call.only]),
            "messages": lambda call: _messages(call.case, call.only),
            "state": lambda call: deepcopy(dict(call.case.states[call.only])),
        },
        "f(completion, answer) -> float for one completion",
        one_at_a_time=True, columns=True, statuses=True, dicts=True,
    ),
    "group": _Form(
        {
            "completions": lambda call: call.of(call.case.completions),
            "answers": lambda call: [deepcopy(call.case.answer) for _ in call.episodes],
            **_OF_PROMPT,
            "completion_ids": _ids,
            "messages": lambda call: [_messages(call.case, episode) for episode in call.episodes],
            "states": lambda call: [deepcopy(dict(state)) for state in call.of(call.case.states)],
        },
        "f(completions, answers) -> list[float] for a group",
        columns=True, statuses=True, dicts=True,
    ),
    "trl": _Form(
        {
            "prompts": lambda call: [_prompt(call) for _ in call.episodes],
            "completions": lambda call: (
                [_messages(call.case, episode) for episode in call.episodes]
                if call.chat
                else call.of(call.case.completions)
            ),
            "completion_ids": _ids,
            "completions_ids": _ids,  # as TRL's documentation spelt it until 0.20
            "trainer_state": lambda call: SimpleNamespace(
                global_step=call.case.step, max_steps=call.case.steps, epoch=call.case.epoch
            ),
            "environments": lambda call: [_State(**deepcopy(dict(state))) for state in call.of(call.case.states)],
            "log_extra": lambda call: call.log_extra,
            "log_metric": lambda call: call.log_metric,
        },
        "TRL's f(prompts, completions, **kwargs) -> list[float | None]",
        columns=True,
    ),
    "verl": _Form(
        {
            "data_source": _data_source,
            "solution_str": lambda call: _responses(call)[0],
            "ground_truth": _ground_truth,
            "extra_info": lambda call: _extra_infos(call)[0],
        },
        "verl's f(data_source, solution_str, ground_truth, extra_info) -> float | dict",
        one_at_a_time=True, dicts=True, nothing=False,
    ),
    "verl-batch": _Form(
        {
            "data_sources": lambda call: call.each(_data_source(call)),
            "solution_strs": _responses,
            "ground_truths": lambda call: [_ground_truth(call) for _ in call.episodes],
            "extra_infos": _extra_infos,
        },
        "verl's f(data_sources, solution_strs, ground_truths, extra_infos) -> list",
        dicts=True, nothing=False,
    ),
    "openrlhf": _Form(
        {
            "queries": _queries,
            "prompts": lambda call: call.each(call.case.prompt_text),
            "labels": lambda call: [text_answer(call) for _ in call.episodes],
        },
        "OpenRLHF's f(queries, prompts, labels) -> tensor | dict",
        one_at_a_time=True, lists=True, nothing=False,
    ),
    "verifiers": _Form(
        {
            "completion": lambda call: _both(_messages(call.case, call.only)),
            "answer": text_answer,
            "prompt": lambda call: _both(_prompt(call, chat=True)),
            "info": _info,
            "task": _task,
            "state": lambda call: _state(call, call.only),
        },
        "verifiers' f(completion, answer, prompt, info, state) -> float, of messages",
        one_at_a_time=True, columns=True, nothing=False,
    ),
    "verifiers-group": _Form(
        {
            "completions": lambda call: [_both(_messages(call.case, episode)) for episode in call.episodes],
            "answers": lambda call: [text_answer(call) for _ in call.episodes],
            "prompts": lambda call: [_both(_prompt(call, chat=True)) for _ in call.episodes],
            "infos": lambda call: [_info(call) for _ in call.episodes],
            "tasks": lambda call: [_task(call) for _ in call.episodes],
            "states": lambda call: [_state(call, episode) for episode in call.episodes],
        },
        "verifiers' f(completions, answers, prompts, infos, states) -> list[float], of lists of messages",
        nothing=False,
    ),
    "areal": _Form(
        {
            "prompt": lambda call: call.case.prompt_text,
            "completions": lambda call: _responses(call)[0],
            "prompt_ids": lambda call: list(call.case.prompt_ids),
            "completion_ids": lambda call: _ids(call)[0],
        },
        "AReaL's f(prompt, completions, prompt_ids, completion_ids, answer, **kwargs) -> float, of one completion",
        one_at_a_time=True, columns=True, nothing=False,
    ),
}  # fmt: skip
_LOAD = "load it in your file, and let the function take no such parameter or have a default for it"
NOT_HERE = {  # what others give, and rlora does not have: what to do
    "trl": {"environments": "there are none without an agent, an env with reply(); give what it needs as a column"},
    "verl": {
        "reward_router_address": "rlora serves no reward model; give yours as reward_args.reward_router_address",
        "reward_model_tokenizer": _LOAD,
    },
    "verifiers": {"parser": f"a rubric's parser is not known here; {_LOAD}", "judge": _LOAD, "judge_client": _LOAD},
}
NOT_HERE |= {"verl-batch": NOT_HERE["verl"], "verifiers-group": NOT_HERE["verifiers"]}
