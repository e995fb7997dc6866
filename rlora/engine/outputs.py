"""Converts vLLM's outputs to records."""

from typing import cast

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from rlora.records import Episode, Version


def prompt_logprobs(output: RequestOutput) -> list[float]:
    """Return the logprobs of the T - 1 prompt tokens after the first, in nats."""
    tokens, entries = cast(list[int], output.prompt_token_ids), cast(list[dict[int, Logprob]], output.prompt_logprobs)
    return [entry[token].logprob for token, entry in zip(tokens[1:], entries[1:], strict=True)]


def to_episode(completion: CompletionOutput, version: Version) -> Episode:
    """Convert a completion that `version` sampled to an episode without text or reward."""
    entries = cast(list[dict[int, Logprob]], completion.logprobs)
    logprobs = tuple(entry[token].logprob for token, entry in zip(completion.token_ids, entries, strict=True))
    return Episode(tuple(completion.token_ids), logprobs, str(completion.finish_reason), version)
