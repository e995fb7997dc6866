"""Gives each step its examples from a data set, where algorithms that sample have `Rollouts`."""

from collections.abc import Sequence
from concurrent.futures import Future

from rlora.records import Group
from rlora.rollout.cursor import Cursor
from rlora.rollout.stream import Collection, prompt_at
from rlora.settings import Config


class Examples:
    """Gives each step `prompts_per_step` examples: groups whose completions are given. Has the methods of `Rollouts`,
    and nothing is in flight between two steps.

    `groups` are the examples in the order of the data set; each epoch visits all of them in another order.
    """

    def __init__(self, config: Config, groups: Sequence[Group], cursor: Cursor) -> None:
        self.config, self.groups, self._next = config, groups, cursor.next

    @property
    def cursor(self) -> Cursor:
        """State from which another process can resume."""
        return Cursor(self._next)

    @property
    def pending(self) -> list[Future[Group]]:
        """Futures of groups that have not arrived: none."""
        return []

    @property
    def due(self) -> bool:
        """Whether `take` would not block: always True."""
        return True

    def send(self, version: int) -> None:
        """Do nothing, because no prompt is sampled."""

    def take(self, version: int) -> Collection:
        """Return the examples of the step that updates `version`. Does not block."""
        positions = range(self._next, self._next + self.config.prompts_per_step)
        self._next = positions.stop
        chosen = [prompt_at(self.groups, position, self.config.seed) for position in positions]
        return Collection(tuple(chosen), (), 0.0, late=0, stale=0)
