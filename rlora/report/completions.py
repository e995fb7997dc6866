"""The completions of a run, by step, as far as its bundles have them and a limit of bytes allows."""

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy
from tokenizers.decoders import DecodeStream

from rlora.records import OFF, Episode, Group, Messages, RloraError, Trained
from rlora.report.runs import RunData, rounded
from rlora.run import checkpoint, episodes

_MOST_MISSES = 3  # steps that exceed the limit, after which no further one is read
_MOST_TOKENS = 4_000  # of a completion
_MOST_CHARACTERS = 20_000  # of a text


@dataclass
class Completions:
    """The completions of a run's steps, compressed."""

    chunks: dict[int, str] = field(default_factory=dict)  # by step: gzip of JSON in Base64
    prompts: dict[int, list[int]] = field(default_factory=dict)  # by step: the number of each group's prompt
    pieces: dict[str, int] = field(default_factory=dict)  # number of each text of a token
    notes: list[str] = field(default_factory=list)  # what is left out, and why


def packed(value: Any) -> str:
    """Return JSON, compressed by gzip, in Base64: it contains no character with a meaning in HTML."""
    return compressed(json.dumps(value, separators=(",", ":")))


def compressed(text: str) -> str:
    """Return a text, compressed by gzip, in Base64."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def read_completions(run: RunData, limit: int) -> Completions:
    """Read the completions of evenly spaced steps of a run, as many as fit in `limit` bytes."""
    found = Completions()
    if not limit:
        return found
    try:
        steps = [version - 1 for version in checkpoint.versions(run.path) if version > 0]
    except OSError as error:
        found.notes.append(f"the bundles can't be read: {error}")
        return found
    source = run.provenance.get("forked_from")
    first = source.get("version", 0) if isinstance(source, Mapping) else 0
    steps = [step for step in steps if step >= first]  # a fork's first bundle has an update of its source
    decoder, numbers, size, left_out, missing = _Decoder(run, found), dict[str, int](), 0, 0, 0
    for step in spread(steps):
        if left_out == _MOST_MISSES:
            break
        try:
            groups = _read(run, step)
            chunk = packed([_group(group, decoder) for group in groups]) if groups else ""
        except (RloraError, OSError, ValueError, KeyError) as error:  # damaged, or removed by the run in the meantime
            found.notes.append(f"step {step}: the completions can't be read: {error}")
            continue
        if not groups:
            missing += 1
        elif size + len(chunk) > limit:
            left_out += 1
        else:
            size += len(chunk)
            found.chunks[step] = chunk
            found.prompts[step] = [numbers.setdefault(_key(group), len(numbers)) for group, _ in groups]
    if missing:
        found.notes.append(f"{missing} of {len(steps)} bundles have no episodes (checkpoint.episodes_mib)")
    if left_out:
        found.notes.append(
            f"completions of {len(found.chunks)} of {len(steps)} steps are shown, because of the limit of "
            f"{limit / 2**20:.1f} MiB (--episodes-mib)"
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


def _read(run: RunData, step: int) -> _Groups | None:
    """Return the groups of a step with what the update computed; None if they are not stored."""
    content = checkpoint.read_update(run.path, step + 1)
    if content is None:
        return None
    trained = episodes.decode_training(content)
    return [
        (group, [trained.get((number, index)) for index in range(len(group.episodes))])
        for number, group in enumerate(episodes.decode(content, run.name))
    ]


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
    """Return an episode as plain data. `ids` are the numbers of the texts of its first tokens; `prob` (percent),
    `ratio` (percent) and `adv` are those of the tokens among them that the policy sampled or, if the completion was
    given, is trained on. The other tokens are marked by 0 in `mask`."""
    mask = list(episode.sampled_mask[:_MOST_TOKENS])
    logprobs = numpy.array(episode.behaviour_logprobs[:_MOST_TOKENS], dtype=float)
    sampled = logprobs[numpy.array(mask, dtype=bool)] if mask else logprobs
    learned = numpy.frombuffer(trained.logprobs if trained else b"", "float32")[: len(sampled)]
    is_given = episode.version.number == OFF
    row: dict[str, Any] = {
        "reward": rounded(episode.reward),
        "status": episode.status,
        "parts": {name: rounded(value) for name, value in episode.parts.items()},
        "finish": episode.finish_reason,
        "version": None if is_given else episode.version.number,
        "length": episode.sampled_tokens,
    }
    if not is_given:
        row["prob"] = _percent(sampled)
    if trained:
        advantages = [rounded(float(value), 3) for value in numpy.frombuffer(trained.advantages, "float32")]
        row["adv"] = advantages[0] if len(set(advantages)) == 1 else advantages[: len(sampled)]
    if len(learned):
        row |= {"prob": _percent(learned)} if is_given else {"ratio": _percent(learned - sampled)}
    if (ids := decoder.numbers_of(episode.completion_ids[:_MOST_TOKENS])) is not None:
        row |= {"ids": ids} | ({"mask": [int(flag) for flag in mask]} if mask else {})
        if len(episode.completion_ids) > len(ids):
            row["cut"] = len(episode.completion_ids) - len(ids)
    else:
        turns = [f"{message.get('role')}: {_content(message)}" for message in episode.messages]
        row["text"] = _cut("\n".join([*turns, episode.text] if turns else [episode.text]))
    return row


def _percent(logarithms: Any) -> list[int | None]:
    values = numpy.rint(100 * numpy.exp(numpy.minimum(logarithms, 5.0)))
    return [int(value) if math.isfinite(value) else None for value in values]


class _Decoder:
    """Decodes tokens by the tokenizer of the run's model, and numbers their texts in `found.pieces`."""

    def __init__(self, run: RunData, found: Completions) -> None:
        self._pieces = found.pieces
        self._tokenizer = _tokenizer(str(run.config.get("model")))
        if isinstance(self._tokenizer, str):
            found.notes.append(f"there are no figures per token: {self._tokenizer}")

    def numbers_of(self, ids: Sequence[int]) -> list[int] | None:
        """Return the numbers of the tokens' texts; None without a tokenizer.

        The text of a token is what it adds to the text before it. Of tokens that share a character, the last has it.
        """
        if isinstance(self._tokenizer, str):
            return None
        backend, stream = self._tokenizer.backend_tokenizer, DecodeStream(ids=[], skip_special_tokens=False)
        texts = [stream.step(backend, token) or "" for token in ids]
        return [self._pieces.setdefault(text, len(self._pieces)) for text in texts]


@cache
def _tokenizer(model: str) -> Any:
    """Load the tokenizer of a model from this machine. Returns the reason as text if that is not possible."""
    from transformers import AutoTokenizer

    from rlora.model.base import DEMO, locate

    try:
        tokenizer = AutoTokenizer.from_pretrained(locate(model) if model == DEMO else model, local_files_only=True)
    except Exception as error:  # an unknown tokenizer, or none here
        reason = str(error).partition("\n")[0]
        return f"the tokenizer of {model} can't be loaded from this machine ({reason:.200})"
    return tokenizer if hasattr(tokenizer, "backend_tokenizer") else f"the tokenizer of {model} is not a fast one"
