"""The loop, and nothing but the loop."""

from upath import UPath

from rlora import cluster
from rlora.core.setup import Setup
from rlora.records import Cursor
from rlora.rollout.evaluate import evaluate
from rlora.rollout.stream import Rollouts
from rlora.rollout.task import Task
from rlora.run import directory
from rlora.run.checkpoint import Bundle
from rlora.run.health import refuse_to_go_on
from rlora.run.resume import cursor_for, describe
from rlora.run.start import read_start
from rlora.run.writer import Saver
from rlora.settings import Config
from rlora.telemetry.metrics import Metrics


def train(config: Config, task: Task, run: UPath, start: Bundle | None = None) -> None:
    """prompts -> groups -> rewards -> advantages -> adapter -> swap. That is the whole framework.

    `run` is the directory that `directory.create` made, `start` the bundle to go on from. What the loop leaves there:
    bundles/<version>/, all that a run goes on from, with its adapter in PEFT's format; metrics.jsonl, a line a step;
    summary.json.
    """
    origin = directory.Origin.here(run, task)
    version = start.version if start else 0
    with (
        directory.keeping_unscored(run),
        Saver(run, config, origin, start) as saver,
        cluster.start(config, task, run.name, version) as (learner, fleet, loop),
        Metrics(config.steps) as metrics,
    ):
        setup, policy = Setup.of(config, read_start(config)), run.name
        adapter = learner.open(policy, setup, start.state if start else None)

        def measure(when: str) -> None:
            if not task.held_out:
                return
            fleet.swap(adapter)
            result = evaluate(config, task.held_out, fleet, loop)
            figures = {f"accuracy/{when}": result.accuracy, f"reward/{when}": result.reward}
            directory.summarise(run, figures | {"accuracy/prompts": len(task.held_out)})

        directory.keep_config(run, config)  # now that all of it is found to work
        if not start:
            saver.save(adapter, learner.state(policy), Cursor())
        if adapter.number == origin.first and "accuracy/before" not in directory.summary(run):
            measure("before")

        cursor = cursor_for(config, start, origin) if start else Cursor()
        rollouts = Rollouts(config, task.prompts, fleet, loop, cursor)
        metrics.start(adapter.number, fleet.stats())
        for step in range(adapter.number, config.steps):
            fleet.resize(directory.wanted_engines(run) or config.engine.replicas)
            with metrics.timed("swap"):
                proofs = fleet.swap(adapter, oldest=adapter.number - config.max_staleness)
            # max_staleness 0 is on policy; 1 has the next step's prompts sampled while the learner updates
            with metrics.timed("wait"):
                collection = rollouts.take(adapter.number)
            with metrics.timed("update"):
                adapter, update = learner.update(policy, collection.groups)
            line = metrics.log(step, proofs, collection, update, fleet.stats(), saver.saved, adapter)
            with metrics.timed("save"):  # begins to; the next step goes on meanwhile
                saver.save(adapter, learner.state(policy), rollouts.cursor, collection, line)
            refuse_to_go_on(config, update)
        measure("after")
        directory.summarise(run, describe(run, adapter) | metrics.totals())
