"""Reward functions in the forms in which users have them, called unchanged.

    style       told by a parameter called                 called with, always by name, and only what it takes
    completion  completion, completion_ids, messages,      these, of one episode, and what belongs to its prompt
                state
    group       completions, answers, states               these and completion_ids, messages as lists over the
                                                           episodes, and what belongs to the prompt
    trl         prompts, log_extra, log_metric,            these and completion_ids as lists, and each column as a list
                trainer_state; or completions and **kwargs
    verl        solution_str                               data_source, solution_str, ground_truth, extra_info
    verl-batch  solution_strs                              data_sources, ... as lists
    openrlhf    queries                                    queries, prompts, labels as lists of one
    verifiers   completion, read as messages; parser       completion and prompt as messages, answer, info, task,
                                                           state, and the prompt's columns
    verifiers-  completions or answers, infos, tasks, with each of these as a list, by its name in plural
    group       completions read as lists of messages
    areal       prompt_ids                                 prompt, completions (text), prompt_ids, completion_ids of one
                                                           episode, and the prompt's columns

What belongs to a prompt is `answer`, `prompt` (text or messages, as the env gave it), `prompt_text` (as the policy read
it), `step` and `steps` of the run, and each of the prompt's columns by its name: one value, for a group too.

TRL's trainer passes everything to every function, so its functions end in `**kwargs`. That tells `f(completions,
answers, **kwargs)` (TRL's) from `f(completions, answers)` (ours). Where prompts are chat messages, they get messages;
where they are plain strings, strings, unless the function reads the "content" of messages: rlora sends a plain string
as a user's message, so both kinds are written for it. verifiers' functions have the names of ours and take messages
where ours take text: their source tells them, by `completion[-1]["content"]` and the like.

A parameter of a function of TRL's or AReaL's that is called like an answer, but is no column, gets the answer. Where
functions of others get an answer that is a number, they get its text, as their data sets hold it.

A function of ours returns for each episode a finite number, a bool, a status of `records.STATUSES`, None where it has
nothing to say of it, or a dict with "score" (a number) or "status", whose other numbers are logged. The others return
what they may where they come from; of TRL's NaN is None. Whatever else they return or raise makes a Score of status
"error". What a function can't get here, such as a parser that verifiers' rubrics make, is refused when it is loaded.

Sources: TRL, docs/source/grpo_trainer.md and GRPOTrainer._calculate_rewards; verl,
docs/preparation/reward_function.rst, its reward managers `naive` and `batch`, and its reward loop; OpenRLHF,
examples/python/reward_func.py and math_reward_func.py, and SingleTurnAgentExecutor, which gives lists of one;
verifiers, docs/v0/environments.md and Rubric.score_objects; AReaL, docs/en/customization/reward.md and areal/reward.
"""

import asyncio
import dis
import functools
import inspect
import json
import math
import numbers
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from decimal import Decimal
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

from rlora.plugin import where
from rlora.records import STATUSES, Case, RloraError, Score, Style
from rlora.scoring.source import Fields, Many, takes_messages

_ANSWERS = ("solution", "solutions", "ground_truth", "answer", "answers", "label", "labels", "target")


@dataclass(frozen=True)
class _Call:
    """One call of a function: of which episodes, and what it logs."""

    case: Case
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
        of_metrics = {name: [_number(value) for value in values] for name, values in self.metrics.items()}
        means = {name: math.fsum(v) / len(v) for name, values in of_metrics.items() if (v := _known(values))}
        return means | _numbers({name: v[place] for name, v in self.columns.items() if place < len(v)})


@dataclass(frozen=True)
class _Form:
    """How functions of one style are called, and what they may return."""

    values: Mapping[str, Callable[[_Call], Any]]  # what there is by name; for strange names by position, in this order
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


def _prompt(call: _Call, chat: bool = False) -> Any:
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


def _messages(case: Case, episode: int) -> list[dict[str, str]]:
    said = case.messages[episode] if case.messages else ()
    return [dict(turn) for turn in said] or [{"role": "assistant", "content": case.completions[episode]}]


def _responses(call: _Call) -> list[str]:
    """All that followed the prompt: of one turn the completion."""
    return call.of(call.case.responses or call.case.completions)


def _queries(call: _Call) -> list[str]:
    """The prompt and all that followed it, special tokens included."""
    if call.case.queries:
        return call.of(call.case.queries)
    return [call.case.prompt_text + text for text in call.of(call.case.completions)]


