"""An env over a data set of given completions, in the column forms of TRL, for SFT and preference learning."""

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from rlora.records import Messages, Prompt, RloraError, Tools

from .chats import as_conversation, as_text, without_nulls
from .files import Row
from .rows import is_null
from .table import Table, cell

_TELLING = ("chosen", "rejected", "completion", "messages", "conversations", "conversation", "text")
_FORMS = "messages; prompt and completion; prompt, chosen and rejected; chosen and rejected; or text"
_UNREAD = {  # columns that change what an example means
    "system": "put its text in front of the messages, as a message of the role system",
    "functions": "name it tools, with JSON schemas",
    "chat_template_kwargs": "set chat.template_args",
    **dict.fromkeys(("images", "image", "audio", "audios", "videos"), "only text is supported, so drop the row"),
}


class Examples(Table):
    """A data set for `algorithm.name` = `sft`, `dpo`, `ipo` and `orpo`. Each row becomes an example.

    `path`, `name`, `split` and the `held_out_` arguments are those of `Table`. The columns select the form: `messages`
    (a conversation whose assistant's messages are learned from), `prompt` and `completion`, `prompt`, `chosen` and
    `rejected`, `chosen` and `rejected`, two conversations that begin alike, or `text`, which has no prompt. Text and
    chat messages are both supported. `prompt` and `completion` name the columns of the second form. `weight` is a
    column with the weight of each example in the loss of SFT, "" for none. A column `tools` has the JSON schemas of the
    tools that the prompt offers, as a list or as JSON.
    """

    def __init__(
        self, path: str, name: str | None = None, split: str = "train", held_out_split: str = "",
        held_out_path: str = "", held_out_share: float = 0.0, seed: int = 0, prompt: str = "prompt",
        completion: str = "completion", weight: str = "",
    ) -> None:  # fmt: skip
        super().__init__(path, name, split, held_out_split, held_out_path, held_out_share, seed, prompt, answer="")
        self._completion, self._weight = completion, weight

    def _to_prompt(self, row: Row, source: str) -> Prompt:
        named = {"prompt": self._prompt, "completion": self._completion}
        renamed = {name: cell(row, column, source) for name, column in named.items() if column != name}
        if unread := next((name for name in _UNREAD if not is_null(row.get(name)) and row[name]), ""):
            raise RloraError(f"{source}: column {unread!r} is not read; {_UNREAD[unread]}, or drop the column")
        prompt, completions = _parts(dict(row) | renamed, "completion" if "completion" in renamed else "", source)
        weight, tools = self._weight_of(row, source), _tools(row.get("tools"), source)
        return Prompt(prompt, completions=completions, weight=weight, source=source, tools=tools)

    def _weight_of(self, row: Row, source: str) -> float:
        value = cell(row, self._weight, source) if self._weight else 1.0
        with suppress(ValueError):
            value = float(value) if isinstance(value, str) else value  # as in CSV files
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise RloraError(f"{source}: column {self._weight!r} is {value!r}; use a number of 0 or more")
        return float(value)


def _tools(value: Any, source: str) -> Tools:
    """Return the tools of a row. Raises RloraError, which begins with `source`, if they are not a list."""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RloraError(f"{source}: column 'tools' is not valid JSON ({error}); fix or drop the row") from None
    if tools is not None and not isinstance(tools, Sequence):
        raise RloraError(f"{source}: column 'tools' is {tools!r:.200}; it must be a list of JSON schemas")
    return tuple(tools or () if isinstance(value, str) else map(without_nulls, tools or ()))


def _form(names: Collection[str]) -> str:
    """Return the column that tells the form of an example; "" if there is none."""
    return next((name for name in _TELLING if name in names), "")


