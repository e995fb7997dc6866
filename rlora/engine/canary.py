"""Checks an engine's logprobs of a few tokens, the canary, against the learner's."""

from collections.abc import Sequence
from statistics import fmean

from rlora.records import Canary

# Limits on the distance to the learner's logprobs, as multiples of the noise: the distance without an adapter, where
# engine and learner differ by rounding alone. Versions of SmolLM2-135M in bf16 were at 0.7 to 1.6 times the noise. The
# lower limit holds for logprobs that are nearer to the base's than to the version's: the engine may serve the base.
_LIMIT, _LIMIT_NEAR_BASE = 10.0, 3.0
_LEAST_NOISE = 1e-4  # nats; in fp32 the two agree to about 1e-5


def compare_canary(
    canary: Canary, logprobs: Sequence[float], noise: float, base: Sequence[float] | None = None
) -> tuple[float, str]:
    """Compare an engine's logprobs of a canary with the learner's.

    `noise` is the distance between engine and learner without an adapter, in nats per token; at least 1e-4 is assumed.
    `base` is the engine's own logprobs without an adapter: a version that equals the base must reproduce them exactly.
    Returns the distance in nats per token, and an error message. The message is empty if the distance is at most 10
    times the noise, or 3 times if `logprobs` are nearer to the learner's logprobs of the base than to the version's.
    """
    difference = distance(logprobs, canary.logprobs)
    is_nearer_to_base = difference > distance(logprobs, canary.base_logprobs)
    limit = (_LIMIT_NEAR_BASE if is_nearer_to_base else _LIMIT) * max(noise, _LEAST_NOISE)
    if not difference <= limit:
        return difference, (
            f"the canary's logprobs differ from the learner's by {difference:.2g} nats per token, and the limit is "
            f"{limit:.2g}"
        )
    if base and canary.logprobs == canary.base_logprobs and logprobs != base:
        return difference, (
            "the adapter equals the base, but the canary's logprobs under the adapter differ from those without it by "
            f"{distance(logprobs, base):.2g} nats per token"
        )
    return difference, ""


def distance(logprobs: Sequence[float], reference: Sequence[float]) -> float:
    """Return the mean absolute difference of two sequences of equal length."""
    return fmean(abs(a - b) for a, b in zip(logprobs, reference, strict=True))
