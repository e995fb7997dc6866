"""Supervised fine-tuning: the log-likelihood of given completions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlora.core.batch import Microbatch, Sample
from rlora.core.objectives.objective import Figures, Objective
from rlora.core.policy import Outputs
from rlora.records import Group


class Sft(Objective):
    """-w log p for each token of the completions, averaged over the tokens. w is the weight of the example."""

    skips_zeros = True

    def advantages(self, group: Group, samples: Sequence[Sample]) -> list[Tensor]:
        """Return the weight of each sample's example, which is the episode's reward, for each token: (C,)."""
        rewards = [sample.episode.reward if sample.episode else None for sample in samples]
        return [
            torch.full_like(sample.tokens.weights, 1.0 if reward is None else reward)
            for sample, reward in zip(samples, rewards, strict=True)
        ]

    def loss(self, now: Outputs, batch: Microbatch) -> tuple[Tensor, Figures]:
        """Return the weighted sum of -w log p, and the figure `nll`, -log p (C,)."""
        losses = -batch.tokens.advantages * now.logprobs
        return (losses * batch.tokens.weights).sum(), {"nll": -now.logprobs.detach()}
