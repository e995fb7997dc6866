"""Encoding of groups as Parquet, one row per episode."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import numpy
import pyarrow
from pyarrow import parquet

from rlora.records import Episode, Group, Kept, Prompt, Trained, Version

_TRAINED = {"advantages": "advantages", "learner_logprobs": "logprobs"}  # column: field of `Trained`

Training = Mapping[tuple[int, int], Trained]  # by group and episode


def encode(groups: Sequence[Group], trained: Training | None = None) -> bytes:
    """Encode groups as zstd-compressed Parquet, with what an update computed for their tokens.

    Logprobs and rewards are exact. Objects that JSON can't represent are stored as `str` of the object.
    """
    rows = [(number, group.prompt, episode) for number, group in enumerate(groups) for episode in group.episodes]
    prompts, episodes = [prompt for _, prompt, _ in rows], [episode for _, _, episode in rows]
    table = pyarrow.table({
        "group": pyarrow.array([number for number, _, _ in rows], pyarrow.int32()),
        "prompt": _texts(prompt.text for prompt in prompts),
        "answer": _texts(prompt.answer for prompt in prompts),
        "columns": _texts(dict(prompt.columns) for prompt in prompts),
        "prompt_ids": _lists([prompt.token_ids for prompt in prompts], "int32"),
        "completion_ids": _lists([episode.completion_ids for episode in episodes], "int32"),
        "behaviour_logprobs": _lists([episode.behaviour_logprobs for episode in episodes], "float64"),
        "own": _lists([episode.sampled_mask for episode in episodes], "bool"),
        "version": pyarrow.array([episode.version.number for episode in episodes], pyarrow.int32()),
        "digest": pyarrow.array([episode.version.digest for episode in episodes], pyarrow.string()),
        "finish_reason": pyarrow.array([episode.finish_reason for episode in episodes], pyarrow.string()),
        "reward": pyarrow.array([episode.reward for episode in episodes], pyarrow.float64()),
        "status": pyarrow.array([episode.status for episode in episodes], pyarrow.string()),
        "parts": _texts(dict(episode.parts) for episode in episodes),
        "text": _texts(episode.text for episode in episodes),
        "messages": _texts([dict(message) for message in episode.messages] for episode in episodes),
        "state": _texts(dict(episode.state) for episode in episodes),
        **_kept_columns(episodes),
        **_trained_columns(groups, trained or {}),
    })  # fmt: skip
    file = pyarrow.BufferOutputStream()
    parquet.write_table(table, file, compression="zstd")
    content: bytes = file.getvalue().to_pybytes()
    return content


def decode(content: bytes, policy: str) -> list[Group]:
    """Decode the groups that `encode` wrote. `policy` is the policy of the episodes' versions.

    Versions in files of earlier releases have no digests.
    """
    rows = parquet.read_table(pyarrow.BufferReader(content), use_threads=False).to_pylist()
    return [
        Group(_prompt(first := next(members)), tuple(_episode(row, policy) for row in (first, *members)))
        for _, members in groupby(rows, key=lambda row: row["group"])
    ]


def _prompt(row: dict[str, Any]) -> Prompt:
    text, answer, columns = (json.loads(row[name]) for name in ("prompt", "answer", "columns"))
    return Prompt(text, answer, tuple(row["prompt_ids"]), columns)


def _episode(row: dict[str, Any], policy: str) -> Episode:
    return Episode(
        completion_ids=tuple(row["completion_ids"]),
        behaviour_logprobs=tuple(row["behaviour_logprobs"]),
        finish_reason=row["finish_reason"],
        version=Version(policy, row["version"], row.get("digest", "")),
        text=json.loads(row["text"]),
        reward=row["reward"],
        sampled_mask=tuple(row["own"]),
        messages=tuple(json.loads(row["messages"])),
        state=json.loads(row["state"]),
        status=row["status"],
        parts=json.loads(row["parts"]),
        kept=Kept(row["kept_ids"], tuple(row["kept_counts"])) if row.get("kept_counts") else None,
    )


def _kept_columns(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return the columns of `Episode.kept`; none if no episode has it."""
    if not any(episode.kept for episode in episodes):
        return {}
    kept = [episode.kept or Kept(b"", ()) for episode in episodes]
    return {
        "kept_ids": pyarrow.array([item.ids for item in kept], pyarrow.large_binary()),
        "kept_counts": _lists([item.counts for item in kept], "int32"),
    }


def decode_training(content: bytes) -> dict[tuple[int, int], Trained]:
    """Decode what `encode` wrote of an update. Empty for files of earlier releases."""
    file = pyarrow.BufferReader(content)
    if not _TRAINED.keys() <= set(parquet.read_schema(file).names):
        return {}
    rows = parquet.read_table(file, columns=["group", *_TRAINED], use_threads=False).to_pylist()
    return {
        (number, index): Trained(
            **{name: numpy.asarray(row[column], "float32").tobytes() for column, name in _TRAINED.items()}
        )
        for number, members in groupby(rows, key=lambda row: row["group"])
        for index, row in enumerate(members)
        if row["advantages"] is not None
    }


def _trained_columns(groups: Sequence[Group], trained: Training) -> dict[str, Any]:
    """Return the columns of `Trained`, null for episodes that the update did not compute; none without an update."""
    if not trained:
        return {}
    items = [trained.get((g, e)) for g, group in enumerate(groups) for e in range(len(group.episodes))]
    return {
        column: pyarrow.array(
            [item and numpy.frombuffer(getattr(item, name), "float32") for item in items],
            pyarrow.list_(pyarrow.float32()),
        )
        for column, name in _TRAINED.items()
    }


def _texts(values: Iterable[Any]) -> Any:
    """Make a column of JSON strings. They are ASCII, so that Parquet accepts lone surrogates in a text."""
    return pyarrow.array(list(map(_json, values)), pyarrow.string())


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):  # keys that are not text, or a circular reference
        return json.dumps(str(value))


def _lists(rows: Sequence[Sequence[Any]], dtype: str) -> Any:
    """Make a column with one list per episode, without a Python object per number."""
    offsets = numpy.cumsum([0, *map(len, rows)], dtype="int32")
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(numpy.fromiter(chain.from_iterable(rows), dtype)))
