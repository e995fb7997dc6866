"""Chat templates: selection, rendering, and the text with which they open the policy's messages."""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from rlora.model.tool_calls import ToolCall, calling
from rlora.records import Messages, RloraError, Tools
from rlora.settings import ChatConfig

MARK = "\N{SYMBOL FOR RECORD SEPARATOR}"  # placeholder message, to find the text that a template puts around it
_USER, _POLICY = {"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}
TEMPLATES = {"hermes": Path(__file__).with_name("hermes.jinja")}  # for `chat.template`, in addition to the tokenizer's
_FIX = "fix the template, or set a different chat.template"
_CACHED = 256


class Template:
    """The chat template of the tokenizer or of `chat.template`. Raises RloraError if the template can't be read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatConfig) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.source = _source(tokenizer, settings.template)  # None: no template
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {token: str(text) for token, text in added.items() if text.special}
        self._shown_roles: set[tuple[bool, tuple[str, ...]]] = set()  # cache of check_shown: has chat.system, roles
        self._shown_tools: set[tuple[tuple[str, ...], str]] = set()  # cache of check_tools
        self._openings: dict[str, tuple[str, str]] = {}  # cache of opening, by messages

    def messages(self, text: str | Messages) -> list[Mapping[str, Any]]:
        """Return the messages of a prompt, after `chat.system` if none of them is a system message."""
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else _with_ids(text)
        if self.settings.system and all(turn["role"] != "system" for turn in messages):
            messages.insert(0, self._system)
        return list(messages)

    def opening(self, prompt: str | Messages) -> tuple[str, str]:
        """Return two parts of the rendered prompt: the text at the end that belongs to the policy's message, and the
        whole generation prompt, which is "" if the template does not depend on `add_generation_prompt`.

        The message begins after the header, the text that also precedes the policy's messages inside a conversation, up
        to a thinking tag. An empty thinking block, which the template closes at once, is removed.
        """
        messages = self.messages(prompt)
        if repr(messages) not in self._openings:
            if len(self._openings) >= _CACHED:
                self._openings.clear()
            self._openings[repr(messages)] = self._opening(messages)
        return self._openings[repr(messages)]

    def _opening(self, messages: Messages) -> tuple[str, str]:
        opens, closes = self.settings.think
        header, end, is_optional = self._frame
        generated = ""
        if is_optional:
            try:
                history = self.render(messages, tokenize=False, add_generation_prompt=False)
                generated = end = self.render(messages, tokenize=False).removeprefix(history)
            except RloraError:  # tokenizing the prompt raises it again
                return "", ""
        start = len(end) if header is None else next(n for n in range(len(end), -1, -1) if end[:n] in header)
        tag = end.rfind(opens)
        if tag >= 0 and closes not in end[tag:] and (header is not None or end.rstrip().endswith(opens)):
            start = min(start, tag)
        opened = re.sub(rf"^\s*({re.escape(opens)})?\s*{re.escape(closes)}\s*", "", end[start:])
        return self._after_special(opened), generated

    @cached_property
    def _frame(self) -> tuple[str | None, str, bool]:
        """Text before a message of the policy, None if the template does not render such messages; text after the last
        message; and whether the latter text depends on `add_generation_prompt`."""
        try:
            parts = self.render([_USER, _POLICY, _USER], tokenize=False).split(MARK)
        except RloraError:
            parts = []
        try:
            end = parts[-1] if len(parts) == 4 else self.render([_USER], tokenize=False).rpartition(MARK)[2]
            bare_end = self.render([_USER], tokenize=False, add_generation_prompt=False).rpartition(MARK)[2]
        except RloraError:
            end = bare_end = ""
        return parts[1] if len(parts) == 4 else None, end, end != bare_end

    def _after_special(self, text: str) -> str:
        """Return the text after the last special token that is not a thinking tag. Earlier text belongs to a header."""
        specials = [special for special in self.special.values() if special not in self.settings.think]
        matches = re.finditer("|".join(map(re.escape, (*self.settings.think, *specials))), text)
        return text[max((match.end() for match in matches if match[0] in specials), default=0) :]

    @property
    def _name(self) -> str:
        return (
            f"chat.template = {self.settings.template!r:.200}" if self.settings.template else "model: its chat template"
        )

    @property
    def _system(self) -> dict[str, str]:
        return {"role": "system", "content": self.settings.system}

    def check_shown(self, messages: Messages, description: str) -> None:
        """Raise RloraError if the template does not render a message. Each sequence of roles is checked once.

        `description` describes the messages in the error.
        """
        has_system = bool(self.settings.system) and messages[0] == self._system
        roles = tuple(map(_kind, messages))
        if (has_system, roles) in self._shown_roles:
            return
        marked, marks = zip(*(_marked(turn, f"{MARK}{number}") for number, turn in enumerate(messages)), strict=True)
        try:
            text = self.render(marked, tokenize=False)
        except RloraError:  # the messages themselves may render; if not, rendering them raises the error
            return
        left_out = [number for number, parts in enumerate(marks) if not all(part in text for part in parts)]
        if 0 in left_out and has_system:
            raise RloraError(
                f"chat.system = {self.settings.system!r}: the chat template does not render system messages, so the "
                "policy would not read this text; unset chat.system and put the text into the env's prompts, or set a "
                "chat.template that renders system messages"
            )
        if left_out:
            number = left_out[-1]
            raise RloraError(
                f"{self._name}: the template does not render {description}: of the roles {', '.join(roles)}, "
                f"message {number + 1} ({roles[number]}) is missing; {_FIX}, or let the env return other messages"
            )
        self._shown_roles.add((has_system, roles))

    def check_tools(self, messages: Messages, tools: Tools) -> None:
        """Raise RloraError if the template does not render the tools with the messages of a prompt. Tools are checked
        once for each sequence of roles."""
        checked = (tuple(map(_kind, messages)), repr(tools))
        if checked in self._shown_tools:
            return
        marks = [f"{MARK}{number}{MARK}" for number in range(len(tools))]
        marked = [
            {**tool, "function": {**tool["function"], "name": mark}} for tool, mark in zip(tools, marks, strict=True)
        ]
        text = self.render(messages, tokenize=False, tools=marked)
        if hidden := [tool["function"]["name"] for tool, mark in zip(tools, marks, strict=True) if mark not in text]:
            raise RloraError(
                f"{self._name}: the template does not render tools ({', '.join(hidden)}), so the policy would not know "
                f"them; set chat.template to one that does, such as {', '.join(TEMPLATES)}, or use an instruct model "
                "that was trained to call tools"
            )
        self._shown_tools.add(checked)

    @cached_property
    def shows_calls(self) -> bool:
        """Whether the template renders the `tool_calls` of the policy's messages."""
        try:
            message = calling(ToolCall("f", {"a": MARK}))
            return MARK in self.render([_USER | {"content": "?"}, message], tokenize=False)
        except RloraError:
            return False

    def render(self, messages: Messages, **options: Any) -> Any:
        """Render messages, up to the start of the policy's next message. `options` are those of `apply_chat_template`,
        and decide whether the result is text or token IDs."""
        try:
            return self._render(messages, self.settings.template_args, options)
        except Exception as error:  # a template is a program
            raise self._explain(messages, error) from error

    def _render(self, messages: Messages, template_args: Any, options: dict[str, Any]) -> Any:
        defaults: dict[str, Any] = {"chat_template": self.source, "add_generation_prompt": True}
        arguments = template_args | defaults | options
        return self.tokenizer.apply_chat_template([dict(turn) for turn in messages], **arguments)

    def _explain(self, messages: Messages, error: Exception) -> RloraError:
        """Return the error for a template that fails. The error names the field that can be unset, if there is such a
        field."""
        if isinstance(error, TemplateSyntaxError):
            return RloraError(f"{self._name}: line {error.lineno} is not valid Jinja ({error}); {_FIX}")
        if self.settings.template_args and self._renders(messages, {}):
            return RloraError(
                f"chat.template_args = {self.settings.template_args!r}: the chat template fails with these arguments "
                f"({error}); set arguments that the template accepts, or unset chat.template_args"
            )
        rest = [turn for turn in messages if turn != self._system]
        if self.settings.system and len(rest) < len(messages) and self._renders(rest, self.settings.template_args):
            return RloraError(
                f"chat.system = {self.settings.system!r}: the chat template rejects system messages ({error}); "
                "unset chat.system and put the text into the env's prompts, or set a chat.template that accepts system "
                "messages"
            )
        return RloraError(
            f"env: the model's chat template rejects {messages!r:.1000} ({error}); let the env return messages that "
            "the template accepts" + (", or fix chat.template" if self.settings.template else "")
        )

    def _renders(self, messages: Messages, template_args: Any) -> bool:
        try:
            self._render(messages, template_args, {"tokenize": False})
        except Exception:  # as in render
            return False
        return True


def _kind(message: Mapping[str, Any]) -> str:
    """Return the role of a message, and what it has besides content. A template can render each kind differently."""
    calls = len(message.get("tool_calls") or ())
    content = " and content" if message["content"] else ""
    return f"{message['role']} with {calls} tool_calls{content}" if calls else str(message["role"])


def _marked(message: Mapping[str, Any], mark: str) -> tuple[dict[str, Any], list[str]]:
    """Return a message with marks in place of its content and of the names of its calls, and the marks."""
    calls = message.get("tool_calls") or []
    names = [f"{mark}.{number}{MARK}" for number in range(len(calls))]
    marked = dict(message)
    if calls:
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": name}} for call, name in zip(calls, names, strict=True)
        ]
    if message["content"] or not calls:
        marked["content"] = f"{mark}{MARK}"
        names.append(f"{mark}{MARK}")
    return marked, names