def _parts(row: Row, form: str, source: str) -> tuple[str | Messages, tuple[str | Messages, ...]]:
    """Return the prompt of a row and its completions. `form` is the column that tells the form of an example, "" for
    the first that is not null. Raises RloraError, which begins with `source`."""
    form = form or _form([name for name, value in row.items() if not is_null(value)]) or _form(row)

    def conversation(name: str) -> str | Messages:
        return as_conversation(cell(row, name, source), f"{source}: column {name!r}")

    if form in ("chosen", "rejected"):
        sides = [(name, conversation(name)) for name in ("chosen", "rejected")]
        if row.get("prompt"):
            prompt = as_text(row["prompt"], f"{source}: column 'prompt'")
            return _pair(prompt, [_after(side, prompt, name, source) for name, side in sides], source)
        (_, chosen), (_, rejected) = sides
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise RloraError(f"{source}: chosen and rejected are text without a prompt; add a column prompt")
        return _pair(*_shared(chosen, rejected, source), source)
    if form == "completion":
        prompt = as_text(cell(row, "prompt", source), f"{source}: column 'prompt'")
        return prompt, (_after(conversation("completion"), prompt, "completion", source),)
    if form == "text":
        if not is_null(row.get("prompt")):
            raise RloraError(
                f"{source}: it has a prompt and a text, and no completion; set env_args.completion to 'text' if that "
                "is the completion, or drop the column of the prompt to learn from the text alone"
            )
        if not isinstance(text := cell(row, "text", source), str):
            raise RloraError(f"{source}: column 'text' is {text!r:.200}; it must be text")
        return (), (_completion(text, "text", source),)
    if not form:
        raise RloraError(f"{source}: it has the columns {', '.join(row)}; an example needs {_FORMS}")
    messages = conversation(form)
    roles = [] if isinstance(messages, str) else [message["role"] for message in messages]
    first = roles.index("assistant") if "assistant" in roles else 0
    if roles[:1] == ["assistant"] and "user" in roles:
        raise RloraError(
            f"{source}: column {form!r} begins with the assistant's message, which answers nobody; drop this message, "
            "or put one of the user before it"
        )
    if not first:
        raise RloraError(
            f"{source}: column {form!r} has no message of the assistant after one of the user (roles: "
            f"{', '.join(roles) or 'none'}), so there is no completion to learn from; fix or drop the row"
        )
    return messages[:first], (_completion(messages[first:], form, source),)


def _completion(value: Any, name: str, source: str) -> str | Messages:
    """Return the value as a completion. Raises RloraError if it is empty, or does not end with the assistant."""
    if isinstance(value, str):
        if not value.strip():
            raise RloraError(f"{source}: column {name!r} is empty, so there is no completion; fix or drop the row")
        return value
    if not value or value[-1]["role"] != "assistant":
        last = value[-1]["role"] if value else "none"
        raise RloraError(
            f"{source}: column {name!r} ends with a message of {last}, and a completion must end with the "
            "assistant's; drop the last message, or the row"
        )
    return tuple(value)


def _after(side: str | Messages, prompt: str | Messages, name: str, source: str) -> str | Messages:
    """Return the completion of one side, without the messages of the prompt if the side repeats them."""
    if isinstance(side, str):
        return _completion(side, name, source)
    asking = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    rest = side[len(asking) :] if list(side[: len(asking)]) == asking else side
    if rest and rest[0]["role"] != "assistant":
        raise RloraError(
            f"{source}: column {name!r} begins with a different prompt, {rest[0]['content']!r:.80}; an example has "
            "one prompt, so fix or drop the row"
        )
    return _completion(rest, name, source)


def _shared(chosen: Messages, rejected: Messages, source: str) -> tuple[Messages, list[str | Messages]]:
    """Return the prompt that two conversations share, and the rest of each."""
    split = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if split is None or chosen[split]["role"] != "assistant" or rejected[split]["role"] != "assistant" or not split:
        fault = "are the same" if list(chosen) == list(rejected) else "do not share a prompt that ends before an answer"
        raise RloraError(f"{source}: chosen and rejected {fault}; fix or drop the row")
    sides = (("chosen", chosen), ("rejected", rejected))
    return chosen[:split], [_completion(side[split:], name, source) for name, side in sides]


def _pair(
    prompt: str | Messages, sides: Sequence[str | Messages], source: str
) -> tuple[str | Messages, tuple[str | Messages, ...]]:
    if sides[0] == sides[1]:
        raise RloraError(f"{source}: chosen and rejected are the same; fix or drop the row")
    return prompt, tuple(sides)
