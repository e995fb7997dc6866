"""The process that runs a user's reward functions, and an env's replies, on a model's text.

`scoring.pool.Pool` starts it, gives it jobs, and kills it where a call overruns. Calls are on its main thread, where
SIGALRM works, and it is spawned, not forked: it has nothing of its parent's torch and Ray.
"""

import asyncio
import ctypes
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, astuple, dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from rlora.plugin import Pickled, at, env_of, file_of, load, receive
from rlora.records import Prompt, RewardInput, RloraError, Score, Style, without_surrogates
from rlora.scoring.clock import Clock
from rlora.scoring.reward_function import RewardFunction
from rlora.scoring.signatures import reward_function

IDLE = (-1, -1, -1)  # the job, the call and the function between two jobs
COROUTINES = -2  # in place of a call's number: all those that are awaited at once
ENV = -1  # in place of a function's number
_SHORTEST = 5  # characters of a value that is no secret
_LONGEST, _TAIL = 2000, 400  # characters of a message, and of these at its end
_FLUSH = 0.02  # seconds after which what is done is sent, though more is to do
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """What a worker runs."""

    rewards: tuple[str, ...] = ()  # each module:name or path/to/file.py:name
    style: Style = "auto"
    reward_args: Mapping[str, Any] = field(default_factory=dict)
    env: str = ""  # whose `reply` is wanted; empty: none is
    env_args: Mapping[str, Any] = field(default_factory=dict)
    directory: str = "."  # that relative paths are of, where it exists
    deadline: float = 10.0  # seconds a call
    first_deadline: float = 0.0  # seconds the first call of a function, in each process, where that is more
    memory_mib: int = 2048  # that calls may take beside what the process has once all is loaded
    concurrency: int = 16  # calls of a coroutine function at once
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)  # variables set in it, never to be shown
    seed: int = 0  # of the run, in the environment as RLORA_SEED: what is drawn from it repeats itself
    given: Mapping[str, Pickled] = field(default_factory=dict, repr=False)  # objects that `rewards` and `env` name


@dataclass(frozen=True)
class EnvTurn:
    """A policy's message that the env has to answer."""

    prompt: Prompt
    message: str
    state: Mapping[str, Any]


@dataclass(frozen=True)
class EnvReply:
    """What the env said to it, None at the end of the episode, and the episode's state now."""

    said: str | list[dict[str, str]] | None
    state: Mapping[str, Any]
    status: str = ""  # error or timeout, where it failed; then the episode ends
    detail: str = ""  # of what failed


@dataclass(frozen=True)
class Job:
    """A group to score by each reward function, or a turn to answer."""

    of: RewardInput | EnvTurn
    overran: Mapping[int, Score] = field(
        default_factory=dict
    )  # calls that are not made again, and what is said of them


def names_of(rewards: Sequence[str]) -> list[str]:
    """How reward functions are called: each as in its file, and as the config has it where two are alike."""
    names = [spec.rpartition(":")[2] for spec in rewards]
    alike = Counter(names)
    return [spec if alike[name] > 1 else name for spec, name in zip(rewards, names, strict=True)]


def too_long(setup: Setup, deadline: float, name: str) -> str:
    """What is said of a call that took longer than its deadline; `name` is its function's, if it is of one."""
    field = "first_deadline" if deadline > setup.deadline else "deadline"
    return f"a call took more than scoring.{field} = {deadline:g} s" + (f" (of {name})" if name else "")


def load_plugs(setup: Setup) -> list[RewardFunction]:
    """The reward functions. Raises RloraError where one can't be loaded, or an argument is of none."""
    agent = bool(setup.env)
    plugs = [
        reward_function(spec, load("reward", spec), setup.style, setup.reward_args, agent) for spec in setup.rewards
    ]
    for name in setup.reward_args:
        if not any(name in each.takes for each in plugs):
            raise RloraError(
                f"reward_args.{name} = {setup.reward_args[name]!r}: no reward function has a parameter of that name "
                f"({', '.join(setup.rewards)}); spell it as the function does, or leave it out"
            )
    return plugs


