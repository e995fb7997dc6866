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
    """Schedules the evaluation of a run's versions on held-out prompts, and records the results.

    Evaluates the version `first` that training starts from, the last version, and between them each version whose
    number is a multiple of `evaluate.every`. Engines sample for evaluation and training at the same time. Results go to
    summary.json, and to the metrics of the step in which the evaluation ended; `report` receives the results as text.
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
        """Number of the version under evaluation, which engines must keep loaded; None if no evaluation is running."""
        return self._evaluations.version

    def resume(self, number: int) -> None:
        """Start again, without blocking, an evaluation that an earlier process did not finish.

        Only the newest version below `number` that is a multiple of `evaluate.every` is evaluated, and only if
        metrics.jsonl has no result of it. A damaged bundle of that version causes a warning.
        """
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
        """Start evaluating `adapter`, without blocking, if this version is to be evaluated and has no result yet.

        Engines sample the prompts of the first and the last version before the training prompts in the queue, and those
        of other versions after the training prompts. `figures` and `end` collect the results and raise errors.
        """
        number = adapter.number
        is_first = number == self.first and not self._summary_before()
        if self.sets and (is_first or number >= self.config.steps):
            self._evaluations.start(adapter, background=False)
        elif self._is_due(number):
            self._evaluations.start(adapter)

    def figures(self, number: int) -> Figures:
        """Return the metrics of an evaluation that ended since the last call; empty if none has ended.

        Blocks until the running evaluation ends if `number`, the number of the new version, is due for evaluation or is
        the last, or if the first version is under evaluation. If the reward functions failed, returns no metrics, and
        `check_rewards` raises the error.
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
        """Wait for a running evaluation, and write its results to the summary.

        Raises RewardError if the reward functions failed in this evaluation.
        """
        if self.version is not None:
            self._summarise("after" if self.version >= self.config.steps else "before")
            self.check_rewards()

    def _summarise(self, phase: str) -> None:
        """Wait for the evaluation and write its results to the summary. `phase` is "before" or "after" training."""
        if figures := self._result(f"{phase} training", partial(_summary_key, phase=phase)):
            prompts = {"accuracy/prompts": len(self.sets[HELD_OUT])} if HELD_OUT in self.sets else {}
            directory.summarise(self.path, figures | prompts)

    def _result(self, label: str, key_of: Callable[[str], str]) -> Figures:
        """Wait for the evaluation, and return the results of each set, with `key_of(name)` in their names.

        Empty if the reward functions failed.
        """
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
        """Return the accuracy before training, for the metrics of the first step.

        The source is the summary, which a resumed run has too.
        """
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
        """Return the summary if it has every set's accuracy before training, else {}."""
        summary = directory.summary(self.path)
        return summary if all(f"accuracy/{_summary_key(name, 'before')}/low" in summary for name in self.sets) else {}

    def _is_due(self, number: int) -> bool:
        every = self.config.evaluate.every
        is_due = every > 0 and number % every == 0 and 0 < number < self.config.steps
        return bool(is_due and self.sets and number not in self._evaluated and number != self.version)


def _summary_key(name: str, phase: str) -> str:
    """Return the name of a set in the summary, where `phase` is "before" or "after" training."""
    return phase if name == HELD_OUT else f"{name}/{phase}"
