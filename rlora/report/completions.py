"""The completions of a run, by step, as far as its bundles have them and a limit of bytes allows."""

import base64
import gzip
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from rlora.records import Episode, Group, Messages, RloraError, Trained
from rlora.report.runs import RunData, rounded
from rlora.run import checkpoint, episodes

_log = logging.getLogger(__name__)

_MOST_TOKENS = 4_000  # of a completion
_MOST_CHARACTERS = 20_000  # of a text

Vocabulary = Mapping[int, str] | None


@dataclass
class Completions:
    """The completions of a run's steps, compressed."""

    chunks: dict[int, str] = field(default_factory=dict)  # by step: gzip of JSON in Base64
    prompts: dict[int, list[int]] = field(default_factory=dict)  # by step: the number of each group's prompt
    tokens: dict[int, str] = field(default_factory=dict)  # text of each token that occurs, by id
    notes: list[str] = field(default_factory=list)  # what is left out, and why


def packed(value: Any) -> str:
    """Return JSON, compressed by gzip, in Base64: it contains no character with a meaning in HTML."""
    content = json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode()
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def read_completions(run: RunData, limit: int) -> Completions:
    """Read the completions of evenly spaced steps of a run, as many as fit in `limit` bytes."""
    found = Completions()
    try:
        steps = [version - 1 for version in checkpoint.versions(run.path) if version > 0]
    except OSError as error:
        found.notes.append(f"the bundles can't be read: {error}")
        return found
    decoder, numbers, size, left_out, missing = _Decoder(run, found), dict[str, int](), 0, 0, 0
    for step in spread(steps):
        groups = _read(run, step, found.notes)
        if groups is None:
            missing += 1
            continue
        chunk = packed([_group(group, decoder) for group in groups])
        if size + len(chunk) > limit:
            left_out += 1
            continue
        size += len(chunk)
        found.chunks[step] = chunk
        found.prompts[step] = [numbers.setdefault(_key(group), len(numbers)) for group, _ in groups]
    if missing:
        found.notes.append(f"{missing} of {len(steps)} bundles have no episodes (checkpoint.episodes_mib)")
    if left_out:
        found.notes.append(
            f"completions of {len(found.chunks)} steps are shown; those of {left_out} are left out, because they "
            f"exceed the limit of {limit / 2**20:.1f} MiB (--episodes-mib)"
        )
    if len(run.lines) > len(steps):
        found.notes.append(
            f"{len(steps)} of {len(run.lines)} steps have a bundle (checkpoint.keep_last, keep_every, keep_best)"
        )
    return found


def spread(steps: Sequence[int]) -> Iterator[int]:
    """Yield the last step, the first, the one in the middle, and so on: any number of them is spread evenly."""
    if not steps:
        return
    seen = set()
    for denominator in (2**power for power in range(math.ceil(math.log2(max(2, len(steps)))) + 1)):
        for numerator in range(denominator, -1, -1):
            index = round(numerator * (len(steps) - 1) / denominator)
            if index not in seen:
                seen.add(index)
                yield steps[index]
    yield from (step for index, step in enumerate(steps) if index not in seen)


_Groups = list[tuple[Group, list[Trained | None]]]


def _read(run: RunData, step: int, notes: list[str]) -> _Groups | None:
    """Return the groups of a step with what the update computed; None if they are not stored or can't be read."""
    try:
        content = checkpoint.read_update(run.path, step + 1)
        if content is None:
            return None
        trained = episodes.decode_training(content)
        return [
            (group, [trained.get((number, index)) for index in range(len(group.episodes))])
            for number, group in enumerate(episodes.decode(content, run.name))
        ]
    except (RloraError, OSError, ValueError, KeyError) as error:  # damaged, or removed by the run in the meantime
        notes.append(f"step {step}: the completions can't be read: {error}")
        return None


def _key(group: Group) -> str:
    return hashlib.sha256(repr(group.prompt.token_ids or group.prompt.text).encode()).hexdigest()


