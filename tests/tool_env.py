"""An env with tools that work, fail, hang and end their process, and a parser of calls."""

import asyncio
import os
from typing import Any

from rlora.model.tool_calls import ToolCall
from rlora.records import Prompt


def parse(text: str) -> list[ToolCall]:
    """Calls as `CALL multiply 2 3`."""
    return [ToolCall("multiply", {"a": int(a), "b": int(b)}) for _, _, a, b in [text.split()]]


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def fail(kind: str = "ValueError") -> None:
    """Raise.

    Args:
        kind: Type of the exception.
    """
    kinds = (ValueError, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, TimeoutError, MuteError)
    raise {kind.__name__: kind for kind in kinds}[kind]("out of stock")


async def hang() -> None:
    """Take too long."""
    await asyncio.sleep(60)


def leave() -> None:
    """End the process."""
    os._exit(3)


def question(prompt: Prompt) -> str:
    """Return the question."""
    return str(prompt.text)


class Shop:
    def __init__(self) -> None:
        self.tools = [self.put, fail, hang, leave, question]

    def train(self) -> list[Prompt]:
        return [Prompt("Put two pens and three cups into the basket. How many things are there?", answer=5)]

    def held_out(self) -> list[Prompt]:
        return []

    async def put(self, item: str, number: int, state: dict[str, Any]) -> dict[str, int]:
        """Put things into the basket.

        Args:
            item: What to put.
            number: How many.
        """
        basket: dict[str, int] = state.setdefault("basket", {})
        basket[item] = basket.get(item, 0) + number
        return basket
