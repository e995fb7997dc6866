"""Reward of a verifiers task (0.4, `verifiers.v1`): the task's own reward functions, run on a single-turn trace."""

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


async def rubric(
    completion: str, taskset: str, taskset_config: Mapping[str, Any], task: Mapping[str, Any],
    prompt: str | Sequence[Mapping[str, str]],
) -> dict[str, float]:  # fmt: skip
    """Run the task's own reward functions. Returns their weighted sum as "score", and each reward under its name.

    The arguments after `completion` are the columns of `rlora.envs.verifiers_env:Verifiers`, and the prompt. Exceptions
    of the task's functions propagate.
    """
    vf = importlib.import_module("verifiers.v1")
    graph = importlib.import_module("verifiers.v1.graph")
    trace_module = importlib.import_module("verifiers.v1.trace")
    task_class, config = _load_task_class(taskset, json.dumps(dict(taskset_config), sort_keys=True))
    scored_task = task_class(task_class.data_type().model_validate(task), config)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    messages.append({"role": "assistant", "content": completion})
    nodes = [
        graph.MessageNode.model_validate(
            {"message": message, "parent": index - 1 if index else None, "sampled": index == len(messages) - 1}
        )
        for index, message in enumerate(messages)
    ]
    trace = vf.Trace(
        task=trace_module.TraceTask(type=task_class.__name__, data=scored_task.data),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=nodes,
        is_completed=True,
        ok=True,
    )
    await scored_task.score(trace)
    parts = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
    return {"score": trace.reward, **parts}


@functools.cache
def _load_task_class(taskset: str, config: str) -> tuple[Any, Any]:
    """Return the task class of a taskset, and the config of its tasks. `config` is the taskset's config as JSON."""
    loaders = importlib.import_module("verifiers.v1.utils.loaders")
    generic = importlib.import_module("verifiers.v1.utils.generic")
    configs = importlib.import_module("verifiers.v1.configs.taskset")
    taskset_class = loaders.taskset_class(taskset)
    config_class = generic.concrete_type(taskset_class, configs.TasksetConfig) or configs.TasksetConfig
    return taskset_class.task_type(), config_class(id=taskset, **json.loads(config)).task