class _Worker:
    def __init__(self, setup: Setup, clock: Clock) -> None:
        self.setup, self.clock = setup, clock
        self.plugs = load_plugs(setup)
        self.env = env_of(load("env", setup.env), setup.env_args) if setup.env else None
        self.runner = asyncio.Runner()  # one loop for all: a judge's client may hold connections of it
        self.names = names_of(setup.rewards)
        self.coroutines = [place for place, each in enumerate(self.plugs) if each.asynchronous]
        self.called: set[int] = set()  # the functions that have been

    def work(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        """The number and the result of each job, as JSON has it."""
        awaited = self.runner.run(self._await(jobs)) if self.coroutines else {}
        for number, job in enumerate(jobs):
            if isinstance(job.of, EnvTurn):
                answered = self._answer(number, job, job.of)
                yield number, asdict(replace(answered, detail=_veiled(answered.detail, self.setup)))
                continue
            calls = itertools.count()
            verdicts = [
                awaited[number, place] if each.asynchronous else self._score(place, number, job, job.of, calls)
                for place, each in enumerate(self.plugs)
            ]
            self.clock.write(*IDLE, self.setup.deadline)
            yield number, [[self._plain(score) for score in scores] for scores in verdicts]

    def _deadline(self, function: int) -> float:
        """Seconds that a call of it may take: the first one more, for it may load a model."""
        return self.setup.deadline if function in self.called else max(self.setup.deadline, self.setup.first_deadline)

    def _plain(self, score: Score) -> tuple[Any, ...]:
        return astuple(replace(score, detail=_veiled(score.detail, self.setup)) if score.detail else score)

    def _score(self, function: int, number: int, job: Job, case: RewardInput, calls: Iterator[int]) -> list[Score]:
        """Of the group by one function, call by call."""
        scores: list[Score] = []
        each = self.plugs[function]
        for episodes in _parts(each, case):
            call = next(calls)
            if call in job.overran:
                scores += [job.overran[call]] * len(episodes)
            else:
                self.clock.write(number, call, function, self._deadline(function))
                scores += each(case, episodes)
                self.called.add(function)
        return scores

    async def _await(self, jobs: Sequence[Job]) -> dict[tuple[int, int], list[Score]]:
        """By the functions that are coroutines, of all groups: so many calls at once, each with its own deadline."""
        free = asyncio.Semaphore(self.setup.concurrency)

        async def call(function: int, job: Job, case: RewardInput, episodes: Sequence[int]) -> list[Score]:
            if COROUTINES in job.overran:
                return [job.overran[COROUTINES]] * len(episodes)
            async with free:
                deadline = self._deadline(function)
                self.clock.write(0, COROUTINES, function, max(map(self._deadline, self.coroutines)))
                try:
                    return await asyncio.wait_for(self.plugs[function].acall(case, episodes), deadline)
                except TimeoutError:
                    detail = too_long(self.setup, deadline, self.names[function])
                    return [Score("timeout", detail=detail)] * len(episodes)
                finally:
                    self.called.add(function)

        async def group(function: int, job: Job, case: RewardInput) -> list[Score]:
            parts = _parts(self.plugs[function], case)
            scores = await asyncio.gather(*(call(function, job, case, episodes) for episodes in parts))
            return [score for of_call in scores for score in of_call]

        asked = {
            (number, function): group(function, job, job.of)
            for number, job in enumerate(jobs)
            for function in self.coroutines
            if isinstance(job.of, RewardInput)
        }
        return dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))

    def _answer(self, number: int, job: Job, turn: EnvTurn) -> EnvReply:
        if overran := job.overran.get(0):
            return EnvReply(None, turn.state, overran.status or "error", f"env = {self.setup.env!r}: {overran.detail}")
        assert self.env
        state = deepcopy(dict(turn.state))
        deadline = self._deadline(ENV)
        self.clock.write(number, 0, ENV, deadline)
        try:
            said = self.env.reply(turn.prompt, turn.message, state)
            if asyncio.iscoroutine(said):
                said = self.runner.run(asyncio.wait_for(said, deadline))
            answered = EnvReply(_said(said), json.loads(json.dumps(state)))
        except TimeoutError:
            return EnvReply(None, turn.state, "timeout", f"env = {self.setup.env!r}: its reply took too long")
        except Exception as error:
            line = at(error, file_of(self.env))
            what = f"its reply raised {type(error).__name__}: {error}; fix it there"
            return EnvReply(None, turn.state, "error", f"{line}env = {self.setup.env!r}: {what}")
        finally:
            self.called.add(ENV)
            self.clock.write(*IDLE, self.setup.deadline)
        return answered