def _group(pair: tuple[Group, list[Trained | None]], decoder: "_Decoder") -> dict[str, Any]:
    group, trained = pair
    return {
        "prompt": _messages(group.prompt.text),
        "answer": None if group.prompt.answer is None else _cut(str(group.prompt.answer)),
        "episodes": [_episode(episode, item, decoder) for episode, item in zip(group.episodes, trained, strict=True)],
    }


def _messages(text: str | Messages) -> list[list[str]]:
    """Return (role, text) pairs of a prompt."""
    if isinstance(text, str):
        return [["user", _cut(text)]]
    return [[str(message.get("role", "")), _cut(_content(message))] for message in text]


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    calls = message.get("tool_calls")
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content, default=str)
    return f"{text}\n{json.dumps(calls, default=str)}".strip() if calls else text


def _cut(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS]}\n[{len(text) - _MOST_CHARACTERS:,} more characters]"


def _episode(episode: Episode, trained: Trained | None, decoder: "_Decoder") -> dict[str, Any]:
    """Return an episode as plain data. `ids` are its first tokens; `prob` (percent), `ratio` (percent) and `adv` are
    those of the tokens among them that the policy sampled, and the others are marked by 0 in `mask`."""
    ids = list(episode.completion_ids[:_MOST_TOKENS])
    mask = list(episode.sampled_mask[:_MOST_TOKENS])
    logprobs = numpy.array(episode.behaviour_logprobs[:_MOST_TOKENS], dtype=float)
    sampled = logprobs[numpy.array(mask, dtype=bool)] if mask else logprobs
    row: dict[str, Any] = {
        "reward": rounded(episode.reward),
        "status": episode.status,
        "parts": {name: rounded(value) for name, value in episode.parts.items()},
        "finish": episode.finish_reason,
        "version": episode.version.number,
        "length": episode.sampled_tokens,
        "prob": _percent(sampled),
    }
    if trained:
        advantages = numpy.frombuffer(trained.advantages, "float32")[: len(sampled)]
        is_constant = len(advantages) and (advantages == advantages[0]).all()
        row["adv"] = rounded(float(advantages[0]), 3) if is_constant else [rounded(float(a), 3) for a in advantages]
        if trained.logprobs:
            row["ratio"] = _percent(numpy.frombuffer(trained.logprobs, "float32")[: len(sampled)] - sampled)
    if decoder.has(ids):
        row |= {"ids": ids} | ({"mask": [int(flag) for flag in mask]} if mask else {})
        if len(episode.completion_ids) > len(ids):
            row["cut"] = len(episode.completion_ids) - len(ids)
    else:
        turns = [f"{message.get('role')}: {_content(message)}" for message in episode.messages]
        row["text"] = _cut("\n".join([*turns, episode.text] if turns else [episode.text]))
    return row


def _percent(logarithms: Any) -> list[int]:
    return [int(value) for value in numpy.rint(100 * numpy.exp(numpy.minimum(logarithms, 5.0)))]


class _Decoder:
    """Decodes tokens by the tokenizer of the run's model, and collects their texts in `found.tokens`."""

    def __init__(self, run: RunData, found: Completions) -> None:
        self.run, self.found = run, found
        self._tokenizer: Any = None
        self._is_missing = False

    def has(self, ids: Sequence[int]) -> bool:
        """Decode the tokens that occur for the first time. Return whether there is a tokenizer."""
        unknown = set(ids) - self.found.tokens.keys()
        if not self._load():
            return False
        self.found.tokens |= {token: self._tokenizer.decode([token]) for token in unknown}
        return True

    def _load(self) -> bool:
        if self._tokenizer is None and not self._is_missing:
            try:
                from transformers import AutoTokenizer

                from rlora.model.base import DEMO, locate

                model = self.run.config["model"]
                self._tokenizer = AutoTokenizer.from_pretrained(locate(model) if model == DEMO else model)
            except Exception as error:  # no such model here, no network, an unknown tokenizer: the texts are shown
                self._is_missing = True
                self.found.notes.append(
                    f"the tokenizer of the model can't be loaded, so there are no figures per token: {error}"
                )
        return self._tokenizer is not None
