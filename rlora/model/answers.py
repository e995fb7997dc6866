"""Given messages of the policy, as the policy writes them under a chat template."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from rlora.model.template import MARK, Template
from rlora.records import Messages, RloraError

QUESTION = {"role": "user", "content": "?"}
_MARKED = {"role": "assistant", "content": MARK}


class Answers:
    """Renders each message as the chat template renders the last message of a conversation. Without a template, a
    message is its content.

    `stop_token_ids` are the model's end tokens, and `ends` those of them that have a text, by the text. If the template
    writes none of them after a message, the first one ends it.
    """

    def __init__(self, template: Template, stop_token_ids: Sequence[int], ends: Mapping[str, int]) -> None:
        self.template, self.stop_token_ids, self.ends = template, stop_token_ids, ends
        self._think = template.settings.think
        self._spaces: dict[tuple[str, str], tuple[str, str]] = {}  # cache of _kept_space

    def text_and_end(self, message: Mapping[str, Any]) -> tuple[str, int]:
        """Return a message as the policy writes it, and its end token: its tool calls as the template renders them, or
        its content, after its `reasoning_content` and what else the template renders before content.

        The text begins after the header of the policy's message, so it includes a thinking tag with which the template
        opens the message. Raises RloraError if the template does not render a part of the message, or if the message is
        empty (unless its `weight` is 0), contains a token that ends it, or opens a thought without closing it.
        """
        parts = [message.get(name) for name in ("content", "reasoning_content", "tool_calls")]
        written = json.dumps(parts, ensure_ascii=False)
        if inside := next((end for end in self.ends if end in written), ""):
            raise RloraError(f"a message of the assistant contains {inside}, which ends a message; fix or drop the row")
        if message.get("tool_calls"):
            return self._with_calls(message)
        thought, content = message.get("reasoning_content"), message["content"]
        if not (content.strip() or thought or message.get("weight") == 0):
            raise RloraError("a message of the assistant is empty, so there is no answer; fix or drop the row")
        content, (suffix, end) = self._as_rendered(content), self._given_end
        return self._before_content(thought, content) + content + suffix, end

    def _with_calls(self, message: Mapping[str, Any]) -> tuple[str, int]:
        result = {"role": "tool", "name": message["tool_calls"][0]["function"]["name"], "content": "?"}
        messages = self.template.messages([QUESTION, message, result])  # the last message can have a thinking block
        self.template.check_shown(messages, "a message of the policy with a call")
        text, end = self._up_to_end(self._from_header(message, result))
        for name in ("reasoning_content", "content"):
            if (part := message.get(name)) and part.strip() not in text:
                raise RloraError(
                    f"a message with tool_calls has {name}, which the chat template does not render in the message; "
                    f"set a chat.template that renders it, or drop {name}"
                )
        return text, end

    def after_opening(self, text: str, opened: str, generated: str) -> str:
        """Return a message's text without what the prompt already contains of it, `opened`. A thought that the prompt
        opens is closed if the message has none. Raises RloraError if the message has a thought, and the template has
        closed it in the prompt, `generated`."""
        opens, closes = self._think
        if closes in generated and text.startswith(opens) and text.removeprefix(opens).partition(closes)[0].strip():
            raise RloraError(
                f"a message of the assistant has a thought, but the chat template ends a prompt with {closes}; set "
                "chat.template_args so that the model thinks, or drop the thoughts"
            )
        if text.startswith(opened) or not self.template.source or opens not in opened or closes in opened:
            return text.removeprefix(opened)
        return text.removeprefix(opens) if closes in text else f"\n{closes}\n\n{text}"

    def rest(self, text: str, is_call: bool) -> str:
        """Return what follows a message of the policy in a rendered conversation, from its end token on. `text` begins
        after its content, or, if `is_call`, inside its call."""
        if is_call:
            return text.removeprefix(self._up_to_end(text)[0])
        return text.removeprefix(self._end[0]) if self.stop_token_ids else text

    @property
    def model_end(self) -> int:
        """The first of the model's end tokens. Raises RloraError if the model has none."""
        if not self.stop_token_ids:
            raise RloraError(
                "model: neither its configuration nor its tokenizer names an end token, so a given completion has no "
                "end; set chat.stop_token_ids"
            )
        return self.stop_token_ids[0]

    @cached_property
    def _end(self) -> tuple[str, int]:
        """What ends a message of the policy without calls: text after its content, often "", and the end token. Some
        templates write the token only before the next message (GLM), some only after the last one (gpt-oss)."""
        for messages in ((_MARKED,), (_MARKED, QUESTION)) if self.template.source else ():
            with suppress(RloraError):  # a template can reject one of the conversations
                ending = self._rendered(*messages).partition(MARK)[2]
                if (end := self._first_end(ending)) is not None:
                    return ending[: end[0]], end[1]
        return "", self.model_end

    @cached_property
    def _given_end(self) -> tuple[str, int]:
        """`_end`. Raises RloraError if the template ends a message with a special token that is no end token."""
        ending = self._marked[2] if self.template.source else ""
        special = next(((text, token) for token, text in self.template.special.items() if text in ending), None)
        if special and self._first_end(ending) is None:
            raise RloraError(
                f"model: its chat template ends a message with {special[0]}, which is not an end token of the model "
                f"({', '.join(self.ends) or 'it has none'}); set chat.stop_token_ids = [{special[1]}]"
            )
        return self._end

    def _up_to_end(self, text: str) -> tuple[str, int]:
        """Return a rendered text with a call up to the first end token, and this token. Raises RloraError if there is
        none."""
        if (end := self._first_end(text)) is None:
            raise RloraError(
                f"model: its chat template writes none of the model's end tokens after a tool call, in {text!r:.200}; "
                "set chat.template to one that fits the model, or chat.stop_token_ids"
            )
        return text[: end[0]], end[1]

    def _first_end(self, text: str) -> tuple[int, int] | None:
        """Return the position of the first end token in a rendered text, and the token; None if there is none."""
        found = [(text.find(end), token) for end, token in self.ends.items()]
        return min((end for end in found if end[0] >= 0), default=None)

    # --- the content ---

    def _as_rendered(self, content: str) -> str:
        """Return the content of a message with the whitespace around it that the template keeps, and without an empty
        thought. Raises RloraError if a thought has no end."""
        opens, closes = self._think
        text, trailing = content.strip(), content[len(content.rstrip()) :]
        leading = content[: len(content) - len(text) - len(trailing)]
        if text.startswith(opens):
            thought, closing, answer = text.removeprefix(opens).partition(closes)
            if not closing:
                raise RloraError(f"a message of the assistant has {opens} without {closes}; fix or drop the row")
            leading, text = "", text if thought.strip() else answer.lstrip()
        if self.template.source and leading + trailing:
            if (leading, trailing) not in self._spaces:
                self._spaces[leading, trailing] = self._kept_space(leading, trailing)
            leading, trailing = self._spaces[leading, trailing]
        return leading + text + trailing

    def _kept_space(self, leading: str, trailing: str) -> tuple[str, str]:
        """Return the whitespace around the content of a message that the template keeps."""
        spaced = self._rendered(_MARKED | {"content": leading + MARK + trailing}).partition(MARK)
        start, _, end = (max(0, len(a) - len(b)) for a, b in zip(spaced, self._marked, strict=True))
        return leading[max(0, len(leading) - start) :], trailing[:end]

    @cached_property
    def _marked(self) -> tuple[str, str, str]:
        """A rendered message of the policy: the text before the content, the content, and the text after it."""
        return self._rendered(_MARKED).partition(MARK)

    def _before_content(self, thought: str | None, content: str) -> str:
        """Return what the policy writes before the content of a message: the thought, in the form of the template or
        else in thinking tags, and other text that the template renders there."""
        opens, closes = self._think
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
        if not self.template.source:
            return ""
        thoughts = {"reasoning_content": thought, "thinking": thought} if thought else {}  # the second: gpt-oss
        prefix, found, _ = self._from_header(_MARKED | thoughts).partition(MARK)
        return prefix if found else ""

    def _from_header(self, *messages: Mapping[str, Any]) -> str:
        """Return the rendered text of messages after `QUESTION`, from the header of the policy's message on."""
        text = self._rendered(*messages)
        prompt, *headers = self._question_prompt
        if header := next(filter(text.startswith, headers), ""):
            return text.removeprefix(header)
        return text[next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt)) :]

    @cached_property
    def _question_prompt(self) -> tuple[str, str, str]:
        """The prompt of `QUESTION`, without the text that opens the policy's message, and up to an opened thought."""
        question: Messages = self.template.messages([QUESTION])
        prompt = str(self.template.render(question, tokenize=False))
        opened, generated = self.template.opening(question)
        until_thought = prompt.removesuffix(generated) + generated.partition(self._think[0])[0]
        return prompt, prompt.removesuffix(opened), until_thought

    def _rendered(self, *messages: Mapping[str, Any]) -> str:
        """Return the rendered text of messages after `QUESTION`."""
        conversation = self.template.messages([QUESTION, *messages])
        return str(self.template.render(conversation, tokenize=False, add_generation_prompt=False))
