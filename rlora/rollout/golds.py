"""Static checks of gold answers and prompts, and the texts in which a model may write a gold answer."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any, NamedTuple

from rlora.model.chat import Chat
from rlora.records import Prompt

# Names of parameters and columns that hold a gold answer.
ANSWERS = frozenset((
    "answer", "answers", "ground_truth", "ground_truths", "solution", "solutions", "label", "labels", "target", "gold",
    "reference", "expected", "final_answer", "correct_answer", "reference_answer", "expected_answer",
))  # fmt: skip
_ANSWER_NAME = re.compile(
    r"answer|solution|gold|label|target|truth|reference|expected|result|output|final|correct|response|value", re.I
)
_PROPERTY_NAME = re.compile(r"(?:.*[_ -])(?:type|kind|format|length|len|count|source|level|idx|index|ids?)", re.I)
_ID_NAME = re.compile(r"(?:.*[_ -])?(?:id|ids|idx|index|uid|uuid|guid|qid|row)", re.IGNORECASE)
_LONG = 200  # characters; a longer gold answer is a full solution


class Form(NamedTuple):
    """A format for an answer: `prefix`, the answer, `suffix`. A prompt that contains `marker` requests this format."""

    name: str
    prefix: str = ""
    suffix: str = ""
    marker: str = ""


FORMS = (
    Form("bare"),
    Form("\\boxed{}", "\\boxed{", "}", "\\boxed"),
    Form("####", "#### ", "", "####"),
    Form("<answer>", "<answer>", "</answer>", "<answer>"),
    Form("<answer>", "<answer>\n", "\n</answer>", "<answer>"),
    Form("The answer is", "The answer is ", "."),
    Form("Answer:", "Answer: "),
)

_ITEM = (
    r"(?:[-+]?\d[\d.,/]*(?: [a-z]+)?|(?:option |choice )?\(?[A-J]\)?|yes|no|true|false|zero|one|two|three|four|five|six"
    r"|seven|eight|nine|ten|eleven|twelve)"
)
_WRAPPED = rf"(?:\$\s?|\\boxed\{{|\\text\{{)?{_ITEM}(?:\s?\$|\}})?"
_SEVERAL = rf"(?:either )?{_WRAPPED}(?:, {_WRAPPED})*,? ?\(?(?:or|and/or|or maybe|或者?|または) ?{_WRAPPED}\)?\.?"
_HEDGED = re.compile(
    rf"{_SEVERAL}|[A-J]\s?/\s?[A-J]|(?:maybe|perhaps|possibly|about|around|roughly|approximately) .+", re.IGNORECASE
)
_THINK_TAG = re.compile(  # opening thinking tags of models: <think>, [THINK], <seed:think>, ◁think▷
    r"[<\[◁【][|｜]?[\w ▁:.-]*(?:think|thought|reason|reflect|analysis|scratchpad)[\w ▁:.-]*[|｜]?[>\]▷】]\s*\Z",  # noqa: RUF001
    re.IGNORECASE,
)
_SENTENCES = re.compile(r"[.!?]\s+[A-Z(\\$]")
_NUMBERED = re.compile(r"(.*?)(\d+)")


def is_blank(gold: Any) -> bool:
    """Return whether a gold answer is missing: None, NaN, white space only, or an empty collection."""
    if isinstance(gold, float) and math.isnan(gold):
        return True
    return gold is None or (
        isinstance(gold, str | Sequence | Mapping) and not (gold.strip() if isinstance(gold, str) else gold)
    )


def answer_texts(gold: Any) -> list[str]:
    """Return texts in which a model may write a gold answer.

    A list or tuple contains alternative answers, and the result has one text for each of the first 3.
    """
    if is_blank(gold):
        return []
    if isinstance(gold, bool):
        return [str(gold), str(gold).lower(), "Yes" if gold else "No"]
    if isinstance(gold, Sequence) and not isinstance(gold, str | bytes):
        return [text for alternative in gold[:3] for text in answer_texts(alternative)[:1]]
    if isinstance(gold, float) and gold.is_integer():
        return [str(gold), str(int(gold))]
    return [final_answer(str(gold)).strip()]


def final_answer(gold: str) -> str:
    """Return the answer after #### or in the last \\boxed{} of a full solution, or any other gold answer unchanged."""
    if "####" in gold:
        return gold.rpartition("####")[2]
    start = gold.rfind("\\boxed{") + len("\\boxed{")
    if start < len("\\boxed{"):
        return gold
    depth = 1
    for index in range(start, len(gold)):
        depth += {"{": 1, "}": -1}.get(gold[index], 0)
        if not depth:
            return gold[start:index]
    return gold


def requested_markers(prompt: Prompt) -> list[str]:
    """Return the markers, such as ####, that a prompt requests."""
    return list(dict.fromkeys(form.marker for form in requested_forms(prompt)))


def requested_forms(prompt: Prompt) -> list[Form]:
    """Return the answer formats that a prompt requests."""
    text = prompt_text(prompt)
    return [form for form in FORMS if form.marker and form.marker in text]


def prompt_text(prompt: Prompt) -> str:
    """Return the text of all messages of a prompt."""
    return prompt.text if isinstance(prompt.text, str) else "\n".join(message["content"] for message in prompt.text)


def message_opening(chat: Chat, prompt: Prompt) -> str:
    """Return the text of a tokenized prompt after the env's text.

    The chat template and `chat.prefill` have written this text, which opens the policy's message. If the env's text
    does not occur in the prompt, the last 100 characters are returned.
    """
    text = chat.decode(prompt.token_ids)
    last = prompt.text if isinstance(prompt.text, str) else prompt.text[-1]["content"]
    return text.rpartition(last.strip())[2] if last.strip() in text else text[-100:]


