"""Text to tokens and back, as the model's chat template and the config have it. No other place makes tokens."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from rlora.config import ChatConfig
from rlora.records import Messages, RloraError

_MARK = "\N{SYMBOL FOR RECORD SEPARATOR}"  # stands for a message, to find what a template puts around it
_USER, _POLICY = {"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}
_THINK = ("<think>", "</think>")  # as reward functions see a model's tags


class Chat:
    """How prompts are put to the policy, and its messages are read. Raises RloraError for an unusable `settings`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: ChatConfig, stop_token_ids: tuple[int, ...]
    ) -> None:
        self.tokenizer, self.settings, self.stop_token_ids = tokenizer, settings, stop_token_ids
        self.template = _template(tokenizer, settings.template)
        self._shown_roles: set[tuple[bool, tuple[str, ...]]] = set()  # of messages that the template shows

    def prompt_ids(self, text: str | Messages) -> tuple[int, ...]:
        """The tokens of a prompt. A plain string is one user message where there is a chat template, else bare text."""
        if not self.template:
            if not isinstance(text, str) or self.settings.system:
                raise RloraError(
                    "model: its tokenizer has no chat template, but the env's prompts, or chat.system, are chat "
                    "messages; use an instruct model, set chat.template, or use an env whose prompts are plain strings"
                )
            return self._bare_ids(text) + self._ids(self._prefill_after(self._left_open(text)))
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(turn) for turn in text]
        if self.settings.system and all(turn["role"] != "system" for turn in messages):
            messages.insert(0, self._system)
        self._check_shown(messages, "all of a prompt")
        return tuple(self._apply(messages, tokenize=True, return_dict=False)) + self._ids(self._prefill)

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
        before: list[dict[str, Any]] = [{"role": "user", "content": "?"}, dict(_POLICY)]
        messages = before + [dict(message) for message in said]
        self._check_shown(messages, "what the env says after the policy's message")
        text = self._apply(messages, tokenize=False).partition(_MARK)[2]
        ids = self._ids(text + self._prefill)
        ended = ids and completion_ids and completion_ids[-1] in self.stop_token_ids and completion_ids[-1] == ids[0]
        return ids[1:] if ended else ids

    def check_replies(self) -> None:
        """Raise RloraError where the template does not show what an env says after a message of the policy."""
        self.reply_ids([{"role": "user", "content": "?"}], ())

    def text(self, ids: Sequence[int], whole: bool = True, prompt: str | Messages = "") -> str:
        """What a message says, without special tokens but the tags of thinking.

        A `whole` one with what it was made to begin with: by the template, by `chat.prefill`, and where there is no
        template by a `prompt` that ends with the tag of thinking.
        """
        text = self._without_special(ids)
        if whole and self.template:
            text = self._opened[0] + self._prefill + text
        elif whole:
            opened = self._left_open(prompt)
            text = opened + self._prefill_after(opened) + text
        for tag, usual in zip(self.settings.think, _THINK, strict=True):
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
    def _special(self) -> dict[int, str]:
        """The special tokens, and their texts."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {token: str(text) for token, text in added.items() if text.special}

    @cached_property
    def _special_tags(self) -> list[tuple[int, ...]]:
        """The tags of thinking in which there are special tokens."""
        tags = [self._ids(tag) for tag in self.settings.think] if self._special else []
        return [tag for tag in tags if any(token in self._special for token in tag)]

    # --- what the policy's message begins with ---

    @cached_property
    def _opened(self) -> tuple[str, str]:
        """What of the template's generation prompt is the message's own, not its header; and all of that prompt.

        The header is what stands before a message of the policy in a conversation too, up to a tag of thinking. A block
        of thinking that the template closes at once is left out: nothing is thought.
        """
        opens, closes = self.settings.think
        try:
            *_, last = shown = self._apply([_USER, _POLICY, _USER], tokenize=False).split(_MARK)
            header = shown[1] if len(shown) == 4 else None
        except RloraError:
            header = None
        try:
            if header is None:
                last = self._apply([_USER], tokenize=False).rpartition(_MARK)[2]
            unprompted = self._apply([_USER], tokenize=False, add_generation_prompt=False).rpartition(_MARK)[2]
        except RloraError:  # it is told with the first prompt
            return "", ""
        generated = last.removeprefix(unprompted)
        asked = generated or last
        known = 0 if header is None else next(n for n in range(len(asked), -1, -1) if asked[:n] in header)
        tag = asked.rfind(opens)
        if tag >= 0 and closes not in asked[tag:] and (header is not None or asked.rstrip().endswith(opens)):
            known = tag if header is None else min(known, tag)
        elif header is None:
            known = len(asked)
        opened = re.sub(rf"^\s*({re.escape(opens)})?\s*{re.escape(closes)}\s*", "", asked[known:])
        return self._after_special(opened), generated

    def _after_special(self, text: str) -> str:
        """What of a text follows the last special token that is no tag of thinking: those before belong to a header."""
        others = [special for special in self._special.values() if special not in self.settings.think]
        found = re.finditer("|".join(map(re.escape, (*self.settings.think, *others))), text)
        return text[max((match.end() for match in found if match[0] in others), default=0) :]

    def _left_open(self, prompt: str | Messages) -> str:
        """The tag of thinking with which a bare prompt ends, and the white space after it."""
        opens = self.settings.think[0]
        is_open = isinstance(prompt, str) and prompt.rstrip().endswith(opens)
        return prompt[prompt.rindex(opens) :] if is_open and isinstance(prompt, str) else ""

    @cached_property
    def _prefill(self) -> str:
        """What of `chat.prefill` the template does not write itself. Raises RloraError where both think."""
        (opened, generated), (opens, closes) = self._opened, self.settings.think
        left = self._prefill_after(opened)
        if opens in left and (opens in opened + generated or closes in generated):
            raise RloraError(
                f"chat.prefill = {self.settings.prefill!r}: {opens} or {closes} stands already in what the chat "
                f"template ends a prompt with, {generated or opened!r}; leave chat.prefill out, or change "
                "chat.template_args"
            )
        return left

    def _prefill_after(self, opened: str) -> str:
        """`chat.prefill` without what stands before it already."""
        prefill, before = self.settings.prefill, opened.strip()
        if not before or not prefill.lstrip().startswith(before):
            return prefill
        left = prefill.lstrip().removeprefix(before)
        space = opened[len(opened.rstrip()) :]
        return left[next(n for n in range(len(space), -1, -1) if left.startswith(space[:n])) :]

    # --- the template ---

    @property
    def _name(self) -> str:
        return (
            f"chat.template = {self.settings.template!r:.200}" if self.settings.template else "model: its chat template"
        )

    @property
    def _system(self) -> dict[str, str]:
        return {"role": "system", "content": self.settings.system}

    def _check_shown(self, messages: list[dict[str, Any]], what: str) -> None:
        """Raise RloraError where the template leaves out one of such messages. Looked at once for the same roles."""
        is_ours = bool(self.settings.system) and messages[0] == self._system
        roles = tuple(str(turn["role"]) for turn in messages)
        if (is_ours, roles) in self._shown_roles:
            return
        marked = [turn | {"content": f"{_MARK}{number}{_MARK}"} for number, turn in enumerate(messages)]
        try:
            text = self._apply(marked, tokenize=False)
        except RloraError:  # the messages themselves may do, or it is told with them
            return
        left_out = [number for number, turn in enumerate(marked) if turn["content"] not in text]
        if 0 in left_out and is_ours:
            raise RloraError(
                f"chat.system = {self.settings.system!r}: the chat template shows no system message; leave it out and "
                "put it into the prompts, or set a chat.template that shows it"
            )
        if left_out:
            number = left_out[-1]
            raise RloraError(
                f"{self._name}: it does not show {what}: of messages whose roles are {', '.join(roles)} it leaves out "
                f"number {number}, {roles[number]}; {_MEND}, or let the env give others"
            )
        self._shown_roles.add((is_ours, roles))

    def _apply(self, messages: list[dict[str, str]], **how: Any) -> Any:
        """The messages as the template puts them, up to where the policy's next one begins."""
        try:
            return self._render(messages, self.settings.template_args, how)
        except Exception as error:  # a template is a program
            raise self._refusal(messages, error) from error

    def _render(self, messages: list[dict[str, str]], template_args: Any, how: dict[str, Any]) -> Any:
        settings: dict[str, Any] = {"chat_template": self.template, "add_generation_prompt": True}
        return self.tokenizer.apply_chat_template(messages, **template_args | settings | how)

    def _refusal(self, messages: list[dict[str, str]], error: Exception) -> RloraError:
        """What to say where the template fails: which field is at fault, as far as leaving it out helps."""
        if isinstance(error, TemplateSyntaxError):
            return RloraError(f"{self._name}: line {error.lineno} is no valid Jinja ({error}); {_MEND}")
        if self.settings.template_args and self._renders(messages, {}):
            return RloraError(
                f"chat.template_args = {self.settings.template_args!r}: the chat template fails with them ({error}); "
                "give what it takes, or leave them out"
            )
        others = [turn for turn in messages if turn != self._system]
        if self.settings.system and len(others) < len(messages) and self._renders(others, self.settings.template_args):
            return RloraError(
                f"chat.system = {self.settings.system!r}: the chat template takes no system message ({error}); leave "
                "it out and put it into the prompts, or set a chat.template that takes it"
            )
        return RloraError(
            f"env: the model's chat template takes no {messages!r} ({error}); let the env give what it takes"
            + (", or mend chat.template" if self.settings.template else "")
        )

    def _renders(self, messages: list[dict[str, str]], template_args: Any) -> bool:
        try:
            self._render(messages, template_args, {"tokenize": False})
        except Exception:  # as above
            return False
        return True


_MEND = "mend it, or set another chat.template"


def _template(tokenizer: PreTrainedTokenizerBase, asked: str) -> str | None:
    """The chat template: `asked`, as Jinja, the name of one of the tokenizer's, or a file; else the tokenizer's own."""
    own: Any = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    there = f"its tokenizer has several chat templates ({', '.join(named)})"
    if not asked:
        if named and "default" not in named:
            raise RloraError(f"model: {there}, and none is the default; name one as chat.template")
        return str(named["default"]) if named else str(own) if own else None
    if asked in named:
        return str(named[asked])
    if "{" in asked:
        return asked
    try:
        return Path(asked).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RloraError(
            f"chat.template = {asked!r}: can't be read ({reason}); give a Jinja template, or the file of one"
            + (f", or a name: {there}" if named else "")
        ) from None
