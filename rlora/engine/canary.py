"""Whether an engine serves what it should, by what it says of a few tokens."""

from collections.abc import Sequence
from statistics import fmean

from rlora.records import Canary

# How far a canary may be from the learner's, mean over its tokens: so many times as far as the base's own is, for the
# two round in another order. A version's was 0.7 to 1.6 times as far on SmolLM2-135M in bf16. One that is nearer to the
# base than to its own is taken for the base sooner.
_NOISES, _NOISES_OF_THE_BASE = 10.0, 3.0
_LEAST_NOISE = 1e-4  # nats; in fp32 the two agree to about 1e-5


def judged(
    canary: Canary, logprobs: Sequence[float], noise: float, base: Sequence[float] | None = None
) -> tuple[float, str]:
    """How far an engine's logprobs are from the learner's, in nats, and what is wrong with that; empty if nothing is.

    `noise` is how far the engine's and the learner's are apart without an adapter, `base` what the engine says then.
    """
    off = distance(logprobs, canary.logprobs)
    nearer_to_base = off > distance(logprobs, canary.base_logprobs)
    bound = (_NOISES_OF_THE_BASE if nearer_to_base else _NOISES) * max(noise, _LEAST_NOISE)
    if not off <= bound:
        return off, f"the canary is {off:.2g} nats off the learner's, and {bound:.2g} is the most it may be"
    if base and canary.logprobs == canary.base_logprobs and logprobs != base:
        return off, f"it is the base, and the canary is {distance(logprobs, base):.2g} nats off the base's"
    return off, ""


def distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The mean absolute difference."""
    return fmean(abs(one - other) for one, other in zip(ours, theirs, strict=True))
