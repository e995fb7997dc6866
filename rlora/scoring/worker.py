"""Worker process that runs a user's reward functions, and an env's replies, on a model's text.

`scoring.pool.Pool` starts the process, sends jobs to it, and kills it if a call exceeds its deadline. Calls run on the
main thread, where SIGALRM works. The process is spawned, not forked, so that it inherits nothing of the parent's torch
and Ray.
"""

import asyncio
import ctypes
import inspect
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, astuple, dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from rlora.plugin import Pickled, env_of, file_of, load, location_prefix, receive
from rlora.records import Prompt, RewardInput, RloraError, Score, Style, without_surrogates
from rlora.scoring.clock import Clock
from rlora.scoring.results import error_text
from rlora.scoring.reward_function import RewardFunction
from rlora.scoring.signatures import reward_function
from rlora.scoring.tools import ArgumentError, as_text, call_tool, functions_of

IDLE = (-1, -1, -1)  # job, call and function between two jobs
COROUTINES = -2  # as a call's number: all coroutines that are awaited at once
ENV = -1  # as a function's number: the env's reply
_MAX_UNMASKED = 5  # characters up to which an environment variable's value is not a secret
_MAX_MESSAGE, _TAIL = 2000, 400  # characters of a message at most, and of the part that is its end
_FLUSH = 0.02  # seconds after which finished results are sent while other jobs remain
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """Functions that a worker runs, and their limits."""

    rewards: tuple[str, ...] = ()  # each module:name or path/to/file.py:name
    style: Style = "auto"
    reward_args: Mapping[str, Any] = field(default_factory=dict)
    env: str = ""  # spec of the env whose `reply` is called; empty for none
    env_args: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})  # by `Prompt.evaluation_set`
    directory: str = "."  # working directory, if it exists
    deadline: float = 10.0  # seconds per call
    first_deadline: float = 0.0  # seconds for the first call of each function in each process, if more than `deadline`
    memory_mib: int = 2048  # address space that calls can add to that of the process after loading
    concurrency: int = 16  # maximum number of concurrent calls of coroutine functions
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)  # variables to set; values are secret
    seed: int = 0  # the run's, set as RLORA_SEED for functions that draw random numbers
    objects: Mapping[str, Pickled] = field(default_factory=dict, repr=False)  # by spec, for `plugin.receive`


@dataclass(frozen=True)
class EnvTurn:
    """A message of the policy that the env has to reply to."""

    prompt: Prompt
    message: str  # text of the policy's last turn
    state: Mapping[str, Any]  # of the episode, as the previous reply left it
    tool: str = ""  # name of the tool that the message calls; "": the env replies
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the tool, as the policy wrote them


@dataclass(frozen=True)
class EnvReply:
    """The env's reply to an EnvTurn, or a tool's result, and the episode's new state."""

    content: str | list[dict[str, str]] | None  # text or chat messages; None ends the episode
    state: Mapping[str, Any]
    status: str = ""  # "error" or "timeout" if the call failed; "invalid" if a tool does not accept the arguments
    detail: str = ""  # message of the error


@dataclass(frozen=True)
class Job:
    """A group to score by each reward function, or a turn to reply to."""

    request: RewardInput | EnvTurn
    failures: Mapping[int, Score] = field(default_factory=dict)  # by call: scores of failed calls, not to be repeated


def reward_names(rewards: Sequence[str]) -> list[str]:
    """Return a name for each reward function: its name in its file, or its spec if several functions share the name."""
    names = [spec.rpartition(":")[2] for spec in rewards]
    count = Counter(names)
    return [spec if count[name] > 1 else name for spec, name in zip(rewards, names, strict=True)]


def fields_of(setup: Setup) -> str:
    """Return the config's fields that name the reward functions and the env, for errors."""
    fields = [f"reward = {spec!r}" for spec in setup.rewards] + ([f"env = {setup.env!r}"] if setup.env else [])
    return ", ".join(fields)


