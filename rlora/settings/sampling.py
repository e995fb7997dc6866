"""Settings of sampling and of chat templates."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, PositiveInt

from rlora.settings.fields import STRICT, Arguments, Problem


@dataclass(frozen=True)
class SamplingConfig:
    __pydantic_config__ = STRICT

    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature in training; the learner's logprobs use it too."""
    max_tokens: PositiveInt = 256
    """Maximum length of a completion in tokens. In an episode of several turns the limit covers all turns and the env's
    messages."""
    max_prompt_tokens: PositiveInt = 512
    """Maximum length of a prompt in tokens. Longer prompts are dropped when the data is loaded, and counted."""


@dataclass(frozen=True)
class ChatConfig:
    __pydantic_config__ = STRICT

    system: str = ""
    """System message for prompts that have none."""
    template: str = ""
    """Chat template that replaces the tokenizer's default: Jinja text, a file, or the name of a template in the
    tokenizer."""
    template_args: Arguments = field(default_factory=dict)
    """Arguments of the chat template besides the messages, such as enable_thinking."""
    prefill: str = ""
    """Text that starts each message of the policy. It is part of the prompt, and reward functions see it. Text that the
    template already writes, such as <think>, is not repeated."""
    stop: tuple[str, ...] = ()
    """Strings that end the policy's message, in addition to its end token and the env's own stop strings."""
    think: tuple[str, str] = ("<think>", "</think>")
    """The model's opening and closing tag around its thinking. Reward functions always see <think> and </think>."""

    def check(self) -> Iterator[Problem]:
        if not all(self.think):
            yield Problem("chat.think", "both tags must be non-empty; omit the field to use <think> and </think>")
        if not all(self.stop):
            yield Problem("chat.stop", "an empty string would end every message; remove it")
