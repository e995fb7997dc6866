"""Detects the style of a reward function, so that functions of other frameworks run unchanged.

    style       detected by a parameter named              called with, by name, only the values that it takes
    completion  completion, completion_ids, messages,      these, of one episode, and the prompt's values
                state
    group       completions, answers, states               these, completion_ids and messages, as lists over the
                                                           episodes, and the prompt's values
    trl         prompts, log_extra, log_metric,            these and completion_ids as lists, and each column as a list
                trainer_state; or completions and **kwargs
    verl        solution_str                               data_source, solution_str, ground_truth, extra_info
    verl-batch  solution_strs                              data_sources, ... as lists
    openrlhf    queries                                    queries, prompts, labels as lists of one
    verifiers   completion, read as messages; parser       completion and prompt as messages, answer, info, task,
                                                           state, and the prompt's columns
    verifiers-  completions or answers, infos, tasks, with each of these as a list, named in the plural
    group       completions read as lists of messages
    areal       prompt_ids                                 prompt, completions (text), prompt_ids, completion_ids of one
                                                           episode, and the prompt's columns

The prompt's values are `answer`, `prompt` (text or messages, as the env returned it), `prompt_text` (as the policy
reads it), `step` and `steps` of the run, and each of its columns by name. They are single values, for a group too.

TRL's trainer passes everything to every function, so TRL's functions end in `**kwargs`. This parameter distinguishes
`f(completions, answers, **kwargs)` (TRL's) from `f(completions, answers)` (rlora's). If prompts are chat messages,
TRL's functions get messages. If prompts are plain strings, TRL's functions get strings, unless the function reads the
"content" of messages: rlora sends a plain string as a user's message, so functions of both kinds are written for such
prompts. verifiers' functions have the parameter names of rlora's and take messages in place of text. The source code
distinguishes verifiers' functions from rlora's, by `completion[-1]["content"]` and the like.

If a parameter of a TRL or AReaL function has a usual name of the answer, and no column has this name, the parameter
gets the answer. Functions of other frameworks get an answer that is a number as text, as in their data sets.

A function of rlora's own styles returns for each episode a finite number, a bool, a status of `records.STATUSES`, None
if it does not apply, or a dict with "score" (a number) or "status", whose other numbers are logged. Functions of other
frameworks return what they may return there; NaN from TRL's means None. Any other return value, and any exception,
becomes a Score of status "error". A function that needs a value that rlora does not have, such as the parser of
verifiers' rubrics, is refused when it is loaded.

Sources: TRL, docs/source/grpo_trainer.md and GRPOTrainer._calculate_rewards; verl,
docs/preparation/reward_function.rst, its reward managers `naive` and `batch`, and its reward loop; OpenRLHF,
examples/python/reward_func.py and math_reward_func.py, and SingleTurnAgentExecutor, which passes lists of one;
verifiers, docs/v0/environments.md and Rubric.score_objects; AReaL, docs/en/customization/reward.md and areal/reward.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlora.records import RloraError, Style
from rlora.scoring.functions import BY_NAME, BY_POSITION, NO_DEFAULT, callee, parameters_of, unwrap
from rlora.scoring.results import error_text, show
from rlora.scoring.reward_function import RewardFunction
from rlora.scoring.source import takes_messages
from rlora.scoring.source_values import Fields, Many
from rlora.scoring.styles import STYLES, UNAVAILABLE


def reward_function(
    spec: str,
    function: Callable[..., Any],
    style: Style = "auto",
    args: Mapping[str, Any] | None = None,
    agent: bool = False,
) -> RewardFunction:
    """Prepare the user's function that the config names `spec` for calls.

    `args` are the config's `reward_args`. A class is instantiated first, with those of `args` that its constructor
    takes. If `style` is not "auto" and no parameter has a name of that style, the function gets the style's values by
    position, such as `lambda text, gold: ...`. `agent` says whether the env replies (`records.Agent`): only then do
    episodes have a state, which stands in for TRL's environment.

    Raises RloraError if the parameters' names match no style, if the class can't be instantiated, or if the function
    needs a value that only its own framework has.
    """
    args = args or {}
    if style != "auto" and style not in STYLES:
        raise RloraError(f"reward = {spec!r}: there is no style {style!r}; use auto or one of {', '.join(STYLES)}")
    function, constructor_names = _callable_of(spec, function, args)
    signature = parameters_of(function)
    parameters = signature or {}
    chosen = style if style != "auto" else _detect_style(parameters, function)
    if not chosen:
        fault = "its parameters can't be read"
        if signature is not None:
            fault = f"its parameters ({', '.join(map(str, parameters.values()))}) match no style"
        forms = "; ".join(f"{form.description} ({name})" for name, form in STYLES.items())
        raise RloraError(
            f"reward = {spec!r}: {fault}; rename the parameters as in one of these signatures, or set scoring.style to "
            f"the name in brackets: {forms}"
        )
    values = STYLES[chosen].values
    names = {name for name, parameter in parameters.items() if parameter.kind in BY_NAME}
    takes_kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    positional = _positional_values(signature, values)
    without_default = {name for name in names if parameters[name].default is NO_DEFAULT}
    free = names - without_default if positional else names - values.keys()  # for `reward_args` and columns
    required = set() if positional else without_default
    if chosen == "areal" and parameters and (leading := _leading_parameters(parameters, len(values))):
        positional = list(values)
        free = names - leading
        required = {name for name in free if parameters[name].default is NO_DEFAULT}
    value_names = positional or [name for name in values if name in names or takes_kwargs]
    if not agent:
        value_names = [name for name in value_names if name != "environments"]
    for name, remedy in UNAVAILABLE.get(chosen, {}).items():
        if name in required - args.keys() and name not in value_names:
            raise RloraError(f"reward = {spec!r}: rlora has no value for its parameter {name}; {remedy}")
    return RewardFunction(
        spec=spec,
        name=spec.rpartition(":")[2],
        style=chosen,
        asynchronous=inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(callee(function)),
        function=function,
        args={name: args[name] for name in free if name in args},
        arg_names=frozenset(constructor_names | free),
        value_names=tuple(value_names),
        positional_count=len(positional),
        columns=frozenset(free),
        takes_kwargs=takes_kwargs,
        required=frozenset(required),
        chat=chosen == "trl" and _takes_messages(function, "trl", positional),
    )


def _callable_of(spec: str, function: Callable[..., Any], args: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """Return the function, or an instance if it is a class, and the names that the class's constructor takes."""
    names: set[str] = set()
    if inspect.isclass(function):
        parameters = parameters_of(function) or {}
        names = {name for name, parameter in parameters.items() if parameter.kind in BY_NAME}
        function = _instance(spec, function, {name: args[name] for name in names & args.keys()})
    if not callable(function):
        raise RloraError(
            f"reward = {spec!r}: {show(function)} can't be called; name a function, or a class with __call__"
        )
    if inspect.isgeneratorfunction(unwrap(function)) or inspect.isasyncgenfunction(unwrap(function)):
        raise RloraError(f"reward = {spec!r}: the function is a generator; replace yield by return")
    return function, names


