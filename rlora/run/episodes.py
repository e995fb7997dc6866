"""Groups as a Parquet file, a row an episode, and back."""

import json
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from typing import Any

import numpy
import pyarrow
from pyarrow import parquet

from rlora.records import Episode, Group, Prompt, Version


def encode(groups: Sequence[Group]) -> bytes:
    """Compressed by zstd. Logprobs and rewards keep every bit; what JSON does not know of an answer becomes text."""
    pairs = [(number, group.prompt, each) for number, group in enumerate(groups) for each in group.episodes]
    prompts, of = [prompt for _, prompt, _ in pairs], [each for _, _, each in pairs]
    table = pyarrow.table({
        "group": pyarrow.array([number for number, _, _ in pairs], pyarrow.int32()),
        "prompt": _texts(prompt.text for prompt in prompts),
        "answer": _texts(prompt.answer for prompt in prompts),
        "columns": _texts(dict(prompt.columns) for prompt in prompts),
        "prompt_ids": _lists([prompt.token_ids for prompt in prompts], "int32"),
        "completion_ids": _lists([each.completion_ids for each in of], "int32"),
        "behaviour_logprobs": _lists([each.behaviour_logprobs for each in of], "float64"),
        "own": _lists([each.sampled_mask for each in of], "bool"),
        "version": pyarrow.array([each.version.number for each in of], pyarrow.int32()),
        "digest": pyarrow.array([each.version.digest for each in of], pyarrow.string()),
        "finish_reason": pyarrow.array([each.finish_reason for each in of], pyarrow.string()),
        "reward": pyarrow.array([each.reward for each in of], pyarrow.float64()),
        "status": pyarrow.array([each.status for each in of], pyarrow.string()),
        "parts": _texts(dict(each.parts) for each in of),
        "text": _texts(each.text for each in of),
        "messages": _texts([dict(message) for message in each.messages] for each in of),
        "state": _texts(dict(each.state) for each in of),
    })  # fmt: skip
    file = pyarrow.BufferOutputStream()
    parquet.write_table(table, file, compression="zstd")
    content: bytes = file.getvalue().to_pybytes()
    return content


def decode(content: bytes, policy: str) -> list[Group]:
    """What `encode` was given, sampled by versions of `policy`. Releases before 0.2 kept no digests."""
    rows = parquet.read_table(pyarrow.BufferReader(content), use_threads=False).to_pylist()
    return [
        Group(_prompt(first := next(of)), tuple(_episode(row, policy) for row in (first, *of)))
        for _, of in groupby(rows, key=lambda row: row["group"])
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
    )


def _texts(values: Iterable[Any]) -> Any:
    """JSON, which is plain ASCII whatever is in it."""
    return pyarrow.array(list(map(_json, values)), pyarrow.string())


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):  # keys that are no text, or a circle
        return json.dumps(str(value))


def _lists(rows: Sequence[Sequence[Any]], dtype: str) -> Any:
    """A list an episode, without a Python object for each of its numbers."""
    offsets = numpy.cumsum([0, *map(len, rows)], dtype="int32")
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(numpy.fromiter(chain.from_iterable(rows), dtype)))
