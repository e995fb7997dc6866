"""Converts settings of sampling to vLLM's, and vLLM's outputs to records."""

from itertools import chain
from typing import Any, cast

import numpy as np
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from rlora.records import Episode, Kept, Sampling, Version


def prompt_logprobs(output: RequestOutput) -> list[float]:
    """Return the logprobs of the T - 1 prompt tokens after the first, in nats."""
    tokens, entries = cast(list[int], output.prompt_token_ids), cast(list[dict[int, Logprob]], output.prompt_logprobs)
    return [entry[token].logprob for token, entry in zip(tokens[1:], entries[1:], strict=True)]


def params_of(sampling: Sampling) -> dict[str, Any]:
    """Return the arguments of vLLM's SamplingParams that `sampling` sets."""
    return {
        "n": sampling.group_size, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
        "top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p,
        "stop_token_ids": list(sampling.stop_token_ids), "stop": list(sampling.stop),
        "detokenize": bool(sampling.stop),  # vLLM looks for stop strings in the text
        "skip_special_tokens": False,  # a stop string may be one
    }  # fmt: skip


def with_top_k(params: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a request for an engine with `return_sampling_mask`, which requires top-k and a
    temperature above 0. Greedy requests and canaries sample from the most probable token alone."""
    is_sampled = params.get("temperature") and params.get("top_k")
    return params if is_sampled else params | {"temperature": 1.0, "top_k": 1}


def to_episode(completion: CompletionOutput, version: Version, sampling: Sampling) -> Episode:
    """Convert a completion that `version` sampled to an episode without text or reward."""
    entries = cast(list[dict[int, Logprob]], completion.logprobs)
    logprobs = tuple(entry[token].logprob for token, entry in zip(completion.token_ids, entries, strict=True))
    return Episode(
        tuple(completion.token_ids),
        logprobs,
        str(completion.finish_reason),
        version,
        kept=_kept(completion) if sampling.truncates else None,
    )


def _kept(completion: CompletionOutput) -> Kept:
    """Return the tokens that top-k, top-p and min-p kept."""
    assert completion.sampling_mask
    kept = completion.sampling_mask.token_ids
    assert len(kept) == len(completion.token_ids)
    ids = np.fromiter(chain.from_iterable(kept), np.int32)
    return Kept(ids.tobytes(), tuple(map(len, kept)))
