"""The final text of a completion: after the thinking, up to the end of the turn, inside answer tags. Stdlib only."""

# ruff: noqa: RUF001 - a special token has a full-width sign

import re

_THINKING = ("</think>", "</thinking>", "</thought>", "<|end_of_thought|>")
_OPENED = re.compile(r"<(?:think|thinking|thought)>|<\|begin_of_thought\|>")
_CHANNEL = re.compile(r"<\|channel\|>final\b[^<]*<\|message\|>")
_END = re.compile(
    r"<\|(?:im_end|eot_id|endoftext|end|end_of_text|im_start|eom_id|return|call)\|>|</s>"
    r"|<end_of_turn>|<｜end▁of▁sentence｜>"
)
_LEADING = re.compile(rf"\A(?:\s|{_END.pattern})*")
_TAG = re.compile(
    r"<\|?(?P<before>begin_of_)?(?P<name>(?:final[_ ]?)?answer|ans|final|solution|output|result|response|boxed)\|?>",
    re.IGNORECASE,
)
_OTHER_TAG = re.compile(r"</?[A-Za-z]\w{4,}>")  # shorter tags such as <sup> and <b> belong to the text
_MAX_LENGTH = 300  # characters; longer text in a tag is a solution, not an answer


def final_text(completion: str) -> str:
    """Return the text after the thinking, up to the end of the turn. If it has answer blocks, only the last block."""
    for tag in _THINKING:
        completion = completion.rpartition(tag)[2]
    if "<" not in completion:
        return completion
    if opened := _OPENED.search(completion):
        completion = completion[: opened.start()]
    for channel in _CHANNEL.finditer(completion):
        completion = completion[channel.end() :]
        break
    completion = _LEADING.sub("", completion, count=1)
    if end := _END.search(completion):
        completion = completion[: end.start()]
    return _tagged(completion)


def _tagged(text: str) -> str:
    """Return the text in the last answer tag. Other tags count as well, unless an answer follows them."""
    for tag in reversed(list(_TAG.finditer(text))):
        closing = re.compile(rf"<(?:/|\|end_of_){re.escape(tag['name'])}\|?>", re.IGNORECASE)
        content, rest = text[tag.end() :], ""
        if end := closing.search(text, tag.end()):
            content, rest = text[tag.end() : end.start()], text[end.end() :]
        if "ans" not in tag["name"].lower() and ("\\boxed" in rest or "answer" in rest.lower()):
            continue
        content = re.sub(r"(?<=\d)[ \t]*\n\s*(?=-?\d)", ", ", content.strip())
        is_solution = len(content) > _MAX_LENGTH or "\\boxed" in content or "####" in content
        return content if is_solution or "answer" in content.lower() else f"answer: {content}"
    return text if "\\boxed" in text else _OTHER_TAG.sub("\n", text)
