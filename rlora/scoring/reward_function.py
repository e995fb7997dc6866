"""A user's reward function as rlora calls it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from rlora.plugin import where
from rlora.records import STATUSES, RewardInput, RloraError, Score
from rlora.scoring.forms import FORMS, Call, text_answer
from rlora.scoring.functions import bare, code_of, codes_of, defined, parameters_of, used
from rlora.scoring.results import FaultError, as_number, as_numbers, at_place, is_nan, listed, said, show

_ANSWERS = ("solution", "solutions", "ground_truth", "answer", "answers", "label", "labels", "target")


_TAKES = {  # what stands for a completion
    "completion": "a string", "group": "a string", "areal": "a string",
    "verifiers": "a list of messages", "verifiers-group": "a list of messages",
}  # fmt: skip


@dataclass(frozen=True)
class RewardFunction:
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
        return FORMS[self.style].one_at_a_time

    @property
    def names(self) -> frozenset[str]:
        """The names by which it asks for values: of parameters, and where it gets a mapping, of keys in its code.

        What takes two values by position takes the answer second, whatever that is called. A parameter that the style
        demands counts where the code uses it.
        """
        named = set(parameters_of(self.function) or {}) | ({"answer"} if self.positional > 1 else set())
        code = code_of(self.function)
        if not code:
            return frozenset(named)
        if self.style not in ("completion", "group", "trl"):
            named -= set(FORMS[self.style].values) - used(code)
        if self.anything or not {"extra_info", "extra_infos", "info", "infos"}.isdisjoint(named):
            codes = codes_of(code, getattr(bare(self.function), "__globals__", {}))
            named |= {text for each in codes for text in each.co_consts if isinstance(text, str)}
        return frozenset(named)

    def __call__(self, case: RewardInput, episodes: Sequence[int]) -> list[Score]:
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

    async def acall(self, case: RewardInput, episodes: Sequence[int]) -> list[Score]:
        """The same where the function is asynchronous; one call after the other."""
        scores: list[Score] = []
        for call in self._calls(case, episodes):
            try:
                scores += self._scores(await self._start(call), call)
            except (Exception, SystemExit) as error:
                scores += call.each(self._error(error, call))
        return scores

    def _calls(self, case: RewardInput, episodes: Sequence[int]) -> list[Call]:
        chat = self.style == "trl" and (self.chat or not isinstance(case.prompt, str))
        return [Call(case, of, chat) for of in ([[one] for one in episodes] if self.one_at_a_time else [episodes])]

    def _start(self, call: Call) -> Any:
        """Call the function. Everything that it gets is a copy: what it does to that is its own affair."""
        values = FORMS[self.style].values
        got = {name: values[name](call) for name in self.wanted}
        if FORMS[self.style].columns:
            got |= self._columns(call)
        got |= self.args
        missing = self.required.difference(got)
        if missing:
            raise FaultError(
                f"needs {', '.join(sorted(missing))}, but the prompt's columns are "
                f"({', '.join(call.case.columns)}); let the env give such a column, or give the parameter a default"
            )
        by_place = [got.pop(name) for name in self.wanted[: self.positional]]
        return self.function(*by_place, **got)

    def _columns(self, call: Call) -> dict[str, Any]:
        given = call.case.columns
        names = [name for name in given if name in self.columns or (self.anything and name not in self.wanted)]
        if self.style not in ("trl", "areal"):
            return {name: deepcopy(given[name]) for name in names}
        answers = [n for n in _ANSWERS if n not in given and (n in self.columns or (self.anything and n == "answer"))]
        lists = [
            {name: deepcopy(given[name]) for name in names} | {name: text_answer(call) for name in answers}
            for _ in call.episodes
        ]
        return lists[0] if self.style == "areal" else {name: [each[name] for each in lists] for name in lists[0]}

    def _scores(self, result: Any, call: Call) -> list[Score]:
        """Raises FaultError where the result is not what a function of the style returns."""
        logs: Mapping[str, Any] = {}
        if self.style == "openrlhf" and isinstance(result, Mapping):
            logs = {"scores": result.get("scores"), **(result.get("extra_logs") or {})}
            result = result.get("rewards")
        alone = self.one_at_a_time and (not FORMS[self.style].lists or as_number(result) is not None)
        values = [result] if alone else listed(result, len(call.episodes))
        scores = [self._score(value) for value in values]
        for place, score in enumerate(scores):
            logged = call.logged(place) | as_numbers({name: at_place(value, place) for name, value in logs.items()})
            scores[place] = replace(score, extra={**score.extra, **logged}) if logged else score
        return scores

    def _score(self, value: Any) -> Score:
        form = FORMS[self.style]
        if value is None and form.nothing:
            return Score()
        if isinstance(value, str) and value in STATUSES and form.statuses:
            return Score(status=value)
        if isinstance(value, Mapping) and form.dicts:
            return self._score_of(value)
        number = as_number(value)
        if number is None and self.style == "trl" and is_nan(value):
            return Score()
        if number is None:
            may = [
                *(["None"] if form.nothing else []),
                *([f"one of {', '.join(STATUSES)}"] if form.statuses else []),
                *(['a dict with "score"'] if form.dicts else []),
            ]
            raise FaultError(f"returned {show(value)}; let it return {' or '.join(['a finite number', *may])}")
        return Score(value=number)

    def _score_of(self, value: Mapping[Any, Any]) -> Score:
        status = value.get("status") if FORMS[self.style].statuses else None
        score = value.get("score")
        number = as_number(score)
        if status is None and score is None:
            raise FaultError('returned a dict without "score"; let it have that, a finite number')
        if status is not None and status not in STATUSES:
            raise FaultError(f'returned a dict whose "status" is {show(status)}; use one of {", ".join(STATUSES)}')
        if score is not None and number is None:
            raise FaultError(f'returned a dict whose "score" is {show(score)}; let it be a finite number')
        others = {str(key): other for key, other in value.items() if key not in ("score", "status")}
        return Score(status, number, as_numbers(others))

    def _error(self, error: BaseException, call: Call) -> Score:
        """Says what is wrong, where, and what to do."""
        file, line = defined(self.function)
        if isinstance(error, FaultError):
            what = str(error)
        elif isinstance(error, RloraError):  # it says what is wrong, and what to do
            return Score("error", detail=f"{self.name}: {error}")
        else:
            file, line = where(error, file, self.spec.rpartition(":")[0]) or (file, line)
            what = f"raised {said(error)}; fix it there"
            if isinstance(error, MemoryError):
                what += ", or raise scoring.memory_mib, which bounds a call"
            if self.style == "trl":
                form = 'lists of messages (read completion[0]["content"])' if call.chat else "strings"
                what += f" (its completions were {form})"
            elif isinstance(error, TypeError | AttributeError) and self.style in _TAKES:
                what += f" (its completion was {_TAKES[self.style]}; scoring.style names another form)"
        return Score("error", detail=f"{f'{file}:{line}' if file else self.spec}: {self.name} {what}")