def _detect_style(parameters: Mapping[str, inspect.Parameter], function: Callable[..., Any]) -> str | None:
    """Detect the style by the parameters' names; the source decides between text and messages."""
    names = parameters.keys()
    takes_kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    lists = bool(names & {"completions", "completion_ids"}) and "completion" not in names
    trl = names & {"prompts", "trainer_state", "log_extra", "log_metric", "completions_ids", "environments"}
    # verifiers' groups may have `prompts` too
    verifiers_group = names & {"infos", "tasks"} or (not takes_kwargs and names & {"answers", "states"})
    matches = {
        "verl": "solution_str" in names,
        "verl-batch": "solution_strs" in names,
        "openrlhf": "queries" in names,
        "areal": "prompt_ids" in names,
        "verifiers-group": (verifiers_group or (lists and not takes_kwargs and not trl))
        and _takes_messages(function, "verifiers-group"),
        "trl": trl or (takes_kwargs and lists),
        "group": names & {"completions", "answers", "states"},
        "verifiers": names & {"completion", "state"}
        and (names & UNAVAILABLE["verifiers"].keys() or _takes_messages(function, "verifiers")),
        "completion": names & {"completion", "completion_ids", "messages", "state"},
    }
    return next((style for style, is_match in matches.items() if is_match), None)


_MESSAGE_VALUES: dict[str, dict[str, Any]] = {  # values that may be read as messages; see `source_values`
    "verifiers": {"completion": 1, "state": Fields({"completion": 1})},
    "verifiers-group": {"completions": 2, "states": Many(Fields({"completion": 1}))},
    "trl": {"prompts": 2, "completions": 2},
}


def _takes_messages(function: Callable[..., Any], style: str, positional: Sequence[str] = ()) -> bool:
    """Return whether the function reads completions as chat messages. `positional`: names of its positional values."""
    parameters = dict(zip(positional, parameters_of(function) or {}, strict=False))
    return takes_messages(
        function, {parameters.get(name, name): value for name, value in _MESSAGE_VALUES[style].items()}
    )


def _leading_parameters(parameters: Mapping[str, inspect.Parameter], count: int) -> set[str]:
    """Return the names of the first `count` parameters; none if there are fewer, or if all have AReaL's names."""
    leading = [name for name, parameter in parameters.items() if parameter.kind in BY_POSITION][:count]
    return set() if len(leading) < count or set(leading) <= STYLES["areal"].values.keys() else set(leading)


def _positional_values(parameters: Mapping[str, inspect.Parameter] | None, values: Iterable[str]) -> list[str]:
    """Return the names of the values that a function gets by position; none if it takes values by name."""
    order = list(values)
    if parameters is None:  # written in C
        return order[:2]
    needed = [p for p in parameters.values() if p.kind in BY_POSITION and p.default is NO_DEFAULT]
    if any(p.kind is p.POSITIONAL_ONLY for p in needed) and all(p.name in order for p in needed):
        return [p.name for p in needed]
    if not needed and any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return order[:2]  # a decorator that hides the function it wraps
    return [] if set(order) & parameters.keys() else order[: len(needed)]


def _instance(spec: str, cls: type, args: Mapping[str, Any]) -> Callable[..., Any]:
    try:
        instance: Callable[..., Any] = cls(**args)
    except Exception as error:
        raise RloraError(
            f"reward = {spec!r}: constructing the class with {dict(args)!r} raised {error_text(error)}; set "
            "reward_args to the arguments that the constructor needs"
        ) from error
    return instance
