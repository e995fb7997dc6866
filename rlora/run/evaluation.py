"""Evaluates a run on held-out prompts: before and after training, and every so many steps beside it."""

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

Figures = dict[str, float | None]


class HeldOut:
    """The sets of held-out prompts of a run, and which of its versions they were tried on.

    Evaluated are the version `first` that training begins with, the last one, and one every `evaluate.every` steps; all
    of them beside what else the engines do. What comes of it stands in the summary, and in the line of the step in
    which the evaluation ended.
    """

    def __init__(
        self, config: Config, place: UPath, task: Task, first: int, fleet: Fleet, loop: AgentLoop,
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.config, self.place, self.sets, self.first, self._tell = config, place, task.sets, first, tell
        self._evaluations = Evaluations(config, task.sets, fleet, loop)
        self._known = {line.get("accuracy/version") for line in directory.figures(place)}
        self._failure: RewardError | None = None

    @property
    def version(self) -> int | None:
        """The number of the version that is being evaluated; engines have to hold it."""
        return self._evaluations.version

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
        """Have a version evaluated, if it is due: the first and the last one before what else is sampled."""
        number = adapter.number
        is_first = number == self.first and not self._before()
        if self.sets and (is_first or number >= self.config.steps):
            self._evaluations.start(adapter, background=False)
        elif self._is_due(number):
            self._evaluations.start(adapter)

    def figures(self, number: int) -> Figures:
        """Return what an evaluation came to that has ended since; nothing where none has.

        It waits for one that has not, where `number`, the version that was just made, is due or the last one, and for
        that of the first version.
        """
        version = self.version
        if version is None:
            return self._line_of_first() if number == self.first + 1 else {}
        waits = self._is_due(number) or number >= self.config.steps or version == self.first
        if not (waits or self._evaluations.is_ready):
            return {}
        if version == self.first:
            self._summarise("before")
            return self._line_of_first()
        found = self._result(f"version {version}", str)
        if found:
            found = {"accuracy/version": version} | found
            self._known.add(version)
            directory.summarise(self.place, found)
        return found

    def refuse(self) -> None:
        """Raise RewardError where the reward functions have failed in an evaluation."""
        if self._failure:
            raise self._failure

    def end(self) -> None:
        """Wait for the evaluation of the last version. Raises RewardError."""
        if self.version is not None:
            self._summarise("after" if self.version >= self.config.steps else "before")
            self.refuse()

    def _summarise(self, when: str) -> None:
        if found := self._result(f"{when} training", partial(_at, when=when)):
            prompts = {"accuracy/prompts": len(self.sets[HELD_OUT])} if HELD_OUT in self.sets else {}
            directory.summarise(self.place, found | prompts)

    def _result(self, what: str, called: Callable[[str], str]) -> Figures:
        """The figures of each set, `called` by its name; none where the reward functions have failed."""
        found: Figures = {}
        try:
            evaluations = self._evaluations.result()
        except RewardError as error:
            self._failure = error
            return {}
        for name, evaluation in evaluations.items():
            accuracy, of = evaluation.accuracy, called(name)
            found |= {
                f"accuracy/{of}": accuracy.estimate,
                f"accuracy/{of}/low": accuracy.low,
                f"accuracy/{of}/high": accuracy.high,
                (f"accuracy/{of}/reward" if of == name else f"reward/{of}"): evaluation.reward,
            }
            which = "held-out prompts" if name == HELD_OUT else f"prompts of evaluate.sets.{name}"
            self._tell(f"{what}: accuracy {accuracy} on {which}")
        return found

    def _line_of_first(self) -> Figures:
        """The accuracy before training, for the line of the first step; a resume takes it from the summary."""
        known = self._before()
        if not (self.config.evaluate.every and self.sets and known):
            return {}
        line: Figures = {"accuracy/version": self.first}
        for name in self.sets:
            of = _at(name, "before")
            line |= {f"accuracy/{name}{end}": known[f"accuracy/{of}{end}"] for end in ("", "/low", "/high")}
            line[f"accuracy/{name}/reward"] = known[f"reward/{of}"]
        return line

    def _before(self) -> Figures:
        """The summary, once it has the accuracy before training of every set."""
        known = directory.summary(self.place)
        return known if all(f"accuracy/{_at(name, 'before')}/low" in known for name in self.sets) else {}

    def _is_due(self, number: int) -> bool:
        every = self.config.evaluate.every
        is_due = every > 0 and number % every == 0 and 0 < number < self.config.steps
        return bool(is_due and self.sets and number not in self._known and number != self.version)


def _at(name: str, when: str) -> str:
    """What the summary calls a set before or after training."""
    return when if name == HELD_OUT else f"{name}/{when}"
