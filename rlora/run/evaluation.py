"""Evaluates a run on held-out prompts: before and after training, and every so many steps beside it."""

from collections.abc import Callable

from upath import UPath

from rlora.records import Adapter, RewardError, RloraError
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

    def __init__(
        self, config: Config, place: UPath, task: Task, fleet: Fleet, loop: AgentLoop, tell: Callable[[str], None]
    ) -> None:
        self.config, self.place, self.sets, self.fleet, self._tell = config, place, task.sets, fleet, tell
        self._evaluations = Evaluations(config, task.sets, fleet, loop)
        self._known = {line.get("accuracy/version") for line in directory.figures(place)}
        self._before: Figures = {}  # of the version that training begins with, for the line of the first step
        self._failure: RewardError | None = None

    @property
    def version(self) -> int | None:
        """The number of the version that is being evaluated; engines have to hold it."""
        return self._evaluations.version

    def begin(self, adapter: Adapter) -> None:
        """Evaluate the version that training begins with, and wait for it. A resume takes it from the summary."""
        known = directory.summary(self.place)
        if any(f"accuracy/{_at(name, 'before')}/low" not in known for name in self.sets):
            self._measure("before", adapter)
            known = directory.summary(self.place)
        if self.config.evaluate.every and self.sets:
            self._before = {"accuracy/version": adapter.number}
            for name in self.sets:
                of_set = _at(name, "before")
                accuracy = {f"accuracy/{name}{end}": known[f"accuracy/{of_set}{end}"] for end in ("", "/low", "/high")}
                self._before |= accuracy | {f"accuracy/{name}/reward": known[f"reward/{of_set}"]}

    def end(self, adapter: Adapter) -> None:
        """Evaluate the last version, and wait for it."""
        if self.sets:
            self._measure("after", adapter)

    def resume(self, number: int) -> None:
        """Start again what a death ended: the evaluation of the newest version up to `number` that is due for one."""
        due = number // self.config.evaluate.every * self.config.evaluate.every if self.config.evaluate.every else 0
        if not (due < number and self._is_due(due) and due in versions(self.place)):
            return
        try:
            adapter = read(bundle_path(self.place, due)).adapter
        except RloraError as error:  # the newest bundle is whole, and what is damaged here is no reason to stop
            directory.warn(f"version {due} is not evaluated: {error}")
            return
        self._evaluations.start(adapter)

    def start(self, adapter: Adapter) -> None:
        """Have a version evaluated beside training, if one is due."""
        if self._is_due(adapter.number):
            self._evaluations.start(adapter)

    def figures(self, number: int) -> Figures:
        """Return what an evaluation came to that has ended since, that of `begin` first; nothing where none has.

        It waits for one that has not, where `number`, the version that was just made, is due or the last one.
        """
        version = self.version
        waits = self._is_due(number) or number >= self.config.steps
        if version is None or not (waits or self._evaluations.is_ready):
            before, self._before = self._before, {}
            return before
        found: Figures = {"accuracy/version": version}
        try:
            for name, evaluation in self._evaluations.result().items():
                found |= _accuracy(name, evaluation) | {f"accuracy/{name}/reward": evaluation.reward}
                self._tell(f"version {version}: {_told(name, evaluation)}")
        except RewardError as error:
            self._failure = error
            return {}
        self._known.add(version)
        directory.summarise(self.place, found)
        return found

    def refuse(self) -> None:
        """Raise RewardError where the reward functions have failed in an evaluation."""
        if self._failure:
            raise self._failure

    def _measure(self, when: str, adapter: Adapter) -> None:
        self.fleet.swap(adapter)
        self._evaluations.start(adapter, background=False)
        found: Figures = {}
        for name, evaluation in self._evaluations.result().items():
            found |= _accuracy(_at(name, when), evaluation) | {f"reward/{_at(name, when)}": evaluation.reward}
            self._tell(f"{when} training: {_told(name, evaluation)}")
        prompts = {"accuracy/prompts": len(self.sets[HELD_OUT])} if HELD_OUT in self.sets else {}
        directory.summarise(self.place, found | prompts)

    def _is_due(self, number: int) -> bool:
        every = self.config.evaluate.every
        is_due = every > 0 and number % every == 0 and 0 < number < self.config.steps
        return bool(is_due and self.sets and number not in self._known and number != self.version)


def _at(name: str, when: str) -> str:
    """What the summary calls a set before or after training."""
    return when if name == HELD_OUT else f"{name}/{when}"


def _told(name: str, evaluation: Evaluation) -> str:
    what = "held-out prompts" if name == HELD_OUT else f"prompts of evaluate.sets.{name}"
    return f"accuracy {evaluation.accuracy} on {what}"


def _accuracy(name: str, evaluation: Evaluation) -> Figures:
    accuracy = evaluation.accuracy
    return {
        f"accuracy/{name}": accuracy.estimate,
        f"accuracy/{name}/low": accuracy.low,
        f"accuracy/{name}/high": accuracy.high,
    }
