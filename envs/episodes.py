"""An env whose examples are the episodes of a run: its right completions, or pairs of a right and a wrong one."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from rlora.records import BASE, Episode, Group, Prompt, RloraError

from .table import held_out_of

_log = logging.getLogger(__name__)


class RunEpisodes:
    """The episodes in the bundles of a run, with the tokens that were sampled, for algorithms that learn from given
    completions.

    `run` is the run's directory. Without `pairs` each right completion is an example for SFT (rejection sampling); with
    `pairs` each prompt that has right and wrong completions gives pairs for DPO, IPO and ORPO. A completion is right if
    its reward is at least `threshold`, and wrong if it is below. `steps` limits the examples to those of steps before
    this number, 0 for all. A prompt gives at most `most` examples per step, drawn with `seed`. `held_out_share` of the
    prompts are held out.
    """

    def __init__(
        self, run: str, pairs: bool = False, threshold: float = 1.0, steps: int = 0, most: int = 1,
        held_out_share: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        if not 0 <= held_out_share < 1:
            raise RloraError(f"env_args.held_out_share = {held_out_share}: use a number from 0 to less than 1")
        for name, number, least in (("most", most, 1), ("steps", steps, 0)):
            if not isinstance(number, int) or number < least:
                raise RloraError(f"env_args.{name} = {number!r}: use an integer of {least} or more")
        if not isinstance(threshold, int | float):
            raise RloraError(f"env_args.threshold = {threshold!r}: use a number")
        self._run, self._pairs, self._threshold, self._steps = run, pairs, threshold, steps
        self._most, self._share, self._seed = most, held_out_share, seed

    def train(self) -> Sequence[Prompt]:
        return self._part(held_out=False)

    def held_out(self) -> Sequence[Prompt]:
        return self._part(held_out=True) if self._share else []

    def _part(self, held_out: bool) -> list[Prompt]:
        prompts = sorted({group.prompt.token_ids for _, group in self._groups})
        rng = random.Random(self._seed)
        chosen = set(rng.sample(prompts, held_out_of(len(prompts), self._share) if self._share else 0))
        examples = [
            example
            for step, group in self._groups
            for example in self._examples(group, f"{self._run}, step {step}", rng)
            if (group.prompt.token_ids in chosen) == held_out
        ]
        if not examples and not held_out:
            kind = "pair of a right and a wrong completion" if self._pairs else "right completion"
            raise RloraError(
                f"env_args.run = {self._run!r}: its bundles have no {kind} (threshold {self._threshold}); lower "
                "env_args.threshold, or use a run with such episodes"
            )
        return examples

    @cached_property
    def tokenized_by(self) -> str:
        """The run's model, whose tokens the episodes have."""
        return str(self._bundle(self._versions[-1]).config.model)

    @cached_property
    def _versions(self) -> list[int]:
        from upath import UPath

        from rlora.run import checkpoint

        if versions := checkpoint.versions(UPath(self._run)):
            return versions
        raise RloraError(f"env_args.run = {self._run!r}: not the directory of a run with bundles; name one")

    def _bundle(self, version: int) -> Any:
        from upath import UPath

        from rlora.run import checkpoint

        return checkpoint.read(checkpoint.bundle_path(UPath(self._run), version))

    @cached_property
    def _groups(self) -> list[tuple[int, Group]]:
        """The groups of each update whose bundle has them, with the number of the step."""
        steps = min(self._steps or self._versions[-1], self._versions[-1])
        found = {version - 1: self._bundle(version).groups for version in self._versions if 0 < version <= steps}
        stored = {step: groups for step, groups in found.items() if groups}
        fault = f"{steps - len(stored)} of its first {steps} steps have no bundle with episodes"
        fix = f"train it with checkpoint.keep_last = {steps + 1} and a larger checkpoint.episodes_mib"
        if not stored:
            raise RloraError(f"env_args.run = {self._run!r}: {fault}; raise env_args.steps, or {fix}")
        if len(stored) < steps:
            _log.warning("env_args.run = %r: %s; to learn from all of them, %s", self._run, fault, fix)
        return [(step, group) for step, groups in stored.items() for group in groups]

    def _examples(self, group: Group, source: str, rng: random.Random) -> list[Prompt]:
        scored = [replace(episode, version=BASE.version) for episode in group.scored.episodes]
        right = self._distinct([episode for episode in scored if self._is_right(episode)], rng)
        right_ids = {episode.completion_ids for episode in right}  # once right, once a timeout: not wrong
        wrong = self._distinct([episode for episode in scored if episode.completion_ids not in right_ids], rng)
        examples = list(zip(right, wrong, strict=False)) if self._pairs else [(episode,) for episode in right]
        return [replace(group.prompt, completions=episodes, source=source) for episodes in examples[: self._most]]

    def _is_right(self, episode: Episode) -> bool:
        return episode.reward is not None and episode.reward >= self._threshold

    @staticmethod
    def _distinct(episodes: Sequence[Episode], rng: random.Random) -> list[Episode]:
        """Return the episodes without repeated completions, in random order."""
        found = list({episode.completion_ids: episode for episode in episodes}.values())
        rng.shuffle(found)
        return found
