"""Turn rules: which runs take the next step if several share the learner. A turn is one step of some of the runs."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait

from rlora.run.run import Run

Turns = Callable[[Sequence[Run]], Iterator[Sequence[Run]]]  # from the job's runs to those of each turn


def active(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that have steps left and have not failed."""
    return [run for run in runs if run.is_active]


def updated(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose version is to be delivered: those that have not failed and have not left the job."""
    return [run for run in runs if run.is_open]


def ended(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that have done their last step and have not ended yet."""
    return [run for run in runs if run.is_done]


def rounds(runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
    """Yield all active runs together: engines sample for all runs at once, then the learner updates each run."""
    while remaining := active(runs):
        yield remaining


def first(runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
    """Yield the runs whose groups are complete, at most `learner.concurrent`, those with the fewest steps first.

    Blocks while no run has its groups. Engines sample for the remaining runs during an update, as in asynchronous
    training, but every run stays on policy if its `max_staleness` is 0.
    """
    last_result = time.monotonic()
    while remaining := active(runs):
        due = [run for run in remaining if run.due]
        if due:
            count = due[0].config.learner.concurrent
            yield sorted(due, key=lambda run: run.number)[:count]
            last_result = time.monotonic()
            continue
        pending = [future for run in remaining for future in run.stream.pending]
        completed, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
        now = time.monotonic()
        if completed:
            last_result = now
        elif now - last_result > remaining[0].config.engine.patience:
            with remaining[0].isolated():
                remaining[0].fleet.check()  # an engine may hang
            last_result = now
