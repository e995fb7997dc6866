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

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlora.records import RloraError, Style
from rlora.scoring.forms import FORMS, NOT_HERE
from rlora.scoring.functions import BY_NAME, BY_PLACE, NO_DEFAULT, bare, call_of, parameters_of
from rlora.scoring.results import said, show
from rlora.scoring.reward_function import RewardFunction
from rlora.scoring.source import takes_messages
from rlora.scoring.source_values import Fields, Many


def reward_function(
    spec: str,
    function: Callable[..., Any],
    style: Style = "auto",
    args: Mapping[str, Any] | None = None,
    agent: bool = False,
) -> RewardFunction:
    """The function that the config names `spec`, ready to be called.

    A class is made first, with those of `args` that its constructor takes. Where `style` is given and none of the
    function's parameters has a name of that style, it gets the style's values by position, as `lambda text, gold: ...`.
    With an `agent` there is a state of each episode, which is TRL's environment.

    Raises RloraError where the form can't be told from the parameters' names, where the class can't be made, and where
    the function needs what there is only in the framework that it was written for.
    """
    args = args or {}
    if style != "auto" and style not in FORMS:
        raise RloraError(f"reward = {spec!r}: there is no style {style!r}; use auto or one of {', '.join(FORMS)}")
    takes: set[str] = set()
    if inspect.isclass(function):
        takes = {name for name, parameter in (parameters_of(function) or {}).items() if parameter.kind in BY_NAME}
        function = _made(spec, function, {name: args[name] for name in takes & args.keys()})
    if not callable(function):
        raise RloraError(f"reward = {spec!r}: it is {show(function)}; name a function, or a class with __call__")
    if inspect.isgeneratorfunction(bare(function)) or inspect.isasyncgenfunction(bare(function)):
        raise RloraError(f"reward = {spec!r}: it yields; let it return its reward, or a list of them")
    parameters = parameters_of(function)
    chosen = style if style != "auto" else _told(parameters or {}, function)
    if not chosen:
        shown = "can't be seen" if parameters is None else f"are ({', '.join(map(str, parameters.values()))})"
        forms = "; ".join(f"{form.about} ({name})" for name, form in FORMS.items())
        raise RloraError(
            f"reward = {spec!r}: its parameters {shown}. Name them as one of these does, or set style: {forms}"
        )
    values = FORMS[chosen].values
    named = {name for name, each in (parameters or {}).items() if each.kind in BY_NAME}
    anything = any(each.kind is each.VAR_KEYWORD for each in (parameters or {}).values())
    by_place = _by_place(parameters, values)
    without_default = {n for n in named if (parameters or {})[n].default is NO_DEFAULT}
    mine = named - without_default if by_place else named - values.keys()
    required = set() if by_place else without_default
    if chosen == "areal" and parameters and (first := _firsts(parameters, len(values))):
        by_place = list(values)
        mine, required = named - first, {n for n in named - first if parameters[n].default is NO_DEFAULT}
    wanted = by_place or [name for name in values if name in named or anything]
    if not agent:
        wanted = [name for name in wanted if name != "environments"]
    for name, remedy in NOT_HERE.get(chosen, {}).items():
        if name in required - args.keys() and name not in wanted:
            raise RloraError(f"reward = {spec!r}: it needs {name}; {remedy}")
    return RewardFunction(
        spec=spec,
        name=spec.rpartition(":")[2],
        style=chosen,
        asynchronous=inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call_of(function)),
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
        and (names & NOT_HERE["verifiers"].keys() or _takes_messages(function, "verifiers")),
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
    places = dict(zip(by_place, parameters_of(function) or {}, strict=False))
    return takes_messages(function, {places.get(name, name): kind for name, kind in _READ[style].items()})


def _firsts(parameters: Mapping[str, inspect.Parameter], count: int) -> set[str]:
    """So many parameters that are first, whatever they are called; none where all have names that tell their values."""
    first = [name for name, each in parameters.items() if each.kind in BY_PLACE][:count]
    return set() if len(first) < count or set(first) <= FORMS["areal"].values.keys() else set(first)


def _by_place(parameters: Mapping[str, inspect.Parameter] | None, values: Iterable[str]) -> list[str]:
    """The names of the values that a function gets by position; none where it takes them by name."""
    order = list(values)
    if parameters is None:  # written in C
        return order[:2]
    needed = [each for each in parameters.values() if each.kind in BY_PLACE and each.default is NO_DEFAULT]
    if any(each.kind is each.POSITIONAL_ONLY for each in needed) and all(each.name in order for each in needed):
        return [each.name for each in needed]
    if not needed and any(each.kind is each.VAR_POSITIONAL for each in parameters.values()):
        return order[:2]  # behind a decorator that does not say what it wraps
    return [] if set(order) & parameters.keys() else order[: len(needed)]


def _made(spec: str, kind: type, args: Mapping[str, Any]) -> Callable[..., Any]:
    try:
        made: Callable[..., Any] = kind(**args)
    except Exception as error:
        raise RloraError(
            f"reward = {spec!r}: making it with {dict(args)!r} raised {said(error)}; give the arguments that it needs"
        ) from error
    return made
