"""What a completion says to the user: behind the thinking, up to the end of the turn, in answer tags. Stdlib only."""

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
_OTHER_TAG = re.compile(r"</?[A-Za-z]\w{4,}>")  # <sup> and <b> are of the text
_LONGEST = 300  # characters of a tag's text that is an answer and no solution


def said(completion: str) -> str:
    """What stands after the thinking, up to the end of the turn; of answer blocks the last."""
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
    """The text of the last answer tag; of another tag too, unless an answer is given behind it."""
    for tag in reversed(list(_TAG.finditer(text))):
        closing = re.compile(rf"<(?:/|\|end_of_){re.escape(tag['name'])}\|?>", re.IGNORECASE)
        inner, behind = text[tag.end() :], ""
        if closed := closing.search(text, tag.end()):
            inner, behind = text[tag.end() : closed.start()], text[closed.end() :]
        if "ans" not in tag["name"].lower() and ("\\boxed" in behind or "answer" in behind.lower()):
            continue
        inner = re.sub(r"(?<=\d)[ \t]*\n\s*(?=-?\d)", ", ", inner.strip())
        long = len(inner) > _LONGEST or "\\boxed" in inner or "####" in inner
        return inner if long or "answer" in inner.lower() else f"answer: {inner}"
    return text if "\\boxed" in text else _OTHER_TAG.sub("\n", text)
