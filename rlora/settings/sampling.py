"""Settings of sampling and of chat templates."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from rlora.settings.fields import STRICT, Arguments, Problem, Share


@dataclass(frozen=True)
class SamplingConfig:
    __pydantic_config__ = STRICT

    temperature: Annotated[float, Field(ge=0.01)] = 1.0
    """Sampling temperature in training, 0.01 or more. The learner computes logprobs at the same temperature."""
    top_k: NonNegativeInt = 0
    """Number of the most probable tokens that a token is sampled from, 2 or more; tokens that are as probable as the
    last one are kept too. `0` samples from all tokens. The engines record which tokens were kept, and the learner
    computes probabilities over the same tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that the most probable tokens must reach together; a token is sampled from these (nucleus sampling).
    `1` samples from all tokens. The engines record which tokens were kept, and the learner computes probabilities over
    the same tokens. On a GPU `sampling.top_k` must be set too."""
    min_p: Share = 0.0
    """Smallest probability of a token that can be sampled, relative to the most probable token, below 1. `0` samples
    from all tokens. The engines record which tokens were kept, and the learner computes probabilities over the same
    tokens. On a GPU `sampling.top_k` must be set too."""
    max_tokens: PositiveInt = 256
    """Maximum length of a completion in tokens. In an episode of several turns, this is the limit for all turns
    together, including the env's messages."""
    max_prompt_tokens: PositiveInt = 512
    """Maximum length of a prompt in tokens, chat template included. Longer prompts are dropped when the prompts are
    loaded, and `rlora train` prints their number. In SFT and pairs they are an error, which names the row."""

    @property
    def truncates(self) -> bool:
        """Whether a token is sampled from a part of the vocabulary."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def check(self) -> Iterator[Problem]:
        """Yield a Problem for every rule that these settings break."""
        for name, is_greedy, remedy in (
            ("top_k", self.top_k == 1, "2 or more, or 0 for all tokens"),
            ("top_p", self.top_p < 0.01, "0.01 or more"),
            ("min_p", self.min_p == 1, "less than 1"),
        ):
            if is_greedy:
                yield Problem(
                    f"sampling.{name}",
                    "only the most probable token is sampled, so the completions of a prompt are equal and their "
                    f"probabilities have no gradient; set {remedy}",
                )


@dataclass(frozen=True)
class ChatConfig:
    __pydantic_config__ = STRICT

    system: str = ""
    """System message for prompts that contain none; the chat template must support system messages. Empty (the default)
    adds no message."""
    template: str = ""
    """Chat template that replaces the tokenizer's default: Jinja text, the path of a file, or the name of one of the
    tokenizer's templates. Empty (the default) uses the tokenizer's default template."""
    template_args: Arguments = field(default_factory=dict)
    """Arguments of the chat template in addition to the messages, such as enable_thinking, none by default; on the
    command line --chat.template-args.NAME VALUE."""
    prefill: str = ""
    """Text with which each message of the policy starts. This text is part of the prompt, so it is not trained on, and
    reward functions receive it before the sampled text. A beginning that the chat template already writes, such as
    `<think>`, is not repeated. Empty by default."""
    stop: tuple[str, ...] = ()
    """Strings that end the policy's message, in addition to the model's end tokens and the env's `stop` strings. Empty
    by default."""
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    """IDs of tokens that end the policy's message, in addition to the model's end tokens. Empty by default."""
    think: tuple[str, str] = ("<think>", "</think>")
    """Opening and closing tag that the model writes around its thinking. Reward functions receive `<think>` and
    `</think>` in place of these tags."""
    tool_calls: str = "auto"
    """Format in which the policy calls the env's tools: `hermes`, `xml`, `json`, or your own parser, mine.py:parse.
    `auto` (the default) is the format in which the chat template renders a call."""

    def check(self) -> Iterator[Problem]:
        """Yield a Problem for every rule that these settings break."""
        if not all(self.think):
            yield Problem("chat.think", "both tags must be non-empty; unset chat.think to use <think> and </think>")
        if not all(self.stop):
            yield Problem("chat.stop", "an empty string would end every message; remove the empty string")
