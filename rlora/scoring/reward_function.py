"""A user's reward function, with the calling convention of its style."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from rlora.plugin import error_location
from rlora.records import STATUSES, RewardInput, RloraError, Score
from rlora.scoring.functions import code_of, loaded_names, location_of, parameters_of, reachable_codes, unwrap
from rlora.scoring.results import FaultError, as_list, as_number, as_numbers, error_text, is_nan, show, value_at
from rlora.scoring.styles import STYLES, Call, text_answer

_ANSWER_NAMES = ("solution", "solutions", "ground_truth", "answer", "answers", "label", "labels", "target")


_COMPLETION_TYPES = {  # type of a completion by style, for errors
    "completion": "a string", "group": "a string", "areal": "a string",
    "verifiers": "a list of messages", "verifiers-group": "a list of messages",
}  # fmt: skip


@dataclass(frozen=True)
class RewardFunction:
    """A user's reward function with its calling convention, prepared by `signatures.reward_function`.

    An instance is called with a RewardInput, which describes a group, and with the indices of the episodes to score.
    It returns a Score for each of these episodes, in the same order. If the user's function raises an exception, or
    returns a value that its style does not allow, nothing is raised: the episodes of that call get a Score of status
    "error", whose `detail` is the message. `acall` is the same for a coroutine function. Time and memory are not
    limited here but in the worker process (`rlora.scoring.worker`).
    """

    spec: str  # module:name, path/to/file.py:name or python:name
    name: str  # label of its part of the reward, from `spec`
    style: str  # one of `styles.STYLES`
    asynchronous: bool  # whether the function is a coroutine function
    function: Callable[..., Any]
    args: Mapping[str, Any]  # the `reward_args` that the function takes, by name
    arg_names: frozenset[str]  # names of `reward_args` that the function or its class's constructor can take
    value_names: tuple[str, ...]  # names of the style's values that the function gets
    positional_count: int  # how many of `value_names` are passed by position
    columns: frozenset[str]  # parameters that get the prompt's column of that name, if it exists
    takes_kwargs: bool  # whether the function has **kwargs, and so gets all columns
    required: frozenset[str]  # parameters without a default
    chat: bool  # whether a function of style "trl" reads completions as messages

    @property
    def one_at_a_time(self) -> bool:
        """Whether each call gets one episode; else a call gets all requested episodes."""
        return STYLES[self.style].one_at_a_time

    @property
    def names(self) -> frozenset[str]:
        """Names of the values that the function asks for: its parameters, and strings in its code if it gets a mapping.

        If two values are passed by position, the second is the answer, whatever the parameter's name. A parameter that
        the style prescribes counts only if the code uses the parameter.
        """
        names = set(parameters_of(self.function) or {}) | ({"answer"} if self.positional_count > 1 else set())
        code = code_of(self.function)
        if not code:
            return frozenset(names)
        if self.style not in ("completion", "group", "trl"):
            names -= set(STYLES[self.style].values) - loaded_names(code)
        if self.takes_kwargs or not {"extra_info", "extra_infos", "info", "infos"}.isdisjoint(names):
            codes = reachable_codes(code, getattr(unwrap(self.function), "__globals__", {}))
            names |= {text for reachable in codes for text in reachable.co_consts if isinstance(text, str)}
        return frozenset(names)

    def __call__(self, inputs: RewardInput, episodes: Sequence[int]) -> list[Score]:
        """Score `episodes`, which are indices in the group. Returns a Score for each, in the same order.

        All episodes of a call that fails get a Score of status "error". Only exceptions that are neither an Exception
        nor a SystemExit propagate, such as KeyboardInterrupt. Blocks until the user's function has returned. An
        asynchronous function gets an event loop of its own: inside a running event loop, await `acall` instead.
        """
        if self.asynchronous:
            return asyncio.run(self.acall(inputs, episodes))
        scores: list[Score] = []
        for call in self._calls(inputs, episodes):
            try:
                scores += self._scores(self._start(call), call)
            except (Exception, SystemExit) as error:
                scores += call.repeat(self._error(error, call))
        return scores

    async def acall(self, inputs: RewardInput, episodes: Sequence[int]) -> list[Score]:
        """Score `episodes` with an asynchronous function, as `__call__` does. Awaits one call after the other."""
        scores: list[Score] = []
        for call in self._calls(inputs, episodes):
            try:
                scores += self._scores(await self._start(call), call)
            except (Exception, SystemExit) as error:
                scores += call.repeat(self._error(error, call))
        return scores

    def _calls(self, inputs: RewardInput, episodes: Sequence[int]) -> list[Call]:
        chat = self.style == "trl" and (self.chat or not isinstance(inputs.prompt, str))
        parts = [[episode] for episode in episodes] if self.one_at_a_time else [episodes]
        return [Call(inputs, part, chat) for part in parts]

    def _start(self, call: Call) -> Any:
        """Call the function with copies of all arguments, so that it can modify them. Returns its result.

        Raises FaultError if a required argument has no value.
        """
        values = STYLES[self.style].values
        arguments = {name: values[name](call) for name in self.value_names}
        if STYLES[self.style].columns:
            arguments |= self._columns(call)
        arguments |= deepcopy(dict(self.args))
        missing = self.required.difference(arguments)
        if missing:
            raise FaultError(
                f"needs {', '.join(sorted(missing))}, but the prompt's columns are "
                f"({', '.join(call.inputs.columns)}); add the column in the env, set reward_args, or give the "
                "parameter a default"
            )
        by_position = [arguments.pop(name) for name in self.value_names[: self.positional_count]]
        return self.function(*by_position, **arguments)

    def _columns(self, call: Call) -> dict[str, Any]:
        columns = call.inputs.columns
        names = [
            name for name in columns if name in self.columns or (self.takes_kwargs and name not in self.value_names)
        ]
        if self.style not in ("trl", "areal"):
            return {name: deepcopy(columns[name]) for name in names}
        answers = [
            name
            for name in _ANSWER_NAMES
            if name not in columns and (name in self.columns or (self.takes_kwargs and name == "answer"))
        ]
        rows = [
            {name: deepcopy(columns[name]) for name in names} | {name: text_answer(call) for name in answers}
            for _ in call.episodes
        ]
        return rows[0] if self.style == "areal" else {name: [row[name] for row in rows] for name in rows[0]}

    def _scores(self, result: Any, call: Call) -> list[Score]:
        """Convert the result of a call into a Score per episode. Raises FaultError if the style does not allow it."""
        logs: Mapping[str, Any] = {}
        if self.style == "openrlhf" and isinstance(result, Mapping):
            logs = {"scores": result.get("scores"), **(result.get("extra_logs") or {})}
            result = result.get("rewards")
        scalar = self.one_at_a_time and (not STYLES[self.style].lists or as_number(result) is not None)
        values = [result] if scalar else as_list(result, len(call.episodes))
        scores = [self._score(value) for value in values]
        for index, score in enumerate(scores):
            logged = call.logged(index) | as_numbers({name: value_at(value, index) for name, value in logs.items()})
            scores[index] = replace(score, extra={**score.extra, **logged}) if logged else score
        return scores

    def _score(self, value: Any) -> Score:
        style = STYLES[self.style]
        if value is None and style.allows_none:
            return Score()
        if isinstance(value, str) and value in STATUSES and style.allows_status:
            return Score(status=value)
        if isinstance(value, Mapping) and style.allows_dict:
            return self._score_from_dict(value)
        number = as_number(value)
        if number is None and self.style == "trl" and is_nan(value):
            return Score()
        if number is None:
            alternatives = [
                *(["None"] if style.allows_none else []),
                *([f"one of {', '.join(STATUSES)}"] if style.allows_status else []),
                *(['a dict with "score"'] if style.allows_dict else []),
            ]
            raise FaultError(f"returned {show(value)}; return {' or '.join(['a finite number', *alternatives])}")
        return Score(value=number)

    def _score_from_dict(self, value: Mapping[Any, Any]) -> Score:
        status = value.get("status") if STYLES[self.style].allows_status else None
        score = value.get("score")
        number = as_number(score)
        if status is None and score is None:
            raise FaultError('returned a dict without "score"; add a finite number under this key')
        if status is not None and status not in STATUSES:
            raise FaultError(f'returned a dict whose "status" is {show(status)}; use one of {", ".join(STATUSES)}')
        if score is not None and number is None:
            raise FaultError(f'returned a dict whose "score" is {show(score)}; use a finite number')
        extra = {str(key): item for key, item in value.items() if key not in ("score", "status")}
        return Score(status, number, as_numbers(extra))

    def _error(self, error: BaseException, call: Call) -> Score:
        """Return a Score of status "error", whose detail names the fault, its location and the fix."""
        file, line = location_of(self.function)
        if isinstance(error, FaultError):
            message = str(error)
        elif isinstance(error, RloraError):  # its message names the fault and the fix
            return Score("error", detail=f"{self.name}: {error}")
        else:
            file, line = error_location(error, file, self.spec.rpartition(":")[0]) or (file, line)
            message = f"raised {error_text(error)}; fix the function"
            if isinstance(error, MemoryError):
                message += ", or raise scoring.memory_mib, the memory limit of a call"
            if self.style == "trl":
                form = 'lists of messages (read completion[0]["content"])' if call.chat else "strings"
                message += f" (the completions were {form})"
            elif isinstance(error, TypeError | AttributeError) and self.style in _COMPLETION_TYPES:
                message += f" (the completion was {_COMPLETION_TYPES[self.style]}; scoring.style sets a different form)"
        return Score("error", detail=f"{f'{file}:{line}' if file else self.spec}: {self.name} {message}")