def _veiled(text: str, setup: Setup) -> str:
    """A message without the values of variables that were handed on, and then cut; what is shorter is no secret."""
    secrets = {name: value for name, value in setup.environment.items() if len(value) > _SHORTEST}
    forms = {form: name for name, value in secrets.items() for form in _forms(value) if len(form) > _SHORTEST}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, f"<{forms[form]}>")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - _TAIL]} [...] {text[-_TAIL:]}"


def _forms(value: str) -> set[str]:
    """How a value may stand in a message: as it is, stripped, and as repr(), ascii(), JSON or bytes show it."""
    forms = {value, value.strip()}
    for each in (value, value.strip()):
        shown = {
            repr(each)[1:-1],
            ascii(each)[1:-1],
            json.dumps(each)[1:-1],
            json.dumps(each, ensure_ascii=False)[1:-1],
        }
        shown |= {repr(each + "'\"")[1:-4], repr(each.encode("utf-8", "surrogateescape"))[2:-1]}
        forms |= shown | {repr(form)[1:-1] for form in shown} | {each.encode("utf-8", "backslashreplace").decode()}
    return forms


def _said(said: Any) -> str | list[dict[str, str]] | None:
    """What a reply gives, as text that a tokenizer takes. Raises ValueError for what is no reply."""
    if said is None or isinstance(said, str):
        return said and without_surrogates(said)
    messages = [{key: message[key] for key in ("role", "content")} for message in said]
    if not messages or not all(isinstance(text, str) for message in messages for text in message.values()):
        raise ValueError('it gave neither text nor None nor chat messages, {"role": ..., "content": ...} of strings')
    return [{key: without_surrogates(text) for key, text in each.items()} for each in messages]


def _parts(each: RewardFunction, case: RewardInput) -> list[Sequence[int]]:
    """The episodes of each call."""
    everyone = range(len(case.completions))
    return [[one] for one in everyone] if each.one_at_a_time else [everyone]


def _mapped() -> int:
    """Bytes that the process has mapped."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _limit_memory(mib: int) -> int:
    """From here on the process may map so much more. Returns the bytes of half of that: who holds them should go."""
    now = _mapped()
    resource.setrlimit(resource.RLIMIT_AS, (now + mib * 2**20, resource.RLIM_INFINITY))
    return now + mib * 2**19


def main() -> None:
    """Serve the jobs that come over the descriptor argv[1]; argv[2] is the clock's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a busy worker does not outlive its parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us
    connection = Connection(int(sys.argv[1]))
    os.dup2(2, 1)  # what a user's function prints is no answer of ours
    setup: Setup = connection.recv()
    clock = Clock(int(sys.argv[2]))
    os.environ["RLORA_SEED"] = str(setup.seed)
    receive(setup.given)
    if os.path.isdir(setup.directory):
        os.chdir(setup.directory)
    try:
        worker = _Worker(setup, clock)
    except BaseException as error:
        detail = str(error) if isinstance(error, RloraError) else f"reward: {type(error).__name__}: {error}"
        connection.send_bytes(json.dumps({"error": _veiled(detail, setup)}).encode())
        return
    most = _limit_memory(setup.memory_mib) if sys.platform == "linux" else None
    loaded = {"names": [sorted(each.names) for each in worker.plugs], "coroutines": worker.coroutines}
    connection.send_bytes(json.dumps(loaded).encode())
    with suppress(EOFError, ConnectionError):
        while jobs := connection.recv():
            done: list[Any] = []
            flushed = time.monotonic()
            if most and _mapped() > most:  # what calls have kept would be held against others
                return
            for result in worker.work(jobs):
                done.append(result)
                if time.monotonic() - flushed > _FLUSH:
                    connection.send_bytes(json.dumps(done).encode())
                    done, flushed = [], time.monotonic()
            connection.send_bytes(json.dumps(done).encode())
