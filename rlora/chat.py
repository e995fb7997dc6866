"""Text to tokens and back, as the model's chat template and the config have it. No other place makes tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlora.config import ChatConfig
from rlora.records import Messages, RloraError

_MARK = "\N{SYMBOL FOR RECORD SEPARATOR}"  # stands for a message of the policy, to find what a template puts after it
_THINK = ("<think>", "</think>")  # as reward functions see a model's tags


class Chat:
    """How prompts are put to the policy, and its messages are read. Raises RloraError for an unusable `settings`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: ChatConfig, stop_token_ids: tuple[int, ...]
    ) -> None:
        self.tokenizer, self.settings, self.stop_token_ids = tokenizer, settings, stop_token_ids
        self.template: str | None = tokenizer.chat_template
        if settings.template:
            is_text = "{" in settings.template
            try:
                self.template = settings.template if is_text else Path(settings.template).read_text()
            except OSError as error:
                raise RloraError(
                    f"chat.template = {settings.template!r}: can't be read ({error.strerror}); give a Jinja template, "
                    "or the file of one"
                ) from None

    def prompt_ids(self, text: str | Messages) -> tuple[int, ...]:
        """The tokens of a prompt. A plain string is one user message where there is a chat template, else bare text."""
        if not self.template:
            if not isinstance(text, str) or self.settings.system:
                raise RloraError(
                    "model: its tokenizer has no chat template, but the env's prompts, or chat.system, are chat "
                    "messages; use an instruct model, set chat.template, or use an env whose prompts are plain strings"
                )
            return tuple(self.tokenizer.encode(text)) + self._ids(self.settings.prefill)
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(turn) for turn in text]
        if self.settings.system and all(turn["role"] != "system" for turn in messages):
            messages.insert(0, {"role": "system", "content": self.settings.system})
        return tuple(self._apply(messages, tokenize=True, return_dict=False)) + self._ids(self.settings.prefill)

    def reply_ids(self, said: str | Messages, completion_ids: Sequence[int]) -> tuple[int, ...]:
        """The tokens of what an env says after a completion: they follow it as they are.

        A string goes on in the policy's own message. Chat messages are put as the template puts them after a message of
        the policy, up to where the policy's next one begins; its end token stands there once, whoever has written it.
        """
        if isinstance(said, str):
            return self._ids(said)
        if not self.template:
            raise RloraError(
                "env: its reply gave chat messages, but the model's tokenizer has no chat template; let it give a "
                "string, use an instruct model, or set chat.template"
            )
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        text = self._apply(before + [dict(message) for message in said], tokenize=False).partition(_MARK)[2]
        ids = self._ids(text + self.settings.prefill)
        ended = completion_ids and completion_ids[-1] in self.stop_token_ids and completion_ids[-1] == ids[0]
        return ids[1:] if ended else ids

    def text(self, ids: Sequence[int], whole: bool = True) -> str:
        """What a message says, without special tokens; a `whole` one with what it was made to begin with."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        if whole:
            text = self.settings.prefill + text
        for tag, usual in zip(self.settings.think, _THINK, strict=True):
            text = text.replace(tag, usual)
        return text

    def shown(self, ids: Sequence[int]) -> str:
        """Tokens as the policy reads them, special ones too."""
        return str(self.tokenizer.decode(list(ids)))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _apply(self, messages: list[dict[str, str]], **how: Any) -> Any:
        """The messages as the template puts them, up to where the policy's next one begins."""
        settings: dict[str, Any] = {"chat_template": self.template, **self.settings.template_args, **how}
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **settings)
        except TemplateError as error:
            raise RloraError(
                f"env: the model's chat template takes no {messages!r} ({error}); let the env give what it takes"
            ) from error
