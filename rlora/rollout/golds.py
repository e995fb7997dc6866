"""Gold answers and prompts as data: how a model would write a gold, and what is wrong with them at a glance."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any, NamedTuple

from rlora.model.chat import Chat
from rlora.records import Prompt

# Parameters and columns that hold a gold answer.
ANSWERS = frozenset((
    "answer", "answers", "ground_truth", "ground_truths", "solution", "solutions", "label", "labels", "target", "gold",
    "reference", "expected", "final_answer", "correct_answer", "reference_answer", "expected_answer",
))  # fmt: skip
_LIKE_AN_ANSWER = re.compile(
    r"answer|solution|gold|label|target|truth|reference|expected|result|output|final|correct|response|value", re.I
)
_ABOUT_AN_ANSWER = re.compile(r"(?:.*[_ -])(?:type|kind|format|length|len|count|source|level|idx|index|ids?)", re.I)
_LIKE_AN_ID = re.compile(r"(?:.*[_ -])?(?:id|ids|idx|index|uid|uuid|guid|qid|row)", re.IGNORECASE)
_LONG = 200  # characters from which a gold is a whole solution


class Form(NamedTuple):
    """A way to write an answer. A prompt that has `mark` in it asks for this one."""

    name: str
    before: str = ""
    after: str = ""
    mark: str = ""


FORMS = (
    Form("bare"),
    Form("\\boxed{}", "\\boxed{", "}", "\\boxed"),
    Form("####", "#### ", "", "####"),
    Form("<answer>", "<answer>", "</answer>", "<answer>"),
    Form("<answer>", "<answer>\n", "\n</answer>", "<answer>"),
    Form("The answer is", "The answer is ", "."),
    Form("Answer:", "Answer: "),
)

_PART = (
    r"(?:[-+]?\d[\d.,/]*(?: [a-z]+)?|(?:option |choice )?\(?[A-J]\)?|yes|no|true|false|zero|one|two|three|four|five|six"
    r"|seven|eight|nine|ten|eleven|twelve)"
)
_WRAPPED = rf"(?:\$\s?|\\boxed\{{|\\text\{{)?{_PART}(?:\s?\$|\}})?"
_SEVERAL = rf"(?:either )?{_WRAPPED}(?:, {_WRAPPED})*,? ?\(?(?:or|and/or|or maybe|或者?|または) ?{_WRAPPED}\)?\.?"
_HEDGED = re.compile(
    rf"{_SEVERAL}|[A-J]\s?/\s?[A-J]|(?:maybe|perhaps|possibly|about|around|roughly|approximately) .+", re.IGNORECASE
)
_THINK_TAG = re.compile(  # of the tags in which models think: <think>, [THINK], <seed:think>, ◁think▷
    r"[<\[◁【][|｜]?[\w ▁:.-]*(?:think|thought|reason|reflect|analysis|scratchpad)[\w ▁:.-]*[|｜]?[>\]▷】]\s*\Z",  # noqa: RUF001
    re.IGNORECASE,
)
_SENTENCES = re.compile(r"[.!?]\s+[A-Z(\\$]")
_NUMBERED = re.compile(r"(.*?)(\d+)")


def is_blank(gold: Any) -> bool:
    """Whether there is no gold: None, NaN, nothing but white space, an empty list."""
    if isinstance(gold, float) and math.isnan(gold):
        return True
    return gold is None or (
        isinstance(gold, str | Sequence | Mapping) and not (gold.strip() if isinstance(gold, str) else gold)
    )


def written(gold: Any) -> list[str]:
    """The gold as a model may write it; of a list, which holds several right answers, each of the first three."""
    if is_blank(gold):
        return []
    if isinstance(gold, bool):
        return [str(gold), str(gold).lower(), "Yes" if gold else "No"]
    if isinstance(gold, Sequence) and not isinstance(gold, str | bytes):
        return [text for each in gold[:3] for text in written(each)[:1]]
    if isinstance(gold, float) and gold.is_integer():
        return [str(gold), str(int(gold))]
    return [answer_in(str(gold)).strip()]


def answer_in(gold: str) -> str:
    """The answer at the end of a whole solution, behind #### or in its last box; another gold as it is."""
    if "####" in gold:
        return gold.rpartition("####")[2]
    start = gold.rfind("\\boxed{") + len("\\boxed{")
    if start < len("\\boxed{"):
        return gold
    depth = 1
    for place in range(start, len(gold)):
        depth += {"{": 1, "}": -1}.get(gold[place], 0)
        if not depth:
            return gold[start:place]
    return gold


def marks(prompt: Prompt) -> list[str]:
    """What a prompt says its answer should have, as ####."""
    return list(dict.fromkeys(form.mark for form in asks_for(prompt)))


def asks_for(prompt: Prompt) -> list[Form]:
    """The forms in which a prompt wants its answer."""
    text = asked(prompt)
    return [form for form in FORMS if form.mark and form.mark in text]


def asked(prompt: Prompt) -> str:
    """All that a prompt says."""
    return prompt.text if isinstance(prompt.text, str) else "\n".join(turn["content"] for turn in prompt.text)


def opening(chat: Chat, prompt: Prompt) -> str:
    """What stands in a prompt after all that the env said: what opens the policy's message."""
    shown = chat.shown(prompt.token_ids)
    last = prompt.text if isinstance(prompt.text, str) else prompt.text[-1]["content"]
    return shown.rpartition(last.strip())[2] if last.strip() in shown else shown[-100:]


