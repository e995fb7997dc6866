"""The loop, and nothing but the loop."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from rlora import checkpoint, cluster
from rlora.config import Config
from rlora.delivery import swap
from rlora.evaluate import evaluate
from rlora.learner import refuse_to_go_on
from rlora.metrics import Metrics
from rlora.records import Sampling
from rlora.rollout import Collection, collect, prompts_of_step
from rlora.task import Task


def train(config: Config, task: Task, run: Path) -> None:
    """prompts -> groups -> rewards -> advantages -> adapter -> swap. That is the whole framework.

    `run` is the directory that `checkpoint.create` made; a run goes on from the last version in it. What the loop
    leaves there: metrics.jsonl, a line a step; adapters/<version>/, in PEFT's format; state.safetensors, to go on
    from; summary.json.
    """
    sampling = Sampling(config.sampling.max_tokens, config.sampling.temperature, config.group_size)
    start = checkpoint.last_version(run) or 0
    with (
        checkpoint.keeping_unscored(run),
        Metrics(run / "metrics.jsonl", config.steps) as metrics,
        cluster.start(config, task, run.name, start) as (learner, engines),
        _background() as background,
    ):
        state = checkpoint.read_state(run)  # None in a fresh run
        adapter = learner.resume(state) if state else learner.adapter()

        def collecting(step: int) -> Future[Collection]:
            prompts = prompts_of_step(task.prompts, step, config.prompts_per_step, config.seed)
            return background.submit(collect, task, engines, prompts, sampling, adapter.version)

        def measure(when: str) -> None:
            if not task.held_out:
                return
            swap(engines, adapter)
            result = evaluate(config, task, engines, adapter.version)
            figures = {f"accuracy/{when}": result.accuracy, f"reward/{when}": result.reward}
            checkpoint.summarise(run, figures | {"accuracy/prompts": len(task.held_out)})

        if adapter.version == 0:  # the base, or what learner.start_from names
            checkpoint.save(run, adapter, learner.state())
            measure("before")

        metrics.start(adapter.version)
        steps = iter(range(adapter.version, config.steps))
        pending: deque[Future[Collection]] = deque()  # collections in flight
        for step in range(adapter.version, config.steps):
            with metrics.timed("swap"):
                swap(engines, adapter, config.max_staleness)
            # max_staleness 0 is on policy: one in flight. 1 samples the next one while the learner updates.
            for ahead in islice(steps, config.max_staleness + 1 - len(pending)):
                pending.append(collecting(ahead))
            with metrics.timed("wait"):
                collection = pending.popleft().result()
            with metrics.timed("update"):
                adapter, update = learner.update(collection.groups)
            metrics.log(step, collection, update)
            with metrics.timed("save"):
                checkpoint.save(run, adapter, learner.state())
            refuse_to_go_on(config, update)
        measure("after")
        checkpoint.summarise(run, checkpoint.describe(run, adapter) | metrics.totals())


@contextmanager
def _background() -> Iterator[ThreadPoolExecutor]:
    """A thread to collect in. On leaving, what is queued is dropped and what runs is not waited for."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