def _ids(call: _Call) -> list[list[int]]:
    return [list(ids) for ids in call.of(call.case.completion_ids)]


def _text_answer(call: _Call) -> Any:
    """The answer as other frameworks' data sets hold it: a number is text."""
    answer = call.case.answer
    is_number = isinstance(answer, (numbers.Number, Decimal)) and not isinstance(answer, bool)
    return str(answer) if is_number else deepcopy(answer)


def _column(call: _Call, name: str, default: Callable[[_Call], Any]) -> Any:
    columns = call.case.columns
    return deepcopy(columns[name]) if name in columns else default(call)


def _data_source(call: _Call) -> Any:
    return _column(call, "data_source", lambda call: "")


def _ground_truth(call: _Call) -> Any:
    return _column(call, "ground_truth", _text_answer)


def _extra_infos(call: _Call) -> list[dict[str, Any]]:
    """The column, or all columns, and what verl adds: how many turns there were, and rewards of tools (none here)."""
    given = _column(call, "extra_info", lambda call: deepcopy(dict(call.case.columns)))
    if not isinstance(given, Mapping | None):
        raise _FaultError(f"needs extra_info, and the prompt's column is {_shown(given)}; let it be a dict")
    turns = [1 + len(_messages(call.case, episode)) for episode in call.episodes]
    return [{**deepcopy(given or {}), "num_turns": count, "rollout_reward_scores": {}} for count in turns]


def _info(call: _Call) -> Any:
    """verifiers' `info`, a dict that data sets hold as JSON too."""
    given = _column(call, "info", lambda call: {})
    try:
        info = json.loads(given) if isinstance(given, str) else given or {}
    except ValueError:
        info = given
    if not isinstance(info, Mapping):
        raise _FaultError(f"needs info, and the prompt's column is {_shown(given)}; let it be a dict, or one as JSON")
    return info


def _task(call: _Call) -> Any:
    return _column(call, "task", lambda call: "default")


def _state(call: _Call, episode: int) -> dict[str, Any]:
    """verifiers' `state`: what the env kept, and what the rollout is of."""
    rollout = {"prompt": _both(_prompt(call, chat=True)), "completion": _both(_messages(call.case, episode))}
    rollout |= {"answer": _text_answer(call), "info": _info(call), "task": _task(call)}
    return {**deepcopy(dict(call.case.states[episode])), **rollout}


