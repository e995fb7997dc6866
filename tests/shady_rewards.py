"""Reward functions, and an env, that some texts make misbehave. Tests run them in separate processes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rlora.records import Prompt


def shady(completion: str, answer: object) -> float:
    """1 if the completion equals the answer. Some texts do harm instead."""
    if completion == "hang":
        while True:
            pass
    if completion == "hold the GIL":
        9**9**9
    if completion == "memory":
        return float(len(bytearray(8 << 30)))
    if completion == "die":
        os._exit(3)
    if completion == "exit":
        sys.exit(4)
    if completion == "raise":
        raise KeyError("no judge today")
    if completion == "print":
        print("a line on standard output")
    if completion == "alarm":
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("rang")))
        signal.alarm(1)
        try:
            time.sleep(5)
        except TimeoutError:
            return 0.5
    return float(completion == str(answer))


def slow(completion: str, answer: object) -> float:
    time.sleep(float(completion))
    return 1.0


async def judge(completion: str, answer: object) -> float:
    """Stands in for a remote judge. The completion is its latency in seconds."""
    await asyncio.sleep(float(completion))
    return 1.0


async def blocking_judge(completion: str, answer: object) -> float:
    if completion == "block":
        time.sleep(60)
    return 1.0


_LOOPS = set()


async def loops(completion: str, answer: object) -> float:
    """Number of event loops in which it was called."""
    _LOOPS.add(id(asyncio.get_running_loop()))
    return float(len(_LOOPS))


_MODEL: list[str] = []


def lazy(completion: str, answer: object) -> float:
    """Loads its model in the first call, which takes 2 s."""
    if not _MODEL:
        time.sleep(2)
        _MODEL.append("loaded")
    time.sleep(60 if completion == "hang" else 0)
    return 1.0


async def lazy_judge(completion: str, answer: object) -> float:
    if not _MODEL:
        await asyncio.sleep(2)
        _MODEL.append("loaded")
    await asyncio.sleep(60 if completion == "hang" else 0)
    return 1.0


def killed(completion: str, answer: object) -> float:
    """Sends its process the signal whose number is the completion."""
    os.kill(os.getpid(), int(completion))
    return 1.0


async def dying_judge(completion: str, answer: object) -> float:
    os._exit(3)


def with_a_key(completion: str, answer: object) -> float:
    """Needs an environment variable, and leaks its value in an error."""
    if os.environ["RLORA_TEST_KEY"] != completion:
        raise PermissionError(f"no access with {os.environ['RLORA_TEST_KEY']}")
    return 1.0


def starts(completion: str, answer: str) -> float:
    """Starts a process that outlives the call, writes its pid to a file, and hangs."""
    child = subprocess.Popen(["sleep", "77"])
    Path(answer).write_text(str(child.pid))
    time.sleep(60)
    return 1.0


_KEPT = []


def keeps(completion: str, answer: object) -> float:
    _KEPT.append(bytearray(100 << 20))
    return 1.0


def counted(completion: str, answer: str) -> float:
    """Number of calls so far, kept as the size of the file that the answer names."""
    with Path(answer).open("a") as file:
        file.write("x")
    if completion == "die" and Path(answer).stat().st_size == 1:
        os._exit(3)
    return float(Path(answer).stat().st_size)


class Guarded:
    """An env that replies to "hello" and counts messages. Other messages do harm."""

    def __init__(self, greeting: str = "hello") -> None:
        self.greeting = greeting

    def train(self) -> list[Prompt]:
        return [Prompt("greet", answer="hello")]

    held_out = train

    def reply(self, prompt: Prompt, message: str, state: dict[str, Any]) -> str | list[dict[str, str]] | None:
        if message == "hang":
            time.sleep(60)
        if message == "raise":
            raise ValueError("no such tool")
        if message == "not plain":
            state["it"] = object()
        if message == "not plain inside":
            state["list"].append(object())
        if message == "no text":
            return [{"role": "user", "content": None}]  # type: ignore[dict-item]
        if message == "surrogate":
            return "\ud800"
        state["seen"] = state.get("seen", 0) + 1
        if message == "chat":
            return [{"role": "user", "content": "and you?"}]
        return f"{self.greeting} {state['seen']}" if message == prompt.answer else None
