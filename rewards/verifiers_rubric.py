"""The reward of a verifiers task (0.4, `verifiers.v1`): its own reward functions, on a trace of one turn."""

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


async def rubric(
    completion: str, taskset: str, taskset_config: Mapping[str, Any], task: Mapping[str, Any],
    prompt: str | Sequence[Mapping[str, str]],
) -> dict[str, float]:  # fmt: skip
    """The weighted sum of the task's rewards as "score", and each of them by its name."""
    vf = importlib.import_module("verifiers.v1")
    graph = importlib.import_module("verifiers.v1.graph")
    trace_module = importlib.import_module("verifiers.v1.trace")
    kind, config = _loaded(taskset, json.dumps(dict(taskset_config), sort_keys=True))
    made = kind(kind.data_type().model_validate(task), config)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    turns.append({"role": "assistant", "content": completion})
    nodes = [
        graph.MessageNode.model_validate(
            {"message": turn, "parent": number - 1 if number else None, "sampled": number == len(turns) - 1}
        )
        for number, turn in enumerate(turns)
    ]
    trace = vf.Trace(
        task=trace_module.TraceTask(type=kind.__name__, data=made.data),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
        is_completed=True,
        ok=True,
    )
    await made.score(trace)
    parts = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
    return {"score": trace.reward, **parts}


@functools.cache
def _loaded(taskset: str, config: str) -> tuple[Any, Any]:
    """The class of a taskset's tasks, and their config."""
    loaders = importlib.import_module("verifiers.v1.utils.loaders")
    generic = importlib.import_module("verifiers.v1.utils.generic")
    configs = importlib.import_module("verifiers.v1.configs.taskset")
    kind = loaders.taskset_class(taskset)
    form = generic.concrete_type(kind, configs.TasksetConfig) or configs.TasksetConfig
    return kind.task_type(), form(id=taskset, **json.loads(config)).task
