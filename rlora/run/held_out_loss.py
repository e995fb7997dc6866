"""Loss on held-out examples, in place of accuracy, for algorithms that learn from given completions."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from upath import UPath

from rlora.core.batch import sample_of
from rlora.core.learner import Groups
from rlora.core.objectives import objective_of
from rlora.core.objectives.objective import Need
from rlora.records import Adapter
from rlora.rollout.task import Task
from rlora.run import directory
from rlora.settings import Config

Figures = dict[str, float | None]


class Forward(Protocol):
    """The learner's forward pass."""

    def forward(self, policy: str, groups: Groups, reference: bool = False) -> list[list[Tensor]]: ...


class HeldOutLoss:
    """Evaluates the versions that `HeldOut` would: the first, the last, and every `evaluate.every`-th between them.

    The learner computes the logprobs of the held-out completions. For SFT the figure is their `nll`, -log p per token;
    for pairs the share of pairs in which the chosen completion gained more than the rejected one, and the mean margin.
    """

    version: int | None = None  # nothing is sampled, so engines keep no version loaded

    def __init__(
        self, config: Config, path: UPath, task: Task, first: int, learner: Forward, report: Callable[[str], None]
    ) -> None:
        self.config, self.path, self.first, self.learner, self._report = config, path, first, learner, report
        groups = task.held_out_examples
        self._samples = [[sample_of(group.prompt.token_ids, e) for e in group.episodes] for group in groups]
        self._needs_reference = Need.REFERENCE in objective_of(config.algorithm, config.sampling.max_tokens).needs
        self._reference: list[list[Tensor]] | None = None
        self._figures: Figures = {}  # for the metrics of the next step

    def resume(self, number: int) -> None:
        """Do nothing: `start` evaluates at once, so an earlier process left no evaluation unfinished."""

    def start(self, adapter: Adapter) -> None:
        """Evaluate the adapter, the learner's current version, if it is due. Blocks."""
        every, number = self.config.evaluate.every, adapter.number
        phase = "before" if number == self.first else "after" if number >= self.config.steps else ""
        if not self._samples or not (phase or (every and number % every == 0)):
            return
        figures = self._evaluate(adapter.policy)
        text = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self._report(f"{f'{phase} training' if phase else f'version {number}'}: {text} on held-out examples")
        self._figures = {"held_out/version": number} | {f"held_out/{name}": x for name, x in figures.items()}
        suffix = f"/{phase}" if phase else ""
        directory.summarise(self.path, {f"held_out/{name}{suffix}": value for name, value in figures.items()})

    def figures(self, number: int) -> Figures:
        """Return the figures of an evaluation since the last call; empty if there was none."""
        figures, self._figures = self._figures, {}
        return figures

    def check_rewards(self) -> None:
        """Do nothing, because there are no rewards."""

    def end(self) -> None:
        """Do nothing: `start` has evaluated the last version."""

    def _evaluate(self, policy: str) -> dict[str, float]:
        logprobs = self.learner.forward(policy, self._samples)
        if self.config.algorithm.loss == "sft":
            return {"nll": -float(torch.cat([values for group in logprobs for values in group]).mean())}
        if self._needs_reference:
            self._reference = self._reference or self.learner.forward(policy, self._samples, reference=True)
        margins = torch.stack([_margin(group) for group in logprobs])
        if self._reference:
            margins -= torch.stack([_margin(group) for group in self._reference])
        beta = self.config.algorithm.kl
        return {"accuracy": float((margins > 0).float().mean()), "margin": beta * float(margins.mean())}


def _margin(pair: Sequence[Tensor]) -> Tensor:
    chosen, rejected = (logprobs.sum() for logprobs in pair)
    return chosen - rejected
