"""Text to tokens and back, with the chat template and the `[chat]` settings. Only this module tokenises prompts."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlora.model.template import MARK, Template
from rlora.model.tool_calls import ToolCall, calling
from rlora.records import Messages, RloraError, Tools
from rlora.settings import ChatConfig

_QUESTION = {"role": "user", "content": "?"}
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
            self._template.check_tools(tools)
        ids = self._template.render(messages, tokenize=True, return_dict=False, tools=list(tools) or None)
        return tuple(ids) + self._ids(self._opening(messages)[1])

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a whole text, without the chat template, and the model's end token."""
        return (*self._bare_ids(text), self.stop_token_ids[0])

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
        if "tool_calls" in messages[-len(reply) - 1]:
            text = text.removeprefix(self._up_to_end(text)[0])
        ids = self._ids(text + self._opening(messages)[1])
        has_end = ids and completion_ids and completion_ids[-1] in self.stop_token_ids and completion_ids[-1] == ids[0]
        return ids[1:] if has_end else ids

    def completion_ids(
        self, completion: str | Messages, prompt: str | Messages
    ) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Return the tokens of a given completion, as if the policy had sampled it, and which of them are the policy's.

        A string is one message of the policy. Chat messages may include those of others, whose tokens have False. Each
        message of the policy ends with the token that ends it in the chat template; without a template, with the
        model's end token. The tokens of a message with the `weight` 0 have False too. Raises RloraError if the messages
        do not alternate from the policy's to the policy's.
        """
        messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        ids: list[int] = []
        mask: list[bool] = []
        replies: list[Mapping[str, str]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                replies.append(message)
                continue
            if bool(number) != bool(replies):
                raise RloraError(f"message {number + 1} of the completion: two messages of the assistant in a row")
            if replies:
                reply = self.reply_ids(replies, ids)
                ids, mask = [*ids, *reply], [*mask, *[False] * len(reply)]
                prompt, replies = self.conversation(replies), []
            text, end = self._message_and_end(message)
            own = (*self._ids(self._after_opening(text, prompt)), end)
            ids, mask = [*ids, *own], [*mask, *[message.get("weight") != 0] * len(own)]
        return tuple(ids), tuple(mask)

    @cached_property
    def _end_id(self) -> int:
        """The token that ends a message of the policy without calls. Some templates write it only before the next
        message (GLM), some only after the last one (gpt-oss)."""
        message = {"role": "assistant", "content": MARK}
        for messages in ([_QUESTION, message], [_QUESTION, message, _QUESTION]) if self.template else ():
            rendered = self._template.render(messages, tokenize=False, add_generation_prompt=False)
            if (end := self._first_end(rendered.partition(MARK)[2])) is not None:
                return end[1]
        return self.stop_token_ids[0]

    def conversation(self, reply: Messages) -> Messages:
        """Return a conversation for the template in which an env's reply follows a message of the policy. Results of
        tools follow a message with a call, if the template renders calls."""
        message: Mapping[str, Any] = {"role": "assistant", "content": MARK}
        if reply[0]["role"] == "tool":
            call = ToolCall(reply[0].get("name") or "tool", {"value": MARK})
            message = calling(call) if self._template.shows_calls else message
        return self._template.messages([_QUESTION, message, *reply])

    def message_text(self, message: Mapping[str, Any]) -> str:
        """Return a message as the policy writes it: its tool calls as the template renders them, or its content, after
        its `reasoning_content` and what else the template renders before content.

        The text begins after the header of the policy's message, so it includes a thinking tag with which the template
        opens the message. Raises RloraError if the template does not render the calls, or if the message contains a
        token that ends it.
        """
        return self._message_and_end(message)[0]

    def _message_and_end(self, message: Mapping[str, Any]) -> tuple[str, int]:
        """Return `message_text` and the token that ends the message."""
        content = json.dumps(dict(message), ensure_ascii=False)
        if inside := next((end for end in self._ends if end in content), ""):
            raise RloraError(f"a message of the assistant contains {inside}, which ends a message; fix or drop the row")
        thought = message.get("reasoning_content")
        if not message.get("tool_calls"):
            return self._before_content(thought, message["content"]) + message["content"], self._end_id
        result = {"role": "tool", "name": message["tool_calls"][0]["function"]["name"], "content": "?"}
        messages = self._template.messages([_QUESTION, message, result])  # the last message can have a thinking block
        self._template.check_shown(messages, "a message of the policy with a call")
        text = self._from_header(messages)
        if thought and thought not in text:
            raise RloraError(
                "a message with tool_calls has reasoning_content, which the chat template does not render; set a "
                "chat.template that renders it, or drop reasoning_content"
            )
        return self._up_to_end(text)

    def _before_content(self, thought: str | None, content: str) -> str:
        """Return what the policy writes before the content of a message: the thought, in the form of the template or
        else in thinking tags, and other text that the template renders there."""
        opens, closes = self.settings.think
        if thought and thought.strip() in (prefix := self._rendered_before_content(thought)):
            return prefix
        prefix = self._empty_before_content
        if thought or closes in content:
            prefix = prefix.partition(opens)[0]  # without the empty thought of the template
        return prefix + (f"{opens}\n{thought}\n{closes}\n\n" if thought else "")

    @cached_property
    def _empty_before_content(self) -> str:
        """What the template renders between the header of the policy's message and its content, without a thought."""
        return self._rendered_before_content("")

    def _rendered_before_content(self, thought: str) -> str:
        if not self.template:
            return ""
        thoughts = {"reasoning_content": thought, "thinking": thought} if thought else {}  # the second: gpt-oss
        messages = self._template.messages([_QUESTION, {"role": "assistant", "content": MARK, **thoughts}])
        prefix, found, _ = self._from_header(messages).partition(MARK)
        return prefix if found else ""

    def _from_header(self, messages: Messages) -> str:
        """Return the rendered text of messages after `_QUESTION`, from the header of the policy's message on."""
        text = str(self._template.render(messages, tokenize=False, add_generation_prompt=False))
        prompt, *headers = self._question_prompt
        if header := next(filter(text.startswith, headers), ""):
            return text.removeprefix(header)
        return text[next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt)) :]

    @cached_property
    def _question_prompt(self) -> tuple[str, str, str]:
        """The prompt of `_QUESTION`, without the text that opens the policy's message, and up to an opened thought."""
        question = self._template.messages([_QUESTION])
        prompt = str(self._template.render(question, tokenize=False))
        opened, generated = self._template.opening(question)
        until_thought = prompt.removesuffix(generated) + generated.partition(self.settings.think[0])[0]
        return prompt, prompt.removesuffix(opened), until_thought

    def _after_opening(self, text: str, prompt: str | Messages) -> str:
        """Return a message of the policy, as `message_text` returns it, without the text that the prompt already
        contains. A thought that the prompt opens is closed if the message has none. Raises RloraError if the message
        has a thought, and the template has closed it in the prompt."""
        opened, (opens, closes) = "".join(self._opening(prompt)), self.settings.think
        ends_thought = self.template and closes in self._template.opening(prompt)[1]
        if ends_thought and text.startswith(opens) and text.removeprefix(opens).partition(closes)[0].strip():
            raise RloraError(
                f"a message of the assistant has a thought, but the chat template ends a prompt with {closes}; set "
                "chat.template_args so that the model thinks, or drop the thoughts"
            )
        if text.startswith(opened) or not self.template or opens not in opened or closes in opened:
            return text.removeprefix(opened)
        return text.removeprefix(opens) if closes in text else f"\n{closes}\n\n{text}"

    def call_text(self, call: ToolCall, tools: Tools) -> str:
        """Return a message with one tool call, as `text` decodes it.

        Raises RloraError if the template does not render the `tools`, the call, or the result of a tool.
        """
        if not self.template:
            raise RloraError(
                "env: it has tools, but the tokenizer of the model has no chat template; set chat.template"
            )
        self._template.check_tools(tools)
        self.reply_ids([{"role": "tool", "name": call.name, "content": "?"}], ())
        return self._without_special(self._ids(self.message_text(calling(call))))

    def _up_to_end(self, text: str) -> tuple[str, int]:
        """Return a rendered text up to the first token that ends a message of the policy, and this token. Raises
        RloraError if there is none."""
        if (end := self._first_end(text)) is None:
            raise RloraError(
                f"model: its chat template writes none of the model's end tokens after a tool call, in {text!r:.200}; "
                "set chat.template to one that fits the model, or chat.stop_token_ids"
            )
        return text[: end[0]], end[1]

    def _first_end(self, text: str) -> tuple[int, int] | None:
        """Return the position of the first end token in a rendered text, and the token; None if there is none."""
        ends = [(text.find(end), token) for end, token in self._ends.items()]
        return min((end for end in ends if end[0] >= 0), default=None)

    @cached_property
    def _ends(self) -> dict[str, int]:
        """The end tokens by their text, without those that have none."""
        return {text: token for token in reversed(self.stop_token_ids) if (text := self.decode([token]))}

    def check_replies(self) -> None:
        """Raise RloraError if the template does not render an env's reply after a message of the policy."""
        self.reply_ids([_QUESTION], ())

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
