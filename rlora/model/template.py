"""A chat template: which it is, what it shows, and what it opens the policy's messages with."""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from rlora.records import Messages, RloraError
from rlora.settings import ChatConfig

MARK = "\N{SYMBOL FOR RECORD SEPARATOR}"  # stands for a message, to find what a template puts around it
_USER, _POLICY = {"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}
_MEND = "mend it, or set another chat.template"
_CACHED = 256


class Template:
    """The chat template of a tokenizer, or of the config. Raises RloraError for an unusable `settings`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatConfig) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.source = _source(tokenizer, settings.template)  # None where there is none
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {token: str(text) for token, text in added.items() if text.special}
        self._shown_roles: set[tuple[bool, tuple[str, ...]]] = set()  # of messages that it shows
        self._openings: dict[str, tuple[str, str]] = {}  # of the last messages that were asked for

    def messages(self, text: str | Messages) -> list[Mapping[str, str]]:
        """The messages of a prompt, with the config's system message where they have none."""
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(turn) for turn in text]
        if self.settings.system and all(turn["role"] != "system" for turn in messages):
            messages.insert(0, self._system)
        return list(messages)

    def opening(self, after: str | Messages) -> tuple[str, str]:
        """What of the generation prompt after such messages is the policy's own, not a header; and all of that prompt.

        The header is what stands before a message of the policy in a conversation too, up to a tag of thinking. A block
        of thinking that the template closes at once is left out: nothing is thought.
        """
        messages = self.messages(after)
        if repr(messages) not in self._openings:
            if len(self._openings) >= _CACHED:
                self._openings.clear()
            self._openings[repr(messages)] = self._opening(messages)
        return self._openings[repr(messages)]

    def _opening(self, messages: Messages) -> tuple[str, str]:
        opens, closes = self.settings.think
        header, end, is_asked = self._frame
        generated = ""
        if is_asked:
            try:
                before = self.render(messages, tokenize=False, add_generation_prompt=False)
                generated = end = self.render(messages, tokenize=False).removeprefix(before)
            except RloraError:  # tokenizing the prompt raises it again
                return "", ""
        known = len(end) if header is None else next(n for n in range(len(end), -1, -1) if end[:n] in header)
        tag = end.rfind(opens)
        if tag >= 0 and closes not in end[tag:] and (header is not None or end.rstrip().endswith(opens)):
            known = min(known, tag)
        own = re.sub(rf"^\s*({re.escape(opens)})?\s*{re.escape(closes)}\s*", "", end[known:])
        return self._after_special(own), generated

    @cached_property
    def _frame(self) -> tuple[str | None, str, bool]:
        """What stands before a message of the policy, if it is shown; what follows the last message; and whether that
        is a generation prompt, which stands there only where it is asked for."""
        try:
            parts = self.render([_USER, _POLICY, _USER], tokenize=False).split(MARK)
        except RloraError:
            parts = []
        try:
            end = parts[-1] if len(parts) == 4 else self.render([_USER], tokenize=False).rpartition(MARK)[2]
            unasked = self.render([_USER], tokenize=False, add_generation_prompt=False).rpartition(MARK)[2]
        except RloraError:
            end = unasked = ""
        return parts[1] if len(parts) == 4 else None, end, end != unasked

    def _after_special(self, text: str) -> str:
        """What of a text follows the last special token that is no tag of thinking: those before belong to a header."""
        others = [special for special in self.special.values() if special not in self.settings.think]
        found = re.finditer("|".join(map(re.escape, (*self.settings.think, *others))), text)
        return text[max((match.end() for match in found if match[0] in others), default=0) :]

    @property
    def _name(self) -> str:
        return (
            f"chat.template = {self.settings.template!r:.200}" if self.settings.template else "model: its chat template"
        )

    @property
    def _system(self) -> dict[str, str]:
        return {"role": "system", "content": self.settings.system}

    def check_shown(self, messages: Messages, what: str) -> None:
        """Raise RloraError where the template leaves out one of such messages. Looked at once for the same roles."""
        is_ours = bool(self.settings.system) and messages[0] == self._system
        roles = tuple(str(turn["role"]) for turn in messages)
        if (is_ours, roles) in self._shown_roles:
            return
        marked = [dict(turn) | {"content": f"{MARK}{number}{MARK}"} for number, turn in enumerate(messages)]
        try:
            text = self.render(marked, tokenize=False)
        except RloraError:  # rendering the messages themselves may succeed; if not, that raises the error
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

    def render(self, messages: Messages, **how: Any) -> Any:
        """The messages as the template puts them, up to where the policy's next one begins."""
        try:
            return self._render(messages, self.settings.template_args, how)
        except Exception as error:  # a template is a program
            raise self._refusal(messages, error) from error

    def _render(self, messages: Messages, template_args: Any, how: dict[str, Any]) -> Any:
        settings: dict[str, Any] = {"chat_template": self.source, "add_generation_prompt": True}
        return self.tokenizer.apply_chat_template([dict(turn) for turn in messages], **template_args | settings | how)

    def _refusal(self, messages: Messages, error: Exception) -> RloraError:
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

    def _renders(self, messages: Messages, template_args: Any) -> bool:
        try:
            self._render(messages, template_args, {"tokenize": False})
        except Exception:  # as above
            return False
        return True


def _source(tokenizer: PreTrainedTokenizerBase, asked: str) -> str | None:
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
