"""Settings of the RL algorithm, and what the name of each algorithm sets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from rlora.settings.fields import STRICT, Problem, Share

ReadyAlgorithm = Literal[
    "reinforce", "grpo", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "ppo", "sft", "dpo", "ipo", "orpo"
]

SUPERVISED = ("sft", "dpo", "ipo", "orpo")  # values of `name` and `loss` that learn from given completions


@dataclass(frozen=True)
class AlgorithmConfig:
    __pydantic_config__ = STRICT

    name: ReadyAlgorithm | Annotated[str, Field(pattern=r".:\w+$")] = "reinforce"
    """Algorithm: `reinforce`, `grpo`, `dr-grpo`, `dapo`, `gspo`, `cispo`, `rloo`, `reinforce++`, `ppo`; `sft`, `dpo`,
    `ipo`, `orpo`, which learn from completions that the env gives; or your own objective as module:name or
    path/to/file.py:name. The name sets the defaults of the other `algorithm` fields (table in docs/algorithms.md);
    fields that are set explicitly take precedence. The defaults in this help are those of `reinforce` and of your own
    objective."""
    advantage: Literal["centred", "standardised", "leave-one-out", "whitened", "gae"] = "centred"
    """Advantage estimator. `centred`: reward minus the mean reward of the prompt's group. `standardised`: `centred`,
    divided by the group's standard deviation. `leave-one-out`: reward minus the mean reward of the group's other
    completions. `whitened`: for each token the sum of the rewards that follow (discounted by `algorithm.gamma`),
    normalised to mean 0 and variance 1 over the step's tokens. `gae`: generalised advantage estimation for each token
    with a critic (`critic` fields), normalised like `whitened`."""
    loss: Literal["reinforce", "clip", "gspo", "cispo", "sft", "dpo", "ipo", "orpo"] = "reinforce"
    """Policy loss per token, where A is the advantage, p the token's probability under the current policy, and r is p
    divided by the token's probability under the policy at the update's start. `reinforce`: -r A. `clip`: PPO's loss,
    the larger of -r A and -r A with r clipped (`algorithm.clip_low`, `algorithm.clip_high`). `gspo`: `clip` with one r
    per episode, the geometric mean over its tokens. `cispo`: -r A log p with r clipped and without a gradient, so that
    tokens outside the clip range are trained on too. The others learn from completions that the env gives, without
    sampling. `sft`: -log p. `dpo`, `ipo`, `orpo`: losses of pairs of a chosen and a rejected completion."""
    average: Literal["tokens", "episodes", "constant"] = "tokens"
    """Normalisation of the loss within a minibatch. `tokens`: the mean over all tokens that are trained on. `episodes`:
    the mean over the tokens of each episode, then over episodes. `constant`: the sum over all tokens, divided by the
    number of episodes times `sampling.max_tokens`."""
    clip_low: Share = 0.2
    """Lower clip range: `algorithm.loss` = `clip`, `gspo` and `cispo` clip the ratio of the current policy to the
    policy at the update's start below 1 - `algorithm.clip_low`. `algorithm.loss` = `reinforce` does not clip."""
    clip_high: NonNegativeFloat = 0.2
    """Upper clip range: `algorithm.loss` = `clip`, `gspo` and `cispo` clip the ratio of the current policy to the
    policy at the update's start above 1 + `algorithm.clip_high`. `algorithm.loss` = `reinforce` does not clip."""
    dual_clip: NonNegativeFloat = 0.0
    """Dual-clip bound (arXiv:1912.09729): the loss of a token with a negative advantage A is at most
    -`algorithm.dual_clip` times A, however large the ratio is. `0` sets no bound. Other values must be above 1 +
    `algorithm.clip_high` (3 is usual), and need `algorithm.loss` = `clip` or `gspo`."""
    correction: Literal["token-truncate", "token-mask", "episode-truncate", "episode-mask", "none"] = "token-truncate"
    """Correction of the policy loss by the importance ratio: the token's probability under the policy at the update's
    start, divided by the probability under the version that sampled. `token-truncate`: multiply the loss of each token
    by the token's ratio, at most `algorithm.importance_cap`. `token-mask`: the same, but with 0 if the ratio is above
    the cap. `episode-truncate`, `episode-mask`: the same with one ratio per episode, the product over its tokens.
    `none`: no correction."""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """Largest importance ratio that `algorithm.correction` applies, 1 or more. A larger ratio is truncated to this
    value or masked."""
    importance_floor: Share = 0.0
    """Smallest importance ratio for `algorithm.correction` = `token-mask` and `episode-mask`, 0 to 1: tokens or
    episodes with a smaller ratio are masked too. `token-mask` with a floor of 0.5 and an `algorithm.importance_cap` of
    5 is IcePop. `0` sets no floor."""
    geometric_mask: NonNegativeFloat = 0.0
    """Mask for whole episodes whose policy changed since they were sampled: an episode has no policy loss if the
    geometric mean of its tokens' importance ratios is above 1 + `algorithm.geometric_mask` or below 1 / (1 +
    `algorithm.geometric_mask`). verl suggests 0.0002 to 0.001, for long completions: in short ones the rounding of
    single tokens moves the mean by more. `algorithm.correction` applies to the remaining episodes. `0` masks no
    episode."""
    kl: NonNegativeFloat = 0.0
    """Coefficient of the KL divergence from the policy to the reference policy, which is the base model with the
    adapter off. Larger values keep the policy closer to the base. `0` computes no KL; the metric `kl/reference` is then
    null. For `algorithm.loss` = `dpo`, `ipo` and `orpo` this is beta."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL per token for `algorithm.kl`, from d = log p - log p_reference (Schulman 2020). `k1`: d,
    which is subtracted from the reward, because the gradient of d in the loss is 0 on average. `k2`: d^2 / 2, added to
    the loss. `k3`: exp(-d) - 1 + d, added to the loss."""
    entropy: NonNegativeFloat = 0.0
    """Coefficient of the entropy bonus: the loss of each token is reduced by the coefficient times the entropy of the
    token's distribution, so larger values keep the policy more random. `0` adds no bonus; the metric `entropy` is then
    estimated from the logprobs of the sampled tokens."""
    epochs: PositiveInt = 1
    """Number of times that an update trains on each episode of its step."""
    minibatches: PositiveInt = 1
    """Number of minibatches into which each epoch divides the groups of the step, at most `prompts_per_step`. Each
    minibatch makes one Adam step."""
    target_kl: NonNegativeFloat = 0.0
    """Largest KL divergence in nats per token between the policy at an update's start and the current policy. An update
    ends before the Adam step of a minibatch with a larger mean KL. `0` sets no limit. A limit needs `algorithm.epochs`
    or `algorithm.minibatches` above 1."""
    refills: NonNegativeInt = 0
    """Maximum number of times that a step samples more prompts to replace groups whose rewards are all equal (DAPO's
    dynamic sampling). `0` keeps such groups. A step that stopped waiting for late groups (`engine.straggler_seconds`)
    replaces none."""
    truncated: Literal["learn", "drop", "bootstrap"] = "learn"
    """Treatment of completions that were cut off, at `sampling.max_tokens` or because an env's reply did not fit.
    `learn`: train on them like on others. `drop`: exclude them from the loss, so that an answer is not discouraged only
    because it is unfinished; the rewards still count in the mean of the group. `bootstrap`: with `algorithm.advantage`
    = `gae`, count the critic's value after the last token as the reward that the rest would have earned. Use
    `bootstrap` only for rewards that accumulate per token: a reward for the whole answer is counted twice, and the
    policy learns to be cut off."""
    overlong_tokens: NonNegativeInt = 0
    """Number of tokens before `sampling.max_tokens` over which the penalty for long completions grows linearly from 0
    to `algorithm.overlong_penalty` (DAPO). `0` sets no penalty; set both fields, or neither."""
    overlong_penalty: NonNegativeFloat = 0.0
    """Largest penalty for long completions (DAPO): the amount that is subtracted from the reward of a completion with
    `sampling.max_tokens` tokens. `algorithm.overlong_tokens` sets where the penalty begins. `0` sets no penalty."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount factor per token, above 0 and at most 1: a reward that follows n tokens later counts gamma^n. `1` does
    not discount. Only `algorithm.advantage` = `gae` and `whitened` use it."""
    lam: Share = 1.0
    """Lambda of generalised advantage estimation, 0 to 1, for `algorithm.advantage` = `gae`. `1` uses all later
    rewards; lower values rely more on the critic, which lowers the variance and adds the critic's bias."""

    @property
    def of_group(self) -> bool:
        """Whether an advantage is relative to the other completions of the prompt, and the same for all its tokens."""
        return self.advantage not in ("whitened", "gae")

    @property
    def supervised(self) -> bool:
        """Whether the loss learns from given completions, so that nothing is sampled."""
        return self.loss in SUPERVISED

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL to the reference policy is subtracted from the reward."""
        return self.kl > 0 and self.kl_estimator == "k1"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL to the reference policy is added to the loss."""
        return self.kl > 0 and self.kl_estimator != "k1"

    def check(self) -> Iterator[Problem]:
        """Yield a Problem for every rule that these settings break."""
        gspo, per_token = self.loss == "gspo", not self.of_group
        if 0 < self.dual_clip <= 1 + self.clip_high:
            yield Problem(
                "algorithm.dual_clip",
                "a bound of 1 + algorithm.clip_high or less also changes tokens inside the clip range; set "
                f"algorithm.dual_clip above {1 + self.clip_high:g} (3 is usual), or to 0 for no bound",
            )
        if self.dual_clip and self.loss not in ("clip", "gspo"):
            yield Problem(
                "algorithm.dual_clip",
                f"algorithm.loss = {self.loss!r} has no clipped surrogate to bound; set algorithm.dual_clip to 0, or "
                'algorithm.loss to "clip" or "gspo"',
            )
        if gspo and self.correction.startswith("token"):
            yield Problem(
                "algorithm.correction",
                'GSPO (algorithm.loss = "gspo") has one ratio per episode, so the correction must be per episode too; '
                'set algorithm.correction to "episode-truncate", "episode-mask" or "none"',
            )
        if self.importance_floor and not self.correction.endswith("mask"):
            yield Problem(
                "algorithm.importance_floor",
                f"algorithm.correction = {self.correction!r} masks nothing; set algorithm.correction to "
                f'"{"episode" if gspo else "token"}-mask", or algorithm.importance_floor to 0',
            )
        if gspo and per_token:
            yield Problem(
                "algorithm.advantage",
                'advantages are per token, and GSPO (algorithm.loss = "gspo") has one ratio per episode; set '
                'algorithm.loss = "clip", or algorithm.advantage to "centred", "standardised" or "leave-one-out"',
            )
        if self.target_kl and self.epochs * self.minibatches == 1:
            yield Problem(
                "algorithm.target_kl",
                "an update with one minibatch can't end early; set algorithm.target_kl to 0, or raise "
                "algorithm.minibatches or algorithm.epochs",
            )
        if self.truncated == "bootstrap" and self.advantage != "gae":
            yield Problem(
                "algorithm.truncated",
                'bootstrap needs a critic; set algorithm.advantage = "gae", or algorithm.truncated to "learn" or '
                '"drop"',
            )
        if self.supervised and self.loss != "sft" and not self.kl:
            yield Problem(
                "algorithm.kl", f"it is beta of algorithm.loss = {self.loss!r}; set algorithm.kl above 0, 0.1 is usual"
            )
        if self.refills and per_token:
            yield Problem(
                "algorithm.refills",
                f"groups with equal rewards do carry a gradient with algorithm.advantage = {self.advantage!r}, so they "
                "are not replaced; set algorithm.refills to 0",
            )
        if bool(self.overlong_penalty) != bool(self.overlong_tokens):
            yield Problem(
                "algorithm.overlong_penalty",
                f"algorithm.overlong_tokens is {self.overlong_tokens}, and the penalty needs both fields; set both "
                "above 0, or both to 0",
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
    "sft": {"loss": "sft"},
    **{name: {"loss": name, "kl": 0.1} for name in ("dpo", "ipo", "orpo")},
}  # fmt: skip
