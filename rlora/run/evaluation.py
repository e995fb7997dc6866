"""Evaluation of a run on held-out prompts: before and after training, and every `evaluate.every` steps."""

import logging
from collections.abc import Callable
from functools import partial

from upath import UPath

from rlora.records import Adapter, RewardError, RloraError
from rlora.rollout.evaluate import Evaluations
from rlora.rollout.fleet import Fleet
from rlora.rollout.player import AgentLoop
from rlora.rollout.task import HELD_OUT, Task
from rlora.run import directory
from rlora.run.checkpoint import bundle_path, read, versions
from rlora.settings import Config

_log = logging.getLogger(__name__)

Figures = dict[str, float | None]


class HeldOut:
    """Schedules evaluations of a run's versions and records their results.

    Evaluates the version `first` that training starts from, the last version, and one every `evaluate.every` steps, at
    the same time as training. Results go to the summary, and to the metrics of the step in which the evaluation ended.
    """

    def __init__(
        self, config: Config, path: UPath, task: Task, first: int, fleet: Fleet, loop: AgentLoop,
        report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.config, self.path, self.sets, self.first, self._report = config, path, task.sets, first, report
        self._evaluations = Evaluations(config, task.sets, fleet, loop)
        self._evaluated = {line.get("accuracy/version") for line in directory.figures(path)}
        self._failure: RewardError | None = None

    @property
    def version(self) -> int | None:
        """Number of the version under evaluation, which engines must keep loaded; None if there is none."""
        return self._evaluations.version

    def resume(self, number: int) -> None:
        """Restart an interrupted evaluation: that of the newest due version below `number`, if it has no result yet."""
        due = number // self.config.evaluate.every * self.config.evaluate.every if self.config.evaluate.every else 0
        if not (due < number and self._is_due(due) and due in versions(self.path)):
            return
        try:
            adapter = read(bundle_path(self.path, due)).adapter
        except RloraError as error:  # the newest bundle is intact, so the run can continue without this one
            _log.warning(f"version {due} is not evaluated: {error}")
            return
        self._evaluations.start(adapter)

    def start(self, adapter: Adapter) -> None:
        """Start evaluating a version if it is due. The first and the last version have priority over other requests."""
        number = adapter.number
        is_first = number == self.first and not self._summary_before()
        if self.sets and (is_first or number >= self.config.steps):
            self._evaluations.start(adapter, background=False)
        elif self._is_due(number):
            self._evaluations.start(adapter)

    def figures(self, number: int) -> Figures:
        """Results of an evaluation that ended since the last call; empty if there is none.

        Waits for a running evaluation if `number`, the new version, is due or the last one, and if the first version is
        under evaluation.
        """
        version = self.version
        if version is None:
            return self._first_figures() if number == self.first + 1 else {}
        must_wait = self._is_due(number) or number >= self.config.steps or version == self.first
        if not (must_wait or self._evaluations.is_ready):
            return {}
        if version == self.first:
            self._summarise("before")
            return self._first_figures()
        figures = self._result(f"version {version}", str)
        if figures:
            figures = {"accuracy/version": version} | figures
            self._evaluated.add(version)
            directory.summarise(self.path, figures)
        return figures

    def check_rewards(self) -> None:
        """Raise RewardError if the reward functions failed in an evaluation."""
        if self._failure:
            raise self._failure

    def end(self) -> None:
        """Wait for the evaluation of the last version. Raises RewardError if the reward functions failed in it."""
        if self.version is not None:
            self._summarise("after" if self.version >= self.config.steps else "before")
            self.check_rewards()

    def _summarise(self, phase: str) -> None:
        """Wait for the evaluation and write it to the summary. `phase` is "before" or "after" training."""
        if figures := self._result(f"{phase} training", partial(_summary_key, phase=phase)):
            prompts = {"accuracy/prompts": len(self.sets[HELD_OUT])} if HELD_OUT in self.sets else {}
            directory.summarise(self.path, figures | prompts)

    def _result(self, label: str, key_of: Callable[[str], str]) -> Figures:
        """Wait for the evaluation. Results per set, under `key_of` its name; empty if the reward functions failed."""
        figures: Figures = {}
        try:
            evaluations = self._evaluations.result()
        except RewardError as error:
            self._failure = error
            return {}
        for name, evaluation in evaluations.items():
            accuracy, key = evaluation.accuracy, key_of(name)
            figures |= {
                f"accuracy/{key}": accuracy.estimate,
                f"accuracy/{key}/low": accuracy.low,
                f"accuracy/{key}/high": accuracy.high,
                (f"accuracy/{key}/reward" if key == name else f"reward/{key}"): evaluation.reward,
            }
            prompts = "held-out prompts" if name == HELD_OUT else f"prompts of evaluate.sets.{name}"
            self._report(f"{label}: accuracy {accuracy} on {prompts}")
        return figures

    def _first_figures(self) -> Figures:
        """Accuracy before training, for the metrics of the first step. The summary has it after a resume too."""
        summary = self._summary_before()
        if not (self.config.evaluate.every and self.sets and summary):
            return {}
        figures: Figures = {"accuracy/version": self.first}
        for name in self.sets:
            key = _summary_key(name, "before")
            figures |= {f"accuracy/{name}{end}": summary[f"accuracy/{key}{end}"] for end in ("", "/low", "/high")}
            figures[f"accuracy/{name}/reward"] = summary[f"reward/{key}"]
        return figures

    def _summary_before(self) -> Figures:
        """The summary if it has the accuracy before training of every set, else empty."""
        summary = directory.summary(self.path)
        return summary if all(f"accuracy/{_summary_key(name, 'before')}/low" in summary for name in self.sets) else {}

    def _is_due(self, number: int) -> bool:
        every = self.config.evaluate.every
        is_due = every > 0 and number % every == 0 and 0 < number < self.config.steps
        return bool(is_due and self.sets and number not in self._evaluated and number != self.version)


def _summary_key(name: str, phase: str) -> str:
    """Name of a set in the summary, where `phase` is "before" or "after" training."""
    return phase if name == HELD_OUT else f"{name}/{phase}"