def _with_ids(messages: Messages) -> list[dict[str, Any]]:
    """Return messages whose calls and results have ids of 9 letters and digits, which Mistral's templates need, and
    whose calls have their arguments as objects."""
    made, ids = [], iter(f"call{number:05d}" for number in range(100_000))
    waiting: list[str] = []  # ids of calls without a result
    for message in map(dict, messages):
        if message.get("tool_calls"):
            calls = [
                {"id": next(ids), **call, "function": _as_object(call["function"])} for call in message["tool_calls"]
            ]
            message["tool_calls"], waiting = calls, [call["id"] for call in calls]
        elif message["role"] == "tool":
            first = waiting.pop(0) if waiting else next(ids)
            message.setdefault("tool_call_id", first)
        made.append(message)
    return made


def _as_object(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    try:
        return {**function, "arguments": json.loads(arguments)} if isinstance(arguments, str) else dict(function)
    except ValueError as error:
        raise RloraError(
            f"env: the tool call {function.get('name')!r} has the arguments {arguments!r:.200}, which are not valid "
            f"JSON ({error}); use an object"
        ) from None


def _source(tokenizer: PreTrainedTokenizerBase, setting: str) -> str | None:
    """Return the Jinja source for `chat.template`: source, the name of one of the tokenizer's templates, or a file. ""
    is the tokenizer's own template. None if the tokenizer has no template."""
    template: Any = tokenizer.chat_template
    named = template if isinstance(template, dict) else {}
    several = f"its tokenizer has several chat templates ({', '.join(named)})"
    if not setting:
        if named and "default" not in named:
            raise RloraError(f"model: {several}, and none is the default; set chat.template to one of these names")
        return str(named["default"]) if named else str(template) if template else None
    if setting in named:
        return str(named[setting])
    if setting in TEMPLATES:
        return TEMPLATES[setting].read_text("utf-8")
    if "{" in setting:
        return setting
    try:
        return Path(setting).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RloraError(
            f"chat.template = {setting!r}: can't be read ({reason}); use Jinja source, or a file with Jinja source"
            + (f", or a name: {several}" if named else "")
        ) from None