def prompt_faults(chat: Chat, prompts: Iterable[Prompt]) -> Iterator[str]:
    """Yield the faults in how prompts begin and end, each once, with an example."""
    bos, think = chat.tokenizer.bos_token_id, chat.settings.think[0]
    template = "chat.template, or the tokenizer of model"
    examples: dict[str, Prompt] = {}
    for prompt in prompts:
        opening = message_opening(chat, prompt)
        tag = _THINK_TAG.search(opening)
        end = next((token for token in reversed(prompt.token_ids) if chat.decode([token]).strip()), None)
        if end is not None and end in chat.stop_token_ids:
            fault = (
                f"a prompt ends with the stop token {chat.decode([end])!r}, so the policy continues an ended message; "
                "set a template that opens the policy's message"
            )
            examples.setdefault(f"{template}: {fault}", prompt)
        if bos is not None and bos not in chat.stop_token_ids and prompt.token_ids[:2] == (bos, bos):
            examples.setdefault(f"{template}: a prompt begins with {chat.decode([bos])!r} twice; remove one", prompt)
        if opening.count(think) > 1:
            prefill = chat.settings.prefill
            field = f"chat.prefill = {prefill!r}" if think in prefill else "chat.template"
            examples.setdefault(f"{field}: {think} occurs twice at the start of the message; remove one", prompt)
        elif tag and think not in tag[0]:
            fault = f"a prompt ends with {tag[0].strip()!r}, which reward functions do not recognise as thinking"
            examples.setdefault(f"chat.think = {chat.settings.think!r}: {fault}; set the model's tags", prompt)
    for fault, prompt in examples.items():
        yield f"{fault} (this prompt ends with {chat.decode(prompt.token_ids)[-60:]!r})"


def gold_faults(golds: Sequence[Any], field: str) -> Iterator[str]:
    """Yield faults of gold answers that do not depend on a reward function. `field` names the source of the answers."""
    blank = [number for number, gold in enumerate(golds) if is_blank(gold)]
    if blank:
        yield (
            f"{field}: {len(blank)} of {len(golds)} gold answers are empty (the first is {golds[blank[0]]!r}, of "
            f"prompt {blank[0]}); drop these prompts, or name the column of the gold answer"
        )
    texts = [gold for gold in golds if isinstance(gold, str) and len(gold) > _LONG and final_answer(gold) == gold]
    texts = [gold for gold in texts if len(_SENTENCES.findall(gold)) > 1]
    if 2 * len(texts) > len(golds):
        yield (
            f"{field}: {len(texts)} of {len(golds)} gold answers are full texts, such as {shorten(texts[0])}, which no "
            "completion equals; name the column that has only the answer, or set env_args.answer_after"
        )
    hedged = [gold for gold in golds if isinstance(gold, str) and _HEDGED.fullmatch(gold.strip())]
    if hedged:
        yield (
            f"{field}: {len(hedged)} of {len(golds)} gold answers name several answers, such as {hedged[0]!r}, so a "
            "completion with one of these counts as wrong; fix or drop these prompts"
        )


def column_faults(column: str, prompts: Sequence[Prompt], field: str) -> Iterator[str]:
    """Yield faults if `column` does not seem to be the data set's column of the gold answer.

    `field` is the setting that names the column.
    """
    name, golds = column.rpartition(".")[2], [prompt.answer for prompt in prompts]
    candidates = [candidate for candidate in prompts[0].columns if candidate in ANSWERS and candidate != column]
    if all(gold == prompt.text for gold, prompt in zip(golds, prompts, strict=True)):
        yield f"{field}: each gold answer is the prompt itself, such as {shorten(golds[0])}; name the answer's column"
    elif _ANSWER_NAME.search(name) and not (candidates and _PROPERTY_NAME.fullmatch(name)):
        return
    elif candidates:
        names = " and ".join(map(repr, candidates))
        yield (
            f"{field}: this column is used as the gold answer, such as {shorten(golds[0])}, but the rows also have "
            f"{names}; name the answer's column"
        )
    elif _ID_NAME.fullmatch(name) or _are_row_numbers(golds):
        first = ", ".join(map(str, golds[:3]))
        yield f"{field}: the gold answers ({first}, ...) are row numbers or row ids; name the answer's column"


def _are_row_numbers(golds: Sequence[Any]) -> bool:
    """Return whether ten or more values number the rows: 0, 1, 2, or 1, 2, 3, or rising numbers after one prefix."""
    matches = [_NUMBERED.fullmatch(str(gold)) for gold in golds]
    numbers = [int(match[2]) for match in matches if match and len(match[2]) < 20]
    prefixes = {match[1] for match in matches if match}
    if len(golds) < 10 or len(numbers) < len(golds) or len(prefixes) > 1:
        return False
    if prefixes == {""}:
        return numbers[0] in (0, 1) and all(b == a + 1 for a, b in pairwise(numbers))
    return all(a < b for a, b in pairwise(numbers))


def mismatch_reasons(gold: Any) -> Iterator[str]:
    """Yield the reasons why a gold answer may never equal a completion, such as an answer that is a full solution."""
    if not isinstance(gold, str | int | float | Decimal | list | tuple):
        yield f"the gold answer is a {type(gold).__name__}, but a completion is text"
    text = str(gold)
    if len(text) > _LONG or "####" in text or "\\boxed" in text:
        yield "the gold answer is a full solution; set env_args.answer_after, or name a column with only the answer"
    elif re.search(r"\bor\b", text):
        yield "the gold answer names several answers"


def shorten(value: Any, length: int = 70) -> str:
    """Return the repr of a value, cut to `length` characters."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 4]} ..."