_OF_PROMPT: dict[str, Callable[[_Call], Any]] = {
    "answer": lambda call: deepcopy(call.case.answer),
    "prompt": _prompt,
    "prompt_text": lambda call: call.case.prompt_text,
    "step": lambda call: call.case.step,
    "steps": lambda call: call.case.steps,
}
_FORMS: dict[str, _Form] = {
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
            "labels": lambda call: [_text_answer(call) for _ in call.episodes],
        },
        "OpenRLHF's f(queries, prompts, labels) -> tensor | dict",
        one_at_a_time=True, lists=True, nothing=False,
    ),
    "verifiers": _Form(
        {
            "completion": lambda call: _both(_messages(call.case, call.only)),
            "answer": _text_answer,
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
            "answers": lambda call: [_text_answer(call) for _ in call.episodes],
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
_NOT_HERE = {  # what others give, and rlora does not have: what to do
    "trl": {"environments": "there are none without an agent, an env with reply(); give what it needs as a column"},
    "verl": {
        "reward_router_address": "rlora serves no reward model; give yours as reward_args.reward_router_address",
        "reward_model_tokenizer": _LOAD,
    },
    "verifiers": {"parser": f"a rubric's parser is not known here; {_LOAD}", "judge": _LOAD, "judge_client": _LOAD},
}
_NOT_HERE |= {"verl-batch": _NOT_HERE["verl"], "verifiers-group": _NOT_HERE["verifiers"]}


_TAKES = {  # what stands for a completion
    "completion": "a string", "group": "a string", "areal": "a string",
    "verifiers": "a list of messages", "verifiers-group": "a list of messages",
}  # fmt: skip


class _FaultError(Exception):
    """A function can't be called, or has returned what it may not. Its text says what, and what to do."""


@dataclass(frozen=True)
class Plug:
    """A user's reward function as rlora calls it."""

    spec: str
    name: str  # of its part of the reward: as `spec` names it
    style: str  # never "auto"
    asynchronous: bool  # a coroutine function: `acall` it
    function: Callable[..., Any]
    args: Mapping[str, Any]  # those of the config that it takes
    takes: frozenset[str]  # names that the config's args may have
    wanted: tuple[str, ...]  # what it gets of its style's values, by name
    positional: int  # how many of these it gets by position
    columns: frozenset[str]  # by which names it gets columns, if they are there
    anything: bool  # has **kwargs: it gets all columns
    required: frozenset[str]  # parameters without a default
    chat: bool  # reads completions as TRL's messages

    @property
    def one_at_a_time(self) -> bool:
        """Whether it is called with one episode at a time, else with all that are asked for."""
        return _FORMS[self.style].one_at_a_time

    @property
    def names(self) -> frozenset[str]:
        """The names by which it asks for values: of parameters, and where it gets a mapping, of keys in its code.

        What takes two values by position takes the answer second, whatever that is called. A parameter that the style
        demands counts where the code uses it.
        """
        named = set(_parameters(self.function) or {}) | ({"answer"} if self.positional > 1 else set())
        code = _code(self.function)
        if not code:
            return frozenset(named)
        if self.style not in ("completion", "group", "trl"):
            named -= set(_FORMS[self.style].values) - _used(code)
        if self.anything or not {"extra_info", "extra_infos", "info", "infos"}.isdisjoint(named):
            codes = _codes(code, getattr(_bare(self.function), "__globals__", {}))
            named |= {text for each in codes for text in each.co_consts if isinstance(text, str)}
        return frozenset(named)

    def __call__(self, case: Case, episodes: Sequence[int]) -> list[Score]:
        """A Score for each of those episodes of the group, an "error" for those of a call that fails.

        It lets pass what is neither an Exception nor SystemExit, so KeyboardInterrupt and what a deadline may raise.
        Not within a running event loop where the function is asynchronous.
        """
        if self.asynchronous:
            return asyncio.run(self.acall(case, episodes))
        scores: list[Score] = []
        for call in self._calls(case, episodes):
            try:
                scores += self._scores(self._start(call), call)
            except (Exception, SystemExit) as error:
                scores += call.each(self._error(error, call))
        return scores

    async def acall(self, case: Case, episodes: Sequence[int]) -> list[Score]:
        """The same where the function is asynchronous; one call after the other."""
        scores: list[Score] = []
        for call in self._calls(case, episodes):
            try:
                scores += self._scores(await self._start(call), call)
            except (Exception, SystemExit) as error:
                scores += call.each(self._error(error, call))
        return scores

    def _calls(self, case: Case, episodes: Sequence[int]) -> list[_Call]:
        chat = self.style == "trl" and (self.chat or not isinstance(case.prompt, str))
        return [_Call(case, of, chat) for of in ([[one] for one in episodes] if self.one_at_a_time else [episodes])]

    def _start(self, call: _Call) -> Any:
        """Call the function. Everything that it gets is a copy: what it does to that is its own affair."""
        values = _FORMS[self.style].values
        got = {name: values[name](call) for name in self.wanted}
        if _FORMS[self.style].columns:
            got |= self._columns(call)
        got |= self.args
        missing = self.required.difference(got)
        if missing:
            raise _FaultError(
                f"needs {', '.join(sorted(missing))}, but the prompt's columns are "
                f"({', '.join(call.case.columns)}); let the env give such a column, or give the parameter a default"
            )
        by_place = [got.pop(name) for name in self.wanted[: self.positional]]
        return self.function(*by_place, **got)

    def _columns(self, call: _Call) -> dict[str, Any]:
        given = call.case.columns
        names = [name for name in given if name in self.columns or (self.anything and name not in self.wanted)]
        if self.style not in ("trl", "areal"):
            return {name: deepcopy(given[name]) for name in names}
        answers = [n for n in _ANSWERS if n not in given and (n in self.columns or (self.anything and n == "answer"))]
        lists = [
            {name: deepcopy(given[name]) for name in names} | {name: _text_answer(call) for name in answers}
            for _ in call.episodes
        ]
        return lists[0] if self.style == "areal" else {name: [each[name] for each in lists] for name in lists[0]}

    def _scores(self, result: Any, call: _Call) -> list[Score]:
        """Raises _FaultError where the result is not what a function of the style returns."""
        logs: Mapping[str, Any] = {}
        if self.style == "openrlhf" and isinstance(result, Mapping):
            logs = {"scores": result.get("scores"), **(result.get("extra_logs") or {})}
            result = result.get("rewards")
        alone = self.one_at_a_time and (not _FORMS[self.style].lists or _number(result) is not None)
        values = [result] if alone else _listed(result, len(call.episodes))
        scores = [self._score(value) for value in values]
        for place, score in enumerate(scores):
            logged = call.logged(place) | _numbers({name: _at(value, place) for name, value in logs.items()})
            scores[place] = replace(score, extra={**score.extra, **logged}) if logged else score
        return scores

    def _score(self, value: Any) -> Score:
        form = _FORMS[self.style]
        if value is None and form.nothing:
            return Score()
        if isinstance(value, str) and value in STATUSES and form.statuses:
            return Score(status=value)
        if isinstance(value, Mapping) and form.dicts:
            return self._score_of(value)
        number = _number(value)
        if number is None and self.style == "trl" and _is_nan(value):
            return Score()
        if number is None:
            may = [
                *(["None"] if form.nothing else []),
                *([f"one of {', '.join(STATUSES)}"] if form.statuses else []),
                *(['a dict with "score"'] if form.dicts else []),
            ]
            raise _FaultError(f"returned {_shown(value)}; let it return {' or '.join(['a finite number', *may])}")
        return Score(value=number)

    def _score_of(self, value: Mapping[Any, Any]) -> Score:
        status = value.get("status") if _FORMS[self.style].statuses else None
        score = value.get("score")
        number = _number(score)
        if status is None and score is None:
            raise _FaultError('returned a dict without "score"; let it have that, a finite number')
        if status is not None and status not in STATUSES:
            raise _FaultError(f'returned a dict whose "status" is {_shown(status)}; use one of {", ".join(STATUSES)}')
        if score is not None and number is None:
            raise _FaultError(f'returned a dict whose "score" is {_shown(score)}; let it be a finite number')
        others = {str(key): other for key, other in value.items() if key not in ("score", "status")}
        return Score(status, number, _numbers(others))

    def _error(self, error: BaseException, call: _Call) -> Score:
        """Says what is wrong, where, and what to do."""
        file, line = _defined(self.function)
        if isinstance(error, _FaultError):
            what = str(error)
        elif isinstance(error, RloraError):  # it says what is wrong, and what to do
            return Score("error", detail=f"{self.name}: {error}")
        else:
            file, line = where(error, file, self.spec.rpartition(":")[0]) or (file, line)
            what = f"raised {_said(error)}; mend it there"
            if isinstance(error, MemoryError):
                what += ", or raise scoring.memory_mib, which bounds a call"
            if self.style == "trl":
                form = 'lists of messages (read completion[0]["content"])' if call.chat else "strings"
                what += f" (its completions were {form})"
            elif isinstance(error, TypeError | AttributeError) and self.style in _TAKES:
                what += f" (its completion was {_TAKES[self.style]}; scoring.style names another form)"
        return Score("error", detail=f"{f'{file}:{line}' if file else self.spec}: {self.name} {what}")


def plug(
    spec: str,
    function: Callable[..., Any],
    style: Style = "auto",
    args: Mapping[str, Any] | None = None,
    agent: bool = False,
) -> Plug:
    """The function that the config names `spec`, ready to be called.

    A class is made first, with those of `args` that its constructor takes. Where `style` is given and none of the
    function's parameters has a name of that style, it gets the style's values by position, as `lambda text, gold: ...`.
    With an `agent` there is a state of each episode, which is TRL's environment.

    Raises RloraError where the form can't be told from the parameters' names, where the class can't be made, and where
    the function needs what there is only in the framework that it was written for.
    """
    args = args or {}
    if style != "auto" and style not in _FORMS:
        raise RloraError(f"reward = {spec!r}: there is no style {style!r}; use auto or one of {', '.join(_FORMS)}")
    takes: set[str] = set()
    if inspect.isclass(function):
        takes = {name for name, parameter in (_parameters(function) or {}).items() if parameter.kind in _BY_NAME}
        function = _made(spec, function, {name: args[name] for name in takes & args.keys()})
    if not callable(function):
        raise RloraError(f"reward = {spec!r}: it is {_shown(function)}; name a function, or a class with __call__")
    if inspect.isgeneratorfunction(_bare(function)) or inspect.isasyncgenfunction(_bare(function)):
        raise RloraError(f"reward = {spec!r}: it yields; let it return its reward, or a list of them")
    parameters = _parameters(function)
    chosen = style if style != "auto" else _told(parameters or {}, function)
    if not chosen:
        shown = "can't be seen" if parameters is None else f"are ({', '.join(map(str, parameters.values()))})"
        forms = "; ".join(f"{form.about} ({name})" for name, form in _FORMS.items())
        raise RloraError(
            f"reward = {spec!r}: its parameters {shown}. Name them as one of these does, or set style: {forms}"
        )
    values = _FORMS[chosen].values
    named = {name for name, each in (parameters or {}).items() if each.kind in _BY_NAME}
    anything = any(each.kind is each.VAR_KEYWORD for each in (parameters or {}).values())
    by_place = _by_place(parameters, values)
    mine = named - values.keys() if not by_place else {n for n in named if (parameters or {})[n].default is not _NO}
    required = set() if by_place else {n for n in named if (parameters or {})[n].default is _NO}
    if chosen == "areal" and parameters and (first := _firsts(parameters, len(values))):
        by_place = list(values)
        mine, required = named - first, {n for n in named - first if parameters[n].default is _NO}
    wanted = by_place or [name for name in values if name in named or anything]
    if not agent:
        wanted = [name for name in wanted if name != "environments"]
    for name, remedy in _NOT_HERE.get(chosen, {}).items():
        if name in required - args.keys() and name not in wanted:
            raise RloraError(f"reward = {spec!r}: it needs {name}; {remedy}")
    return Plug(
        spec=spec,
        name=spec.rpartition(":")[2],
        style=chosen,
        asynchronous=inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(_call_of(function)),
        function=function,
        args={name: args[name] for name in mine if name in args},
        takes=frozenset(takes | mine),
        wanted=tuple(wanted),
        positional=len(by_place),
        columns=frozenset(mine),
        anything=anything,
        required=frozenset(required),
        chat=chosen == "trl" and _takes_messages(function, "trl", by_place),
    )


_NO = inspect.Parameter.empty
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_PLACE = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


def _told(parameters: Mapping[str, inspect.Parameter], function: Callable[..., Any]) -> str | None:
    """The style that the parameters' names tell, and between text and messages the function's source."""
    names = parameters.keys()
    anything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    lists = bool(names & {"completions", "completion_ids"}) and "completion" not in names
    trls = names & {"prompts", "trainer_state", "log_extra", "log_metric", "completions_ids", "environments"}
    theirs = names & {"infos", "tasks"} or (not anything and names & {"answers", "states"})  # verifiers' beside prompts
    told = {
        "verl": "solution_str" in names,
        "verl-batch": "solution_strs" in names,
        "openrlhf": "queries" in names,
        "areal": "prompt_ids" in names,
        "verifiers-group": (theirs or (lists and not anything and not trls))
        and _takes_messages(function, "verifiers-group"),
        "trl": trls or (anything and lists),
        "group": names & {"completions", "answers", "states"},
        "verifiers": names & {"completion", "state"}
        and (names & _NOT_HERE["verifiers"].keys() or _takes_messages(function, "verifiers")),
        "completion": names & {"completion", "completion_ids", "messages", "state"},
    }
    return next((style for style, is_told in told.items() if is_told), None)


_READ: dict[str, dict[str, Any]] = {  # what may be read as messages
    "verifiers": {"completion": 1, "state": Fields({"completion": 1})},
    "verifiers-group": {"completions": 2, "states": Many(Fields({"completion": 1}))},
    "trl": {"prompts": 2, "completions": 2},
}


def _takes_messages(function: Callable[..., Any], style: str, by_place: Sequence[str] = ()) -> bool:
    """Whether it reads its completions as chat messages; `by_place` names the values that it gets by position."""
    places = dict(zip(by_place, _parameters(function) or {}, strict=False))
    return takes_messages(function, {places.get(name, name): kind for name, kind in _READ[style].items()})


def _firsts(parameters: Mapping[str, inspect.Parameter], count: int) -> set[str]:
    """So many parameters that are first, whatever they are called; none where all have names that tell their values."""
    first = [name for name, each in parameters.items() if each.kind in _BY_PLACE][:count]
    return set() if len(first) < count or set(first) <= _FORMS["areal"].values.keys() else set(first)


def _by_place(parameters: Mapping[str, inspect.Parameter] | None, values: Iterable[str]) -> list[str]:
    """The names of the values that a function gets by position; none where it takes them by name."""
    order = list(values)
    if parameters is None:  # written in C
        return order[:2]
    needed = [each for each in parameters.values() if each.kind in _BY_PLACE and each.default is _NO]
    if any(each.kind is each.POSITIONAL_ONLY for each in needed) and all(each.name in order for each in needed):
        return [each.name for each in needed]
    if not needed and any(each.kind is each.VAR_POSITIONAL for each in parameters.values()):
        return order[:2]  # behind a decorator that does not say what it wraps
    return [] if set(order) & parameters.keys() else order[: len(needed)]


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """None where it has no signature, as some functions written in C."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def _made(spec: str, kind: type, args: Mapping[str, Any]) -> Callable[..., Any]:
    try:
        made: Callable[..., Any] = kind(**args)
    except Exception as error:
        raise RloraError(
            f"reward = {spec!r}: making it with {dict(args)!r} raised {_said(error)}; give the arguments that it needs"
        ) from error
    return made


def _call_of(function: Any) -> Any:
    """What runs when it is called: of an object its class's method."""
    return function if hasattr(function, "__code__") else getattr(type(function), "__call__", None)  # noqa: B004


def _bare(function: Any) -> Any:
    """The user's own function, out of its partials and decorators."""
    while isinstance(function, functools.partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    return _call_of(function)


def _code(function: Any) -> CodeType | None:
    code = getattr(_bare(function), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _defined(function: Any) -> tuple[str, int]:
    """File and line; none of what is written in C."""
    code = _code(function)
    return (code.co_filename, code.co_firstlineno) if code else ("", 0)


def _codes(code: CodeType, names: Mapping[str, Any]) -> set[CodeType]:
    """The code, what is defined in it, and that of functions of its file that it calls."""
    found, left = set[CodeType](), [code]
    while left:
        found.add(one := left.pop())
        called = [each for name in one.co_names if isinstance(each := names.get(name), FunctionType)]
        inner = [each for each in one.co_consts if isinstance(each, CodeType)]
        inner += [each.__code__ for each in called if each.__code__.co_filename == code.co_filename]
        left += [each for each in inner if each not in found]
    return found


def _used(code: CodeType) -> set[str]:
    """The variables that a function's code reads."""
    loads = [each.argval for each in dis.get_instructions(code) if each.opname.startswith("LOAD")]
    return {name for each in loads for name in (each if isinstance(each, tuple) else (each,)) if isinstance(name, str)}


def _listed(result: Any, count: int) -> list[Any]:
    """A returned list, array or tensor of `count` values."""
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, Sequence) or isinstance(result, str):
        raise _FaultError(f"returned {_shown(result)}; let it return a list, one reward for each completion")
    if len(result) != count:
        raise _FaultError(
            f"returned {len(result)} rewards for {count} completions; let it return one for each, in order"
        )
    return list(result)


def _at(value: Any, place: int) -> Any:
    """What is logged of one episode: a number that holds for all, or its own in a list or tensor."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value[place] if place < len(value) else None
    return value


def _number(value: Any) -> float | None:
    """A finite number, of Python, numpy or torch, as a float; None of anything else."""
    try:
        value = value.item() if hasattr(value, "item") else value
        number = float(value) if isinstance(value, (numbers.Real, Decimal)) else math.nan
    except Exception:  # of several numbers, or one beyond floats
        return None
    return number if math.isfinite(number) else None


def _is_nan(value: Any) -> bool:
    value = value.item() if hasattr(value, "item") else value
    return isinstance(value, numbers.Real | Decimal) and math.isnan(value)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: number for name, value in values.items() if (number := _number(value)) is not None}


def _shown(value: Any) -> str:
    """A value in an error's text; of what may be large or strange only its type."""
    if isinstance(value, str):
        return repr(value)  # whole: the worker cuts it, after it has veiled secrets
    return (
        repr(value)
        if value is None or isinstance(value, (bool, float))
        else f"an object of type {type(value).__name__}"
    )


def _said(error: BaseException) -> str:
    """An exception's type and message, whole: the worker cuts it, after it has veiled secrets."""
    try:
        message = str(error)
    except Exception:  # of its own __str__
        message = ""
    return f"{type(error).__name__}: {message}".encode("utf-8", "backslashreplace").decode().strip()
