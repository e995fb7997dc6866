"""What ends a run that can't go on."""

from rlora.records import RloraError, UpdateStats
from rlora.settings import Config


def refuse_to_go_on(config: Config, update: UpdateStats) -> None:
    """Raise RloraError after `learner.max_bad_updates` skipped updates in a row."""
    if update.skipped_in_a_row >= config.learner.max_bad_updates:
        raise RloraError(
            f"learner: {update.skipped_in_a_row} updates in a row had a non-finite loss or gradient ({update}); the "
            'adapter is as it was before them. Lower learner.lr or use dtype = "float32"'
        )
