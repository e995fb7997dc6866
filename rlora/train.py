"""The loop, and nothing but the loop."""

from pathlib import Path

from rlora import checkpoint, cluster
from rlora.config import Config
from rlora.evaluate import evaluate
from rlora.learner import refuse_to_go_on
from rlora.metrics import Metrics
from rlora.rollout import Rollouts, first_cursor
from rlora.task import Task


def train(config: Config, task: Task, run: Path) -> None:
    """prompts -> groups -> rewards -> advantages -> adapter -> swap. That is the whole framework.

    `run` is the directory that `checkpoint.create` made; a run goes on from the last version in it. What the loop
    leaves there: metrics.jsonl, a line a step; adapters/<version>/, in PEFT's format; state.safetensors and
    cursor.json, to go on from; summary.json.
    """
    start = checkpoint.last_version(run) or 0
    with (
        checkpoint.keeping_unscored(run),
        Metrics(run / "metrics.jsonl", config.steps) as metrics,
        cluster.start(config, task, run.name, start) as (learner, fleet, loop),
    ):
        state = checkpoint.read_state(run)  # None in a fresh run
        adapter = learner.resume(state) if state else learner.adapter()

        def measure(when: str) -> None:
            if not task.held_out:
                return
            fleet.swap(adapter)
            result = evaluate(config, task.held_out, fleet, loop)
            figures = {f"accuracy/{when}": result.accuracy, f"reward/{when}": result.reward}
            checkpoint.summarise(run, figures | {"accuracy/prompts": len(task.held_out)})

        if adapter.version == 0:  # the base, or what learner.start_from names
            checkpoint.save(run, adapter, learner.state())
            measure("before")

        metrics.start(adapter.version, fleet.stats())
        cursor = checkpoint.read_cursor(run, adapter.version)  # None in a fresh run
        rollouts = Rollouts(config, task.prompts, fleet, loop, cursor or first_cursor(config, adapter.version))
        for step in range(adapter.version, config.steps):
            fleet.resize(checkpoint.wanted_engines(run) or config.engine.replicas)
            with metrics.timed("swap"):
                proofs = fleet.swap(adapter)
            # max_staleness 0 is on policy; 1 has the next step's prompts sampled while the learner updates
            with metrics.timed("wait"):
                collection = rollouts.take(adapter.version)
            with metrics.timed("update"):
                adapter, update = learner.update(collection.groups)
            metrics.log(step, proofs, collection, update, fleet.stats())
            with metrics.timed("save"):
                checkpoint.save(run, adapter, learner.state(), rollouts.cursor)
            refuse_to_go_on(config, update)
        measure("after")
        checkpoint.summarise(run, checkpoint.describe(run, adapter) | metrics.totals())