def timeout_message(setup: Setup, deadline: float, name: str) -> str:
    """Return the message for a call that took more than `deadline` seconds. `name` is empty for an env's reply."""
    field = "first_deadline" if deadline > setup.deadline else "deadline"
    limit = f"scoring.{field} = {deadline:g} s; raise scoring.{field}, or make the call faster"
    return "a call" + (f" to {name}" if name else "") + f" took more than {limit}"


def load_reward_functions(setup: Setup) -> list[RewardFunction]:
    """Load the reward functions of `setup`, and prepare them for calls.

    Raises RloraError if a function can't be loaded, or if no function takes one of the `reward_args`.
    """
    agent = bool(setup.env)
    functions = [
        reward_function(spec, load("reward", spec), setup.style, setup.reward_args, agent) for spec in setup.rewards
    ]
    for name in setup.reward_args:
        if not any(name in function.arg_names for function in functions):
            raise RloraError(
                f"reward_args.{name} = {setup.reward_args[name]!r}: no reward function has a parameter of that name "
                f"({', '.join(setup.rewards)}); use the name of a parameter, or remove reward_args.{name}"
            )
    return functions


class _Worker:
    """The reward functions and the env of a worker process, and the loop that calls them."""

    def __init__(self, setup: Setup, clock: Clock) -> None:
        self.setup, self.clock = setup, clock
        self.functions = load_reward_functions(setup)
        self.envs: dict[str, Any] = {}  # by evaluation set; empty if no env replies
        if setup.env:
            plugin = load("env", setup.env)
            self.envs = {name: env_of(plugin, args) for name, args in setup.env_args.items()}
        self.tools = {name: functions_of(env) for name, env in self.envs.items()}
        self.runner = asyncio.Runner()  # one loop for all jobs: a judge's client may keep connections bound to it
        self.names = reward_names(setup.rewards)
        self.coroutines = [number for number, function in enumerate(self.functions) if function.asynchronous]
        self.called: set[int] = set()  # numbers of functions with at least one call

    def work(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        """Run the jobs. Yields the index and the JSON-serialisable result of each."""
        awaited = self.runner.run(self._await(jobs)) if self.coroutines else {}
        for number, job in enumerate(jobs):
            if isinstance(job.request, EnvTurn):
                reply = self._reply(number, job, job.request)
                yield number, asdict(replace(reply, detail=_masked(reply.detail, self.setup)))
                continue
            calls = itertools.count()
            verdicts = [
                awaited[number, index] if function.asynchronous else self._score(index, number, job, job.request, calls)
                for index, function in enumerate(self.functions)
            ]
            self.clock.write(*IDLE, self.setup.deadline)
            yield number, [[self._plain(score) for score in scores] for scores in verdicts]

    def _deadline(self, function: int) -> float:
        """Return the time limit of the function's next call in seconds. It is longer for the first call."""
        return self.setup.deadline if function in self.called else max(self.setup.deadline, self.setup.first_deadline)

    def _plain(self, score: Score) -> tuple[Any, ...]:
        return astuple(replace(score, detail=_masked(score.detail, self.setup)) if score.detail else score)

    def _score(self, index: int, number: int, job: Job, inputs: RewardInput, calls: Iterator[int]) -> list[Score]:
        """Score a group by one function, call by call."""
        scores: list[Score] = []
        function = self.functions[index]
        for episodes in _parts(function, inputs):
            call = next(calls)
            if call in job.failures:
                scores += [job.failures[call]] * len(episodes)
            else:
                self.clock.write(number, call, index, self._deadline(index))
                scores += function(inputs, episodes)
                self.called.add(index)
        return scores

    async def _await(self, jobs: Sequence[Job]) -> dict[tuple[int, int], list[Score]]:
        """Score all groups by the coroutine functions: `concurrency` calls at once, each with its own deadline.

        Returns a Score per episode, by the indices of job and function.
        """
        slots = asyncio.Semaphore(self.setup.concurrency)

        async def score_part(function: int, job: Job, inputs: RewardInput, episodes: Sequence[int]) -> list[Score]:
            if COROUTINES in job.failures:
                return [job.failures[COROUTINES]] * len(episodes)
            async with slots:
                deadline = self._deadline(function)
                self.clock.write(0, COROUTINES, function, max(map(self._deadline, self.coroutines)))
                try:
                    return await asyncio.wait_for(self.functions[function].acall(inputs, episodes), deadline)
                except TimeoutError:
                    detail = timeout_message(self.setup, deadline, self.names[function])
                    return [Score("timeout", detail=detail)] * len(episodes)
                finally:
                    self.called.add(function)

        async def score_group(function: int, job: Job, inputs: RewardInput) -> list[Score]:
            parts = _parts(self.functions[function], inputs)
            scores = await asyncio.gather(*(score_part(function, job, inputs, episodes) for episodes in parts))
            return [score for part in scores for score in part]

        pending = {
            (number, function): score_group(function, job, job.request)
            for number, job in enumerate(jobs)
            for function in self.coroutines
            if isinstance(job.request, RewardInput)
        }
        return dict(zip(pending, await asyncio.gather(*pending.values()), strict=True))

    def _reply(self, number: int, job: Job, turn: EnvTurn) -> EnvReply:
        name = f"tool {turn.tool}" if turn.tool else "reply()"
        field = f"env = {self.setup.env!r}: {name}"

        def failed(status: str, detail: str, reason: str) -> EnvReply:  # the policy reads the reason
            return EnvReply(f"error: {reason}" if turn.tool else None, turn.state, status, detail)

        if failure := job.failures.get(0):
            reason = "the call took too long" if failure.status == "timeout" else "the call ended its process"
            return failed(failure.status or "error", f"{field} failed: {failure.detail}", reason)
        state = deepcopy(dict(turn.state))
        deadline = self._deadline(ENV)
        self.clock.write(number, 0, ENV, deadline)
        try:
            content = self._call(turn, state)
            if inspect.isawaitable(content):
                content = self.runner.run(_awaited(content, deadline))
            plain = as_text(content) if turn.tool else _plain_content(content)
            reply = EnvReply(plain, json.loads(json.dumps(state)))
        except ArgumentError as error:
            return failed("invalid", "", str(error))
        except _DeadlineError:
            message = f"{field}: {timeout_message(self.setup, deadline, name)}"
            return failed("timeout", message, "the call took too long")
        except BaseException as error:  # also the SystemExit of argparse in a tool
            reason = error_text(error)
            prefix = location_prefix(error, *self._files(turn))
            return failed("error", f"{prefix}{field} raised {reason}; fix this method", reason)
        finally:
            self.called.add(ENV)
            self.clock.write(*IDLE, self.setup.deadline)
        return reply

    def _call(self, turn: EnvTurn, state: dict[str, Any]) -> Any:
        """Call the tool, or the env's `reply`. An env with tools only replies with None, which ends the episode."""
        name = turn.prompt.evaluation_set
        if turn.tool:
            return call_tool(self.tools[name][turn.tool], turn.arguments, turn.prompt, state)
        reply = getattr(self.envs[name], "reply", None)
        return reply(turn.prompt, turn.message, state) if reply else None

    def _files(self, turn: EnvTurn) -> list[str]:
        name = turn.prompt.evaluation_set
        return [file_of(self.envs[name]), *([file_of(self.tools[name][turn.tool])] if turn.tool else [])]


def _masked(text: str, setup: Setup) -> str:
    """Replace secret values of environment variables in a message by the variables' names, then shorten the message."""
    secrets = {name: value for name, value in setup.environment.items() if len(value) > _MAX_UNMASKED}
    forms = {form: name for name, value in secrets.items() for form in _forms(value) if len(form) > _MAX_UNMASKED}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, f"<{forms[form]}>")
    return text if len(text) <= _MAX_MESSAGE else f"{text[: _MAX_MESSAGE - _TAIL]} [...] {text[-_TAIL:]}"


