"""Evaluates a run on held-out prompts: before and after training, and every so many steps beside it."""

from upath import UPath

from rlora.records import Adapter
from rlora.rollout.evaluate import Evaluation, Evaluations
from rlora.rollout.fleet import Fleet
from rlora.rollout.player import AgentLoop
from rlora.rollout.task import HELD_OUT, Task
from rlora.run import directory
from rlora.run.checkpoint import bundle_path, read, versions
from rlora.settings import Config

Figures = dict[str, float | None]


class HeldOut:
    """The sets of held-out prompts of a run, and which of its versions they were tried on.

    What comes of an evaluation stands in the summary, and in the line of the step in which it ended.
    """

    def __init__(self, config: Config, place: UPath, task: Task, fleet: Fleet, loop: AgentLoop) -> None:
        self.config, self.place, self.sets, self.fleet = config, place, task.sets, fleet
        self._evaluations = Evaluations(config, task.sets, fleet, loop)
        self._known = {line.get("accuracy/version") for line in directory.figures(place)}
        self._figures: Figures = {}  # that no line has yet

    @property
    def version(self) -> int | None:
        """The number of the version that is being evaluated; engines have to hold it."""
        return self._evaluations.version

    def measure(self, when: str, adapter: Adapter) -> None:
        """Evaluate `adapter` and wait for it; `when` is before or after."""
        if not self.sets:
            return
        self.fleet.swap(adapter)
        self._evaluations.start(adapter, background=False)
        found: Figures = {}
        for name, evaluation in self._evaluations.result().items():
            found |= _figures(when if name == HELD_OUT else f"{name}/{when}", evaluation)
        prompts = {"accuracy/prompts": len(self.sets[HELD_OUT])} if HELD_OUT in self.sets else {}
        directory.summarise(self.place, found | prompts)

    def resume(self, number: int) -> None:
        """Start again what a death ended: the evaluation of the newest version up to `number` that is due for one."""
        due = number // self.config.evaluate.every * self.config.evaluate.every if self.config.evaluate.every else 0
        if due < number and self._is_due(due) and due in versions(self.place):
            self._evaluations.start(read(bundle_path(self.place, due)).adapter)

    def start(self, adapter: Adapter) -> None:
        """Have a version evaluated beside training, if one is due. It waits for the evaluation before."""
        if self._is_due(adapter.number):
            self._take()
            self._evaluations.start(adapter)

    def figures(self) -> Figures:
        """Return what an evaluation that has ended since came to; nothing where none has."""
        if self._evaluations.is_ready:
            self._take()
        found, self._figures = self._figures, {}
        return found

    def end(self) -> None:
        """Wait for what is being evaluated."""
        self._take()

    def _is_due(self, number: int) -> bool:
        every = self.config.evaluate.every
        is_due = every > 0 and number % every == 0 and 0 < number < self.config.steps
        return bool(is_due and self.sets and number not in self._known and number != self.version)

    def _take(self) -> None:
        """Wait for the evaluation that is under way."""
        version = self.version
        if version is None:
            return
        found: Figures = {"accuracy/version": version}
        for name, evaluation in self._evaluations.result().items():
            found |= _figures(name, evaluation)
        self._known.add(version)
        self._figures = found
        directory.summarise(self.place, found)


def _figures(name: str, evaluation: Evaluation) -> Figures:
    accuracy = evaluation.accuracy
    return {
        f"accuracy/{name}": accuracy.estimate,
        f"accuracy/{name}/low": accuracy.low,
        f"accuracy/{name}/high": accuracy.high,
        f"reward/{name}": evaluation.reward,
    }
