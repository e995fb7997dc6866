"""Text to tokens and back, with the chat template and the `[chat]` settings. Only this module tokenises prompts."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlora.model.answers import QUESTION, Answers
from rlora.model.template import MARK, Template
from rlora.model.tool_calls import ToolCall, calling
from rlora.records import Messages, RloraError, Tools
from rlora.settings import ChatConfig

THINK = ("<think>", "</think>")  # reward functions see these in place of the model's tags


class Chat:
    """Tokenises prompts and replies for the policy, and decodes the policy's messages.

    Raises RloraError if `settings.template` can't be read. `stop_token_ids` are the tokens that end a completion.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: ChatConfig, stop_token_ids: tuple[int, ...]
    ) -> None:
        self.tokenizer, self.settings, self.stop_token_ids = tokenizer, settings, stop_token_ids
        self._template = Template(tokenizer, settings)
        self.template, self._special = self._template.source, self._template.special
        ends = {text: token for token in reversed(stop_token_ids) if (text := self.decode([token]))}
        self.answers = Answers(self._template, stop_token_ids, ends)

    def prompt_ids(self, text: str | Messages, tools: Tools = ()) -> tuple[int, ...]:
        """Return the tokens of a prompt. A string becomes one user message if there is a chat template, else bare text.

        The template gets the schemas of `tools`. Raises RloraError if the chat template is missing, rejects the
        messages, or does not render all of them and the tools.
        """
        if not self.template:
            if not isinstance(text, str) or self.settings.system or tools:
                raise RloraError(
                    "model: its tokenizer has no chat template, but the env has tools, or its prompts or chat.system "
                    "are chat messages; use an instruct model, set chat.template, or unset chat.system and use an env "
                    "whose prompts are strings"
                )
            return self._bare_ids(text) + self._ids(self._opening(text)[1])
        messages = self._template.messages(text)
        self._template.check_shown(messages, "all messages of a prompt")
        if tools:
            self._template.check_tools(messages, tools)
        ids = self._template.render(messages, tokenize=True, return_dict=False, tools=list(tools) or None)
        return tuple(ids) + self._ids(self._opening(messages)[1])

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a whole text, without the chat template, and the model's end token.
        Raises RloraError if the model has none."""
        return (*self._bare_ids(text), self.answers.model_end)

    def _bare_ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a bare text after the special tokens that the tokenizer puts before a text (once).
        Special tokens after the text are removed, because the policy continues the text."""
        ids, full = self._ids(text), tuple(self.tokenizer.encode(text))
        start = next((i for i in range(len(full) - len(ids) + 1) if full[i : i + len(ids)] == ids), None)
        if start is None or not ids:
            while full and full[-1] in self.stop_token_ids:
                full = full[:-1]
            return full
        return ids if ids[:start] == full[:start] else full[:start] + ids

    def reply_ids(self, reply: str | Messages, completion_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens of an env's reply, to be appended to a completion.

        A string continues the policy's message. Chat messages are rendered by the template as after a message of the
        policy, up to the start of the policy's next message. The end token of the policy's message appears once,
        whether the policy or the template wrote the token. Raises RloraError if the template does not render the reply.
        """
        if isinstance(reply, str):
            return self._ids(reply)
        if not self.template:
            raise RloraError(
                "env: reply() returned chat messages, but the tokenizer of the model has no chat template; make "
                "reply() return a string, use an instruct model, or set chat.template"
            )
        messages = self.conversation(reply)
        self._template.check_shown(messages, "an env's reply after the policy's message")
        text = self._template.render(messages, tokenize=False).partition(MARK)[2]
        text = self.answers.rest(text, is_call="tool_calls" in messages[-len(reply) - 1])
        ids = self._ids(text + self._opening(messages)[1])
        has_end = ids and completion_ids and completion_ids[-1] in self.stop_token_ids and completion_ids[-1] == ids[0]
        return ids[1:] if has_end else ids

    def completion_ids(
        self, completion: str | Messages, prompt: str | Messages
    ) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Return the tokens of a given completion, as if the policy had sampled it, and which of them are the policy's.

        A string is one message of the policy. Chat messages may include those of others, whose tokens have False. Each
        message of the policy ends with the token that ends it in the chat template; without a template, with the
        model's end token. The tokens of a message with the `weight` 0 have False too. A tool's result without a name
        gets that of the call that it answers. Raises RloraError if the messages do not alternate from the policy's to
        the policy's, or if one of the policy's is empty.
        """
        messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        if role := next((turn["role"] for turn in (messages[0], messages[-1]) if turn["role"] != "assistant"), ""):
            raise RloraError(
                f"the completion begins or ends with a message of {role}; it must begin and end with the assistant's, "
                "so move earlier messages into the prompt, and drop later ones"
            )
        ids: list[int] = []
        mask: list[bool] = []
        calls: Sequence[Mapping[str, Any]] = ()
        replies: list[Mapping[str, Any]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                replies.append(message)
                continue
            if bool(number) != bool(replies):
                raise RloraError(
                    f"message {number + 1} of the completion: two messages of the assistant in a row; join them, or "
                    "drop the row"
                )
            if replies:
                replies = _with_names(replies, calls)
                reply = self.reply_ids(replies, ids)
                ids, mask = [*ids, *reply], [*mask, *[False] * len(reply)]
                prompt, replies = self.conversation(replies), []
            text, end = self.answers.text_and_end(message)
            generated = self._template.opening(prompt)[1] if self.template else ""
            text = self.answers.after_opening(text, "".join(self._opening(prompt)), generated)
            own = (*self._ids(text), end)
            ids, mask = [*ids, *own], [*mask, *[message.get("weight") != 0] * len(own)]
            calls = message.get("tool_calls") or ()
        return tuple(ids), tuple(mask)

    def conversation(self, reply: Messages) -> Messages:
        """Return a conversation for the template in which an env's reply follows a message of the policy. Results of
        tools follow a message with a call, if the template renders calls."""
        message: Mapping[str, Any] = {"role": "assistant", "content": MARK}
        if reply[0]["role"] == "tool":
            call = ToolCall(reply[0].get("name") or "tool", {"value": MARK})
            message = calling(call) if self._template.shows_calls else message
        return self._template.messages([QUESTION, message, *reply])

    def call_text(self, call: ToolCall, tools: Tools) -> str:
        """Return a message with one tool call, as `text` decodes it.

        Raises RloraError if the template does not render the `tools`, the call, or the result of a tool.
        """
        if not self.template:
            raise RloraError(
                "env: it has tools, but the tokenizer of the model has no chat template; set chat.template"
            )
        self._template.check_tools([QUESTION], tools)
        self.reply_ids([{"role": "tool", "name": call.name, "content": "?"}], ())
        return self._without_special(self._ids(self.answers.text_and_end(calling(call))[0]))

    def check_replies(self) -> None:
        """Raise RloraError if the template does not render an env's reply after a message of the policy."""
        self.reply_ids([QUESTION], ())

    def text(self, ids: Sequence[int], with_opening: bool = True, prompt: str | Messages = "") -> str:
        """Decode a message of the policy, without special tokens except thinking tags (returned as `THINK`).

        With `with_opening`, the text starts with the part of the message that the prompt already contains: text from
        the template, `chat.prefill`, or the thinking tag at the end of a bare prompt. That part depends on `prompt`,
        the prompt or conversation before the message.
        """
        text = ("".join(self._opening(prompt)) if with_opening else "") + self._without_special(ids)
        for tag, usual in zip(self.settings.think, THINK, strict=True):
            text = text.replace(tag, usual)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens with special tokens, as the policy reads them."""
        return str(self.tokenizer.decode(list(ids)))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _without_special(self, ids: Sequence[int]) -> str:
        if not self._special_tags:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        ids = tuple(ids)
        in_tags = {
            i
            for tag in self._special_tags
            for start in range(len(ids) - len(tag) + 1)
            if ids[start : start + len(tag)] == tag
            for i in range(start, start + len(tag))
        }
        return str(self.tokenizer.decode([t for i, t in enumerate(ids) if i in in_tags or t not in self._special]))

    @cached_property
    def _special_tags(self) -> list[tuple[int, ...]]:
        """Thinking tags that contain special tokens."""
        tags = [self._ids(tag) for tag in self.settings.think] if self._special else []
        return [tag for tag in tags if any(token in self._special for token in tag)]

    # --- how the policy's message begins ---

    def _opening(self, prompt: str | Messages) -> tuple[str, str]:
        """Return the text with which the template or a bare prompt opens the policy's message, and the rest of
        `chat.prefill`. Raises RloraError if both texts contain a thinking tag.
        """
        opens, closes = self.settings.think
        if not self.template:
            is_open = isinstance(prompt, str) and prompt.rstrip().endswith(opens)
            opened = str(prompt)[str(prompt).rindex(opens) :] if is_open else ""
            return opened, self._remaining_prefill(opened)
        opened, generated = self._template.opening(prompt)
        prefill = self._remaining_prefill(opened)
        if opens in prefill and (opens in opened + generated or closes in generated):
            raise RloraError(
                f"chat.prefill = {self.settings.prefill!r}: the chat template already ends a prompt with {opens} or "
                f"{closes}, in {generated or opened!r}; unset chat.prefill, or change chat.template_args"
            )
        return opened, prefill

    def _remaining_prefill(self, opened: str) -> str:
        """Return `chat.prefill` without the part that `opened` already contains."""
        prefill, present = self.settings.prefill, opened.strip()
        if not present or not prefill.lstrip().startswith(present):
            return prefill
        rest = prefill.lstrip().removeprefix(present)
        space = opened[len(opened.rstrip()) :]
        return rest[next(n for n in range(len(space), -1, -1) if rest.startswith(space[:n])) :]


def _with_names(replies: Sequence[Mapping[str, Any]], calls: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return messages in which each result of a tool has the name of the call that it answers, by ID or in order."""
    waiting, named = list(calls), list[Mapping[str, Any]]()
    for reply in replies:
        if reply["role"] != "tool" or not waiting:
            named.append(reply)
            continue
        matches = (n for n, call in enumerate(waiting) if call.get("id") and call["id"] == reply.get("tool_call_id"))
        named.append({"name": waiting.pop(next(matches, 0))["function"]["name"], **reply})
    return named
