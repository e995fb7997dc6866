"""Settings of the RL algorithm, and what the name of each algorithm sets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from rlora.settings.fields import STRICT, Problem, Share

ReadyAlgorithm = Literal["reinforce", "grpo", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "ppo"]


@dataclass(frozen=True)
class AlgorithmConfig:
    __pydantic_config__ = STRICT

    name: ReadyAlgorithm | Annotated[str, Field(pattern=r".:\w+$")] = "reinforce"
    """Algorithm whose defaults the other `algorithm` fields take (table in docs/algorithms.md), or your own objective
    as module:name or path/to/file.py:name."""
    advantage: Literal["centred", "standardised", "leave-one-out", "whitened", "gae"] = "centred"
    """Advantage estimator: relative to the group (centred, standardised, leave-one-out), to the whole step (whitened),
    or per token by a critic (gae)."""
    loss: Literal["reinforce", "clip", "gspo", "cispo"] = "reinforce"
    """Policy loss: the ratio to the policy at the update's start unclipped (reinforce), clipped per token (clip),
    clipped per episode (gspo), or as a clipped weight (cispo)."""
    average: Literal["tokens", "episodes", "constant"] = "tokens"
    """Loss normalisation within a minibatch: over tokens, over episodes, or by episodes x sampling.max_tokens."""
    clip_low: Share = 0.2
    """The importance ratio is clipped below 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """The importance ratio is clipped above 1 + clip_high."""
    dual_clip: NonNegativeFloat = 0.0
    """Upper bound on the ratio of tokens with negative advantage; above 1 + `algorithm.clip_high`, or 0 for no
    bound."""
    correction: Literal["token-truncate", "token-mask", "episode-truncate", "episode-mask", "none"] = "token-truncate"
    """What is done if the ratio of the update's starting policy to the behaviour policy, per token or per episode,
    exceeds `algorithm.importance_cap`."""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """Cap of the ratio of the update's starting policy to the behaviour policy."""
    kl: NonNegativeFloat = 0.0
    """Coefficient of the KL to the reference policy, which is the base with the adapter off; 0 computes none."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token KL estimator (Schulman 2020). k2 and k3 are added to the loss; k1 is subtracted from the reward, since
    its gradient in the loss is 0 on average."""
    entropy: NonNegativeFloat = 0.0
    """Coefficient of the entropy bonus; 0 computes no entropy."""
    epochs: PositiveInt = 1
    """Passes of an update over the step's episodes."""
    minibatches: PositiveInt = 1
    """Minibatches per epoch, by group; each is one Adam step."""
    target_kl: NonNegativeFloat = 0.0
    """Stop an update before a minibatch whose mean KL per token from the update's start is above this; 0 is no
    limit."""
    refills: NonNegativeInt = 0
    """Times that a step requests more prompts to replace groups whose rewards are all equal (DAPO's dynamic sampling).
    A step with late groups requests none (`engine.straggler_seconds`)."""
    truncated: Literal["learn", "drop", "bootstrap"] = "learn"
    """Treatment of completions that were cut off at `sampling.max_tokens`: learn from them as from others, drop them
    from the loss, or with `gae` add the critic's value after the end to their reward (bootstrap). Bootstrap is for
    rewards that accumulate per token: if the whole answer is rewarded, the policy learns to be cut off."""
    overlong_tokens: NonNegativeInt = 0
    """Length of the interval before `sampling.max_tokens` over which `algorithm.overlong_penalty` grows linearly
    (DAPO)."""
    overlong_penalty: NonNegativeFloat = 0.0
    """Amount subtracted from the reward of a completion with `sampling.max_tokens` tokens (DAPO)."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token, for `gae` and `whitened`."""
    lam: Share = 1.0
    """GAE's lambda."""

    @property
    def of_group(self) -> bool:
        """Whether an advantage is relative to the other completions of the prompt, and the same for all its tokens."""
        return self.advantage not in ("whitened", "gae")

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL to the reference policy is subtracted from the reward."""
        return self.kl > 0 and self.kl_estimator == "k1"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL to the reference policy is added to the loss."""
        return self.kl > 0 and self.kl_estimator != "k1"

    def check(self) -> Iterator[Problem]:
        gspo, per_token = self.loss == "gspo", not self.of_group
        if 0 < self.dual_clip <= 1 + self.clip_high:
            yield Problem(
                "algorithm.dual_clip",
                f"it would also cut tokens inside the clip range; set it above {1 + self.clip_high:g} (3 is usual), or "
                "to 0",
            )
        if self.dual_clip and self.loss not in ("clip", "gspo"):
            yield Problem(
                "algorithm.dual_clip", f"algorithm.loss = {self.loss!r} has no clipped surrogate to bound; set it to 0"
            )
        if gspo and self.correction.startswith("token"):
            yield Problem(
                "algorithm.correction",
                "GSPO's ratio is per episode, and so must be the correction; use episode-truncate, episode-mask or "
                "none",
            )
        if gspo and per_token:
            yield Problem(
                "algorithm.advantage",
                'it is per token, and GSPO has one ratio per episode; use algorithm.loss = "clip", or an advantage '
                "that is relative to the group",
            )
        if self.target_kl and self.epochs * self.minibatches == 1:
            yield Problem(
                "algorithm.target_kl",
                "an update with one minibatch has nothing to stop; set it to 0, or use more minibatches or epochs",
            )
        if self.truncated == "bootstrap" and self.advantage != "gae":
            yield Problem(
                "algorithm.truncated",
                'bootstrap needs a critic; set algorithm.advantage = "gae", or use learn or drop',
            )
        if self.refills and per_token:
            yield Problem(
                "algorithm.refills", "groups with equal rewards do carry a gradient with this advantage; set it to 0"
            )
        if bool(self.overlong_penalty) != bool(self.overlong_tokens):
            yield Problem(
                "algorithm.overlong_penalty",
                f"algorithm.overlong_tokens is {self.overlong_tokens}; set both, or neither",
            )


PRESETS: dict[str, dict[str, Any]] = {
    "reinforce": {},
    "grpo": {"advantage": "standardised", "loss": "clip", "average": "episodes"},
    "dr-grpo": {"loss": "clip", "average": "constant"},
    "dapo": {"advantage": "standardised", "loss": "clip", "clip_high": 0.28, "refills": 2},
    "gspo": {
        "advantage": "standardised", "loss": "gspo", "average": "episodes", "clip_low": 3e-4, "clip_high": 4e-4,
        "correction": "episode-truncate", "minibatches": 4,
    },
    "cispo": {"advantage": "standardised", "loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, "minibatches": 4},
    "rloo": {"advantage": "leave-one-out"},
    "reinforce++": {"advantage": "whitened", "loss": "clip", "kl": 1e-3, "kl_estimator": "k1"},
    "ppo": {"advantage": "gae", "loss": "clip", "minibatches": 4, "lam": 0.95},
}  # fmt: skip
