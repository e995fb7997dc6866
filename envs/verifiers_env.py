"""Single-turn tasksets of verifiers (Prime Intellect; version 0.4, `verifiers.v1`). Needs the extra `verifiers`."""

import importlib
import inspect
import random
from collections.abc import Iterator, Sequence
from typing import Any

from rlora.records import Prompt, RloraError


class Verifiers:
    """The tasks of the installed taskset `taskset`. `held_out_share` of the tasks, selected by `seed`, are held out.

    All other arguments go to the taskset's config. `limit` is the number of tasks to use, 0 for all; an infinite
    taskset needs a limit. Only single-turn tasks are supported: tasks that need tools or containers are an error.
    Reward: `rlora.rewards.verifiers_rubric:rubric`, which runs the task's reward functions. Columns for rewards:
    `taskset`, `taskset_config` and `task`, a dict with the task's data.
    """

    def __init__(self, taskset: str, held_out_share: float = 0.1, seed: int = 0, limit: int = 0, **config: Any) -> None:
        if not 0 <= held_out_share < 1:
            raise RloraError(f"env_args.held_out_share = {held_out_share}: use a number from 0 to less than 1")
        self._taskset, self._config = taskset, config
        self._share, self._seed, self._limit = held_out_share, seed, limit

    def train(self) -> Sequence[Prompt]:
        prompts = self._prompts()
        return prompts[round(len(prompts) * self._share) :]

    def held_out(self) -> Sequence[Prompt]:
        prompts = self._prompts()
        return prompts[: round(len(prompts) * self._share)]

    def _prompts(self) -> list[Prompt]:
        prompts = list(self._load())
        random.Random(self._seed).shuffle(prompts)
        return prompts

    def _load(self) -> Iterator[Prompt]:
        try:
            loaders = importlib.import_module("verifiers.v1.utils.loaders")
            generic = importlib.import_module("verifiers.v1.utils.generic")
            configs = importlib.import_module("verifiers.v1.configs.taskset")
        except ImportError as error:
            raise RloraError(
                f"env: rlora.envs.verifiers_env needs verifiers 0.4, which can't be imported ({error}); run "
                "pip install 'rlora[verifiers]'"
            ) from error
        try:
            taskset_class = loaders.taskset_class(self._taskset)
            config_class = generic.concrete_type(taskset_class, configs.TasksetConfig) or configs.TasksetConfig
            taskset = taskset_class(config_class(id=self._taskset, **self._config))
        except Exception as error:  # raised by the taskset's package or by its config
            raise RloraError(
                f"env_args.taskset = {self._taskset!r}: it can't be loaded ({error}); install the taskset's package, "
                "or correct the taskset's arguments in env_args"
            ) from error
        if not taskset.bounded and not self._limit:
            raise RloraError(
                f"env_args.limit = 0: {self._taskset} is infinite; set env_args.limit to the number of tasks to use"
            )
        if taskset_class.toolsets(taskset.config):
            raise RloraError(
                f"env_args.taskset = {self._taskset!r}: its tasks need tools, which are not supported; use a taskset "
                "of single-turn tasks without tools"
            )
        for task in taskset.take(self._limit) if self._limit else taskset:
            if (
                task.NEEDS_CONTAINER
                or task.toolsets(task.config)
                or task.data.prompt is None
                or any("runtime" in inspect.signature(reward).parameters for reward in task.hooks("reward"))
            ):
                raise RloraError(
                    f"env_args.taskset = {self._taskset!r}: task {task.data.idx} needs a container, tools or a user; "
                    "only single-turn tasks are supported, so use a different taskset"
                )
            data = task.data.model_dump(mode="json")
            columns = {"taskset": self._taskset, "taskset_config": self._config, "task": data}
            yield Prompt(_messages(data), answer=data.get("answer"), columns=columns)


def _messages(data: dict[str, Any]) -> list[dict[str, str]]:
    system, prompt = data.get("system_prompt"), data["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    system_turns = [{"role": "system", "content": system}] if system else []
    return system_turns + [{"role": turn["role"], "content": turn["content"]} for turn in turns]
