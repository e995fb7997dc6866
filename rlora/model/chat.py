"""Text to tokens and back, as the model's chat template and the config have it. No other place makes tokens."""

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from rlora.model.template import MARK, Template
from rlora.records import Messages, RloraError
from rlora.settings import ChatConfig

THINK = ("<think>", "</think>")  # as reward functions see a model's tags


class Chat:
    """How prompts are put to the policy, and its messages are read. Raises RloraError for an unusable `settings`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: ChatConfig, stop_token_ids: tuple[int, ...]
    ) -> None:
        self.tokenizer, self.settings, self.stop_token_ids = tokenizer, settings, stop_token_ids
        self._template = Template(tokenizer, settings)
        self.template, self._special = self._template.source, self._template.special

    def prompt_ids(self, text: str | Messages) -> tuple[int, ...]:
        """The tokens of a prompt. A plain string is one user message where there is a chat template, else bare text."""
        if not self.template:
            if not isinstance(text, str) or self.settings.system:
                raise RloraError(
                    "model: its tokenizer has no chat template, but the env's prompts, or chat.system, are chat "
                    "messages; use an instruct model, set chat.template, or use an env whose prompts are plain strings"
                )
            return self._bare_ids(text) + self._ids(self._begun(text)[1])
        messages = self._template.messages(text)
        self._template.check_shown(messages, "all of a prompt")
        ids = self._template.render(messages, tokenize=True, return_dict=False)
        return tuple(ids) + self._ids(self._begun(messages)[1])

    def _bare_ids(self, text: str) -> tuple[int, ...]:
        """With what the tokenizer puts before a text, once, but not what it puts after: the policy goes on there."""
        ids, whole = self._ids(text), tuple(self.tokenizer.encode(text))
        start = next((at for at in range(len(whole) - len(ids) + 1) if whole[at : at + len(ids)] == ids), None)
        if start is None or not ids:
            while whole and whole[-1] in self.stop_token_ids:
                whole = whole[:-1]
            return whole
        return ids if ids[:start] == whole[:start] else whole[:start] + ids

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
        messages = self.conversation(said)
        self._template.check_shown(messages, "what the env says after the policy's message")
        text = self._template.render(messages, tokenize=False).partition(MARK)[2]
        ids = self._ids(text + self._begun(messages)[1])
        ended = ids and completion_ids and completion_ids[-1] in self.stop_token_ids and completion_ids[-1] == ids[0]
        return ids[1:] if ended else ids

    def conversation(self, said: Messages) -> Messages:
        """What an env says, after a message of the policy, as a template is given it."""
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        return self._template.messages([*before, *said])

    def check_replies(self) -> None:
        """Raise RloraError where the template does not show what an env says after a message of the policy."""
        self.reply_ids([{"role": "user", "content": "?"}], ())

    def text(self, ids: Sequence[int], whole: bool = True, prompt: str | Messages = "") -> str:
        """What a message says, without special tokens but the tags of thinking.

        A `whole` one with what it was made to begin with, after that `prompt` or conversation: by the template, by
        `chat.prefill`, and by a bare prompt that ends with the tag of thinking.
        """
        text = ("".join(self._begun(prompt)) if whole else "") + self._without_special(ids)
        for tag, usual in zip(self.settings.think, THINK, strict=True):
            text = text.replace(tag, usual)
        return text

    def shown(self, ids: Sequence[int]) -> str:
        """Tokens as the policy reads them, special ones too."""
        return str(self.tokenizer.decode(list(ids)))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _without_special(self, ids: Sequence[int]) -> str:
        if not self._special_tags:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        ids = tuple(ids)
        kept = {
            place
            for tag in self._special_tags
            for start in range(len(ids) - len(tag) + 1)
            if ids[start : start + len(tag)] == tag
            for place in range(start, start + len(tag))
        }
        shown = [token for place, token in enumerate(ids) if place in kept or token not in self._special]
        return str(self.tokenizer.decode(shown))

    @cached_property
    def _special_tags(self) -> list[tuple[int, ...]]:
        """The tags of thinking in which there are special tokens."""
        tags = [self._ids(tag) for tag in self.settings.think] if self._special else []
        return [tag for tag in tags if any(token in self._special for token in tag)]

    # --- what the policy's message begins with ---

    def _begun(self, after: str | Messages) -> tuple[str, str]:
        """What a message begins with: what is opened already, and what of `chat.prefill` is not.

        Raises RloraError where both think.
        """
        opens, closes = self.settings.think
        if not self.template:
            is_open = isinstance(after, str) and after.rstrip().endswith(opens)
            opened = str(after)[str(after).rindex(opens) :] if is_open else ""
            return opened, self._prefill_after(opened)
        opened, generated = self._template.opening(after)
        left = self._prefill_after(opened)
        if opens in left and (opens in opened + generated or closes in generated):
            raise RloraError(
                f"chat.prefill = {self.settings.prefill!r}: {opens} or {closes} stands already in what the chat "
                f"template ends a prompt with, {generated or opened!r}; leave chat.prefill out, or change "
                "chat.template_args"
            )
        return opened, left

    def _prefill_after(self, opened: str) -> str:
        """`chat.prefill` without what stands before it already."""
        prefill, before = self.settings.prefill, opened.strip()
        if not before or not prefill.lstrip().startswith(before):
            return prefill
        left = prefill.lstrip().removeprefix(before)
        space = opened[len(opened.rstrip()) :]
        return left[next(n for n in range(len(space), -1, -1) if left.startswith(space[:n])) :]