def _forms(value: str) -> set[str]:
    """Return the forms of a value in messages: as it is, stripped, and as in its repr(), ascii(), JSON or bytes."""
    forms = {value, value.strip()}
    for text in (value, value.strip()):
        shown = {
            repr(text)[1:-1],
            ascii(text)[1:-1],
            json.dumps(text)[1:-1],
            json.dumps(text, ensure_ascii=False)[1:-1],
        }
        shown |= {repr(text + "'\"")[1:-4], repr(text.encode("utf-8", "surrogateescape"))[2:-1]}
        forms |= shown | {repr(form)[1:-1] for form in shown} | {text.encode("utf-8", "backslashreplace").decode()}
    return forms


def _plain_content(content: Any) -> str | list[dict[str, str]] | None:
    """Convert the result of an env's reply() to text that a tokenizer accepts. Raises ValueError if it is invalid."""
    if content is None or isinstance(content, str):
        return content and without_surrogates(content)
    messages = [{key: message[key] for key in ("role", "content")} for message in content]
    if not messages or not all(isinstance(text, str) for message in messages for text in message.values()):
        raise ValueError('return a string, None or chat messages, {"role": ..., "content": ...} with string values')
    return [{key: without_surrogates(text) for key, text in message.items()} for message in messages]


class _DeadlineError(Exception):
    """A call of a tool or of the env's reply exceeded its deadline, unlike a TimeoutError that it raised itself."""