def faults_of_prompts(chat: Chat, prompts: Iterable[Prompt]) -> Iterator[str]:
    """What is wrong with how prompts begin and end, each named once."""
    bos, think = chat.tokenizer.bos_token_id, chat.settings.think[0]
    template = "chat.template, or the tokenizer of model"
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        opened, tag = opening(chat, prompt), _THINK_TAG.search(opening(chat, prompt))
        end = next((token for token in reversed(prompt.token_ids) if chat.shown([token]).strip()), None)
        if end is not None and end in chat.stop_token_ids:
            what = f"a prompt ends with the stop token {chat.shown([end])!r}, and the policy has to go on after the end"
            found.setdefault(f"{template}: {what}", prompt)
        if bos is not None and bos not in chat.stop_token_ids and prompt.token_ids[:2] == (bos, bos):
            found.setdefault(f"{template}: a prompt begins with {chat.shown([bos])!r} twice", prompt)
        if opened.count(think) > 1:
            prefill = chat.settings.prefill
            field = f"chat.prefill = {prefill!r}" if think in prefill else "chat.template"
            found.setdefault(f"{field}: {think} stands twice where the policy begins; leave one out", prompt)
        elif tag and think not in tag[0]:
            what = (
                f"a prompt ends with {tag[0].strip()!r}, which reward functions do not see as thinking; name its tags"
            )
            found.setdefault(f"chat.think = {chat.settings.think!r}: {what}", prompt)
    for what, prompt in found.items():
        yield f"{what} (it ends with {chat.shown(prompt.token_ids)[-60:]!r})"


def faults_of_golds(golds: Sequence[Any], answers: str) -> Iterator[str]:
    """What is wrong with golds whatever is paid for them; `answers` is the field that says where they come from."""
    blank = [number for number, gold in enumerate(golds) if is_blank(gold)]
    if blank:
        yield (
            f"{answers}: {len(blank)} of {len(golds)} golds are empty (the first is {golds[blank[0]]!r}, of prompt "
            f"{blank[0]}); drop these prompts, or name the column of the gold"
        )
    told = [gold for gold in golds if isinstance(gold, str) and len(gold) > _LONG and answer_in(gold) == gold]
    told = [gold for gold in told if len(_SENTENCES.findall(gold)) > 1]
    if 2 * len(told) > len(golds):
        yield (
            f"{answers}: {len(told)} of {len(golds)} golds are whole texts, as {cut(told[0])}, which no completion "
            "equals; name the column that has the answer alone, or cut it out (env_args.answer_after)"
        )
    hedged = [gold for gold in golds if isinstance(gold, str) and _HEDGED.fullmatch(gold.strip())]
    if hedged:
        yield (
            f"{answers}: {len(hedged)} of {len(golds)} golds give several answers, as {hedged[0]!r}, so a completion "
            "that gives one is not right; mend or drop these prompts"
        )


def faults_of_column(column: str, prompts: Sequence[Prompt], answers: str) -> Iterator[str]:
    """Signs that the data set's column of the gold is another one than `column`."""
    name, golds = column.rpartition(".")[2], [prompt.answer for prompt in prompts]
    others = [each for each in prompts[0].columns if each in ANSWERS and each != column]
    if all(gold == prompt.text for gold, prompt in zip(golds, prompts, strict=True)):
        yield f"{answers}: each gold is the prompt itself, as {cut(golds[0])}; name the gold's column"
    elif _LIKE_AN_ANSWER.search(name) and not (others and _ABOUT_AN_ANSWER.fullmatch(name)):
        return
    elif others:
        named = " and ".join(map(repr, others))
        yield f"{answers}: it is taken for the gold, as {cut(golds[0])}, but the rows have {named}; name the gold's"
    elif _LIKE_AN_ID.fullmatch(name) or _count_up(golds):
        first = ", ".join(map(str, golds[:3]))
        yield f"{answers}: golds ({first}, ...) are the numbers of rows, or their names; name the gold's column"


def _count_up(golds: Sequence[Any]) -> bool:
    """Whether ten or more count rows: 0, 1, 2 or 1, 2, 3, or after the same text higher and higher numbers."""
    found = [_NUMBERED.fullmatch(str(gold)) for gold in golds]
    numbers = [int(each[2]) for each in found if each and len(each[2]) < 20]
    before = {each[1] for each in found if each}
    if len(golds) < 10 or len(numbers) < len(golds) or len(before) > 1:
        return False
    if before == {""}:
        return numbers[0] in (0, 1) and all(b == a + 1 for a, b in pairwise(numbers))
    return all(a < b for a, b in pairwise(numbers))


def looks(gold: Any) -> Iterator[str]:
    """Why a gold may be one that no completion equals."""
    if not isinstance(gold, str | int | float | Decimal | list | tuple):
        yield f"the gold is a {type(gold).__name__}, and a completion is text"
    text = str(gold)
    if len(text) > _LONG or "####" in text or "\\boxed" in text:
        yield "the gold is a whole solution; env_args.answer_after cuts it, or another column has the answer alone"
    elif re.search(r"\bor\b", text):
        yield "the gold gives several answers"


def cut(value: Any, most: int = 70) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."
