"""Which runs are due: the order in which several share the learner."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait

from rlora.run.run import Run

Turns = Callable[[Sequence[Run]], Iterator[Sequence[Run]]]


def going(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that have steps left and have not failed."""
    return [run for run in runs if run.going]


def updated(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose version is to be delivered: all but those that have failed or are left."""
    return [run for run in runs if run.is_here]


def ended(runs: Sequence[Run]) -> list[Run]:
    """Return the runs that have done their last step, and are not ended yet."""
    return [run for run in runs if run.is_done]


def rounds(runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
    """All that are going, together: engines have every run's prompts at once, then the learner has the machine."""
    while left := going(runs):
        yield left


def first(runs: Sequence[Run]) -> Iterator[Sequence[Run]]:
    """Those whose groups are there, as many as learners work at the same time; the run with the fewest steps first.

    Engines sample for the others while the learner has one: the throughput of asynchronous training, on policy.
    """
    heard = time.monotonic()
    while left := going(runs):
        due = [run for run in left if run.due]
        if due:
            at_once = due[0].config.learner.concurrent
            yield sorted(due, key=lambda run: run.number)[:at_once]
            heard = time.monotonic()
            continue
        came, _ = wait([each for run in left for each in run.stream.coming], timeout=1.0, return_when=FIRST_COMPLETED)
        now = time.monotonic()
        if came:
            heard = now
        elif now - heard > left[0].config.engine.patience:
            with left[0].alone():
                left[0].fleet.check()  # an engine may hang
            heard = now