async def _awaited(call: Awaitable[Any], deadline: float) -> Any:
    try:
        async with asyncio.timeout(deadline) as scope:
            return await call
    except TimeoutError:
        if scope.expired():
            raise _DeadlineError from None
        raise


def _parts(function: RewardFunction, inputs: RewardInput) -> list[Sequence[int]]:
    """Return the episode indices of each call."""
    indices = range(len(inputs.completions))
    return [[index] for index in indices] if function.one_at_a_time else [indices]


def _mapped_bytes() -> int:
    """Return the size of the process's address space in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _limit_memory(mib: int) -> int:
    """Limit the address space to `mib` MiB above its current size.

    Returns the size in bytes above which the process should be replaced: half of the `mib` MiB are then used.
    """
    now = _mapped_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (now + mib * 2**20, resource.RLIM_INFINITY))
    return now + mib * 2**19


def main() -> None:
    """Run the jobs that arrive over the file descriptor argv[1] until it closes. argv[2] is the clock's descriptor."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a busy worker must not outlive its parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the worker
    connection = Connection(int(sys.argv[1]))
    os.dup2(2, 1)  # prints of a user's function go to stderr
    setup: Setup = connection.recv()
    clock = Clock(int(sys.argv[2]))
    os.environ["RLORA_SEED"] = str(setup.seed)
    receive(setup.objects)
    if os.path.isdir(setup.directory):
        os.chdir(setup.directory)
    try:
        worker = _Worker(setup, clock)
    except BaseException as error:
        detail = f"{fields_of(setup)}: loading raised {type(error).__name__}: {error}; fix the code or the arguments"
        detail = str(error) if isinstance(error, RloraError) else detail
        connection.send_bytes(json.dumps({"error": _masked(detail, setup)}).encode())
        return
    threshold = _limit_memory(setup.memory_mib) if sys.platform == "linux" else None
    loaded = {"names": [sorted(function.names) for function in worker.functions], "coroutines": worker.coroutines}
    connection.send_bytes(json.dumps(loaded).encode())
    with suppress(EOFError, ConnectionError):
        while jobs := connection.recv():
            done: list[Any] = []
            flushed = time.monotonic()
            if (
                threshold and _mapped_bytes() > threshold
            ):  # memory that earlier calls kept would count against later ones
                return
            for result in worker.work(jobs):
                done.append(result)
                if time.monotonic() - flushed > _FLUSH:
                    connection.send_bytes(json.dumps(done).encode())
                    done, flushed = [], time.monotonic()
            connection.send_bytes(json.dumps(done).encode())
