"""A Python tool for any env: the policy writes code in its message, reads the code's output, and continues.

policy  <python>print(347 * 28)</python>
env                                     <result>9716</result>
policy                                                      The answer is 9716.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from rlora.plugin import load
from rlora.records import Messages, Prompt, RloraError

from .generated import counts
from .sandbox import run

INSTRUCTION = "You can run Python: write <python> code that prints </python>, and you get its output. Then answer."
_CALL = re.compile(r"<python>((?:(?!<python>).)*)</python>\s*$", re.DOTALL)


class PythonTool:
    """An agent that wraps a single-turn env, so that the policy can run Python in a sandbox (`rlora.envs.sandbox`).

    `env` is the spec of the wrapped env, which is constructed with all arguments that are not named here.
    `allow_python` must be true. `instruction` is appended to each problem. The code of a call can use the standard
    library, `seconds` seconds and `memory_mib` MiB; the policy gets the first `characters` characters of the output.
    The episode ends with the first message that has no code at its end, or whose code would exceed `max_calls` calls.
    Reward: the wrapped env's reward.
    """

    stop = ("</python>",)

    def __init__(
        self,
        env: str,
        allow_python: bool = False,
        instruction: str = INSTRUCTION,
        max_calls: int = 3,
        seconds: float = 5.0,
        memory_mib: int = 512,
        characters: int = 1000,
        **env_args: Any,
    ) -> None:
        check_limits(allow_python, seconds, memory_mib, characters)
        self._env, self._env_args, self._instruction = env, env_args, instruction
        self._max_calls = counts("max_calls", max_calls, 1, 1000)[0]
        self._limits = (seconds, memory_mib, characters)

    def train(self) -> Iterable[Prompt]:
        run("", seconds=60.0)  # raises RloraError before sampling if the sandbox does not work
        return with_instruction(load("env_args.env", self._env)(**self._env_args).train(), self._instruction)

    def held_out(self) -> Iterable[Prompt]:
        return with_instruction(load("env_args.env", self._env)(**self._env_args).held_out(), self._instruction)

    def reply(self, prompt: Prompt, message: str, state: dict[str, Any]) -> str | None:
        """Run the code at the end of the message, and return its output between `<result>` and `</result>`.

        None, which ends the episode, without code or after `max_calls` calls. Blocks until the code has ended. Raises
        RloraError if the machine can't confine the code.
        """
        call = _CALL.search(message)
        state["calls"] = state.get("calls", 0) + bool(call)
        if not call or state["calls"] > self._max_calls:
            return None
        return f"\n<result>\n{run(call[1].strip(), *self._limits).strip()}\n</result>\n"


def check_limits(allow_python: bool, seconds: float, memory_mib: int, characters: int) -> None:
    """Raise RloraError if the sandbox is not allowed, or if one of its limits is out of range."""
    if not allow_python:
        raise RloraError(
            "env_args.allow_python = false: this env runs code that the model writes, in a sandbox; to allow that, "
            "set env_args.allow_python = true"
        )
    for name, value in (("seconds", seconds), ("characters", characters)):
        if value <= 0:
            raise RloraError(f"env_args.{name} = {value}: use a positive number")
    if memory_mib < 64:
        raise RloraError(f"env_args.memory_mib = {memory_mib}: use 64 or more, which Python itself needs")


def with_instruction(prompts: Iterable[Prompt], instruction: str) -> list[Prompt]:
    """Return the prompts with the instruction, if there is one, at the end of the last message."""
    return [replace(prompt, text=_extended(prompt.text, instruction)) if instruction else prompt for prompt in prompts]


def _extended(text: str | Messages, instruction: str) -> str | Messages:
    if isinstance(text, str):
        return f"{text}\n{instruction}"
    *earlier, last = text
    return [*earlier, {**last, "content": f"{last['content']}\n{instruction}"}]
