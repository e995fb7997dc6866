"""The loop, and nothing but the loop."""

from collections.abc import Sequence

from rlora import cluster
from rlora.run.run import Run, kept
from rlora.run.turns import Turns, rounds


def drive(runs: Sequence[Run], turns: Turns = rounds) -> None:
    """prompts -> groups -> rewards -> advantages -> adapter -> swap. That is the whole framework.

    Each run has a policy of its own. Several share the base, the engines and the turns, and nothing else: what fails in
    one ends that one, and is raised once the others are at their end.
    """
    with kept(runs), cluster.start(runs) as (learner, fleet, loops):
        for run in runs:
            with run.alone():
                run.begin(learner, fleet, loops[run.policy])
        for due in turns(runs):  # of one run: that one, every time
            for run in due:
                with run.alone():
                    collection = run.take()
                    with run.timed("update"):
                        adapter, update = learner.update(run.policy, collection.groups)
                    run.keep(adapter, collection, update)  # written meanwhile
            for run in due:
                if run.going:
                    with run.alone():
                        run.serve()  # proven on every engine; max_staleness 0 is on policy, 1 samples a step ahead
        for run in runs:
            if not run.failure:
                with run.alone():
                    run.end()
