"""A calculator agent, in two forms: the policy calls a calculator, reads the result, and answers.

`Calculator` has the calls in the policy's text, in the format of GSM8K (Cobbe et al. 2021, arXiv:2110.14168). Few
tokenizers merge "=" with a preceding digit, so the sampled tokens end exactly where the env's reply begins.

    policy  <<347*28=
    env              9716>>
    policy                  The answer is 9716.

`ToolCalculator` has the calls in the form that the chat template renders, such as Hermes':

    policy  <tool_call>{"name": "calculator", "arguments": {"expression": "347*28"}}</tool_call>
    env     <tool_response>9716</tool_response>
    policy  The answer is 9716.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlora.records import Prompt

from .arithmetic import expression
from .generated import Generated, counts
from .tools import calculate, calculator, called

SYSTEM = (
    "You can use a calculator: write <<expression= and it writes the result. Then give the answer as in the examples."
)
_SHOTS = (
    ("What is 347 * 28?", "347*28", 9716),
    ("Mia read 187 of the 521 pages of a book. How many pages are left?", "521-187", 334),
    ("What is 41 * 16 + 9?", "41*16+9", 665),
)
_Story = tuple[str, Callable[[int, int, int], int]]
_STORIES: tuple[_Story, ...] = (
    ("A box holds {a} pens. How many pens are in {b} boxes?", lambda a, b, c: a * b),
    ("A shop had {a} cups and got {b} more. How many cups does it have?", lambda a, b, c: a + b),
    ("A train ticket costs {a} cents. How many cents do {b} tickets cost?", lambda a, b, c: a * b),
    ("One farm has {a} sheep and another has {b}. How many sheep do they have together?", lambda a, b, c: a + b),
)
_LONG_STORIES: tuple[_Story, ...] = (
    ("A box holds {a} pens. How many pens are in {b} boxes and {c} loose ones?", lambda a, b, c: a * b + c),
    ("A shop had {a} cups, got {b} more and then {c}. How many cups does it have?", lambda a, b, c: a + b + c),
    ("Ana has {a} bags and Ben {b}, each with {c} nuts. How many nuts do they have?", lambda a, b, c: (a + b) * c),
)

_CALL = re.compile(r"<<([\d+\-*/(). ]{1,100})=\s*$", re.ASCII)


class _Problems(Generated):
    """Problems of `levels`, generated from `seed`, with `shots` examples of calls before each."""

    _system = ""

    def __init__(
        self,
        levels: int | str | Sequence[int] = "1,2,3",
        shots: int = 2,
        max_calls: int = 3,
        size: int = 2000,
        held_out_size: int = 200,
        seed: int = 0,
    ) -> None:
        self._levels, self._shots = counts("levels", levels, 1, 4), counts("shots", shots, 0, len(_SHOTS))[0]
        self.max_calls, self._seed = counts("max_calls", max_calls, 1, 100)[0], seed
        self._size, self._held_out_size = size, held_out_size

    def _example(self, call: str, result: int) -> list[dict[str, Any]]:
        """Return the messages that answer a question by a call."""
        raise NotImplementedError

    def _problems(self) -> Iterator[Prompt]:
        rng = random.Random(self._seed)
        while True:
            level = rng.choice(self._levels)
            question, answer = _problem(rng, level)
            turns: list[dict[str, Any]] = [{"role": "system", "content": self._system}] if self._system else []
            for example, call, result in _SHOTS[: self._shots]:
                turns += [{"role": "user", "content": example}, *self._example(call, result)]
            turns.append({"role": "user", "content": question})
            yield Prompt(turns, answer=answer, columns={"level": level, "question": question})


class Calculator(_Problems):
    """An agent with problems that are too hard for a small model without a tool, generated from `seed`.

    `size` problems are for training, and `held_out_size` further problems are held out. `levels` is a selection of 1
    (one operator), 2 (two operators), 3 (a story with one operator) and 4 (a story with two operators); the numbers
    have two or three digits. `shots` (0 to 3) is the number of examples at the start of each prompt. The episode ends
    with the first message that has no call at its end, or whose call would exceed `max_calls` calls. Reward:
    `rlora.rewards.calculator:answered`. Columns for rewards: `level` and `question`.
    """

    stop = ("=",)
    _system = SYSTEM

    def reply(self, prompt: Prompt, message: str, state: dict[str, Any]) -> str | None:
        """Return the result of the call at the end of the message, or "error" if the call can't be computed, and >>.

        None, which ends the episode, without a call or after `max_calls` calls. `state["calls"]` counts the calls.
        """
        call = _CALL.search(message)
        state["calls"] = state.get("calls", 0) + bool(call)
        return f"{calculate(call[1])}>>" if call and state["calls"] <= self.max_calls else None

    def _example(self, call: str, result: int) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": f"<<{call}={result}>> The answer is {result}."}]


class ToolCalculator(_Problems):
    """The problems and arguments of `Calculator`, with a calculator as a tool. Reward:
    `rlora.rewards.integer:integer_answer`."""

    tools = (calculator,)

    def _example(self, call: str, result: int) -> list[dict[str, Any]]:
        return [
            *called("calculator", str(result), expression=call),
            {"role": "assistant", "content": f"The answer is {result}."},
        ]


def _problem(rng: random.Random, level: int) -> tuple[str, int]:
    digits = rng.choice((2, 3))
    if level <= 2:
        text, answer = expression(rng, digits, level + 1, "+-*")
        return f"What is {text}?", answer
    a, b, c = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(3))
    story, value = rng.choice(_STORIES if level == 3 else _LONG_STORIES)
    return story.format(a=a, b=b, c=c), value(a, b, c)
