"""The steps of training as separate functions: sample, forward_backward, optim_step, save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

from rlora.records import Adapter, Group, Prompt, RloraError, UpdateStats
from rlora.run.source import Source, reachable, resolve_config
from rlora.store import names, read_file, write_directory

if TYPE_CHECKING:  # these modules import torch and Ray
    from torch import Tensor

    from rlora.cluster.ranks import Ranks
    from rlora.core.batch import Sample
    from rlora.core.learner import ForwardBackwardOutput, Groups
    from rlora.core.objectives.objective import Loss
    from rlora.core.optimizer import Adam, StepStats
    from rlora.core.setup import Setup
    from rlora.rollout.fleet import Fleet
    from rlora.rollout.player import AgentLoop
    from rlora.rollout.task import ServedPolicy

_STATE = "state.safetensors"


@contextmanager
def policy(config: Source = None, *, resume: str | PathLike[str] | None = None, **changes: Any) -> Iterator[Policy]:
    """A policy to sample from and to train step by step. Its learner and engines are closed with the context.

    `config` and `changes` are as in `rlora.train`, but only `model` is required: `sample` takes prompts as arguments,
    and without a reward function episodes have no reward. `resume` is a directory that `Policy.save` wrote; training
    continues from it. Raises RloraError.
    """
    with policies(config, {"policy": changes}, {"policy": resume} if resume else {}) as opened:
        yield opened["policy"]


@contextmanager
def policies(
    config: Source, members: Mapping[str, Mapping[str, Any]], resume: Mapping[str, str | PathLike[str]] | None = None
) -> Iterator[Mapping[str, Policy]]:
    """Several policies over one base, by name. `members` maps each name to the fields that differ from `config`;
    `resume` maps names to directories that `Policy.save` wrote. Raises RloraError."""
    from rlora import cluster

    resume = resume or {}
    if unknown := resume.keys() - members.keys():
        raise RloraError(f"resume = {sorted(unknown)}: the policies are {', '.join(members)}; name one of those")
    configs = {
        name: resolve_config(config, changes, defaults={"env": "", "reward": ""}) for name, changes in members.items()
    }
    with ExitStack() as stack:
        stack.enter_context(cluster.starting(*configs.values()))  # while this process imports torch and loads the tasks
        from rlora.rollout.task import ServedPolicy
        from rlora.run.prepare import load_and_check

        prepared: list[tuple[ServedPolicy, Setup, bytes | None]] = []
        for name, member in configs.items():
            task, setup = load_and_check(member)
            saved = _read_state(resume[name], setup) if name in resume else None
            prepared.append((ServedPolicy(name, member, task), setup, saved))
        job = stack.enter_context(cluster.start([served for served, *_ in prepared]))
        learners, fleet, agent_loops = job.learners, job.fleet, job.loops
        yield {
            served.policy: Policy(served, learners[served.policy], fleet, agent_loops[served.policy], setup, saved)
            for served, setup, saved in prepared
        }


class Policy:
    """The frozen base with one adapter in training. `policy` and `policies` construct it."""

    def __init__(
        self,
        served: ServedPolicy,
        learner: Ranks,
        fleet: Fleet,
        loop: AgentLoop,
        setup: Setup,
        saved: bytes | None = None,
    ) -> None:
        self.name, self.config, self.task = served.policy, served.config, served.task
        self._learner, self._fleet, self._loop = learner, fleet, loop
        self._adapter: Adapter = learner.open(self.name, setup, saved)
        self._stepped = False  # whether `optim_step` has changed the adapter since the current version
        self._delivered: Adapter | None = None  # the version that the engines serve

    @property
    def adapter(self) -> Adapter:
        """The current version. After `optim_step`, a new one."""
        if self._stepped:
            self._adapter, self._stepped = self._learner.next_version(self.name), False
        return self._adapter

    def sample(
        self, prompts: Sequence[Prompt | str], group_size: int | None = None, temperature: float | None = None
    ) -> list[Group]:
        """Sample `group_size` completions per prompt under the current version, and score them.

        A new version is first delivered to every engine and verified. A `temperature` other than the config's is for
        evaluation only (0 is greedy), since the learner computes with the config's.
        """
        from rlora.rollout.evaluate import answer
        from rlora.rollout.stream import sampling_of

        adapter, tokenised = self.adapter, self._tokenise(prompts)
        if adapter is not self._delivered:
            self._fleet.swap(adapter, oldest=adapter.number)
            self._delivered = adapter
        sampling = sampling_of(self.config, group_size or self.config.group_size, temperature)
        return answer(self.config, tokenised, sampling, self._fleet, self._loop)

    def samples(self, group: Group, advantages: Sequence[float]) -> list[Sample]:
        """Training samples of a group, one advantage per episode. Skips episodes without sampled tokens."""
        from rlora.core.batch import sample_of

        pairs = zip(group.episodes, advantages, strict=True)
        return [
            sample_of(group.prompt.token_ids, episode, advantage)
            for episode, advantage in pairs
            if episode.sampled_tokens
        ]

    def forward(self, groups: Groups, reference: bool = False) -> list[list[Tensor]]:
        """Logprobs of each sample's C targets, (C,) float32 per sample, under the policy or the reference policy."""
        return self._learner.forward(self.name, groups, reference)

    def forward_backward(self, groups: Groups, loss: Loss) -> ForwardBackwardOutput:
        """Accumulate the gradient of `loss` over the samples, until the next `optim_step`.

        `loss(outputs, microbatch)` returns a sum over the microbatch's C targets, and a dict of metrics, (C,) each.
        The samples of a group share a prompt, which is computed once.
        """
        return self._learner.forward_backward(self.name, groups, loss)

    def optim_step(self, adam: Adam) -> StepStats:
        """Take one step of Adam with these settings, along the accumulated gradient."""
        self._stepped = True
        return self._learner.optim_step(self.name, adam)

    def update(self, groups: Sequence[Group]) -> UpdateStats:
        """Update the policy with the config's algorithm on scored groups, like one step of `rlora.train`."""
        if any(episode.reward is None for group in groups for episode in group.episodes):
            raise RloraError("update: an episode has no reward; set `reward` in the config, or use Group.with_rewards")
        self._adapter, stats = self._learner.update(self.name, groups)
        self._stepped = False
        return stats

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the adapter in PEFT's format, with the learner's state for `resume`.

        Raises RloraError if the directory contains any other file.
        """
        path = reachable(str(directory))
        files = self.adapter.files | {_STATE: self._learner.state(self.name)}
        if foreign := sorted(set(names(path)) - files.keys()):
            raise RloraError(f"{path}: it contains {', '.join(foreign[:3])}; name a directory for the adapter alone")
        write_directory(path, files)

    def _tokenise(self, prompts: Sequence[Prompt | str]) -> list[Prompt]:
        from rlora.rollout.task import tokenise

        if isinstance(prompts, str):
            raise RloraError(f"prompts = {prompts!r}: pass a list of prompts")
        limit = self.config.sampling.max_prompt_tokens
        records = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
        results = [tokenise([prompt], self.task.chat, limit) for prompt in records]
        for prompt, tokenised in zip(records, results, strict=True):
            if not tokenised:
                raise RloraError(
                    f"prompt {prompt.text!r}: it has no token, or more than sampling.max_prompt_tokens = {limit}; "
                    "raise that, or shorten the prompt"
                )
        return [prompt for (prompt,) in results]


def _read_state(directory: str | PathLike[str], setup: Setup) -> bytes:
    """The learner's state that `Policy.save` wrote. Raises RloraError if it is missing or the adapter differs."""
    from rlora.core.peft_format import decode
    from rlora.run.start import check_same_adapter, read

    path = reachable(str(directory))
    state = read_file(path / _STATE)
    if state is None:
        raise RloraError(f"resume = {str(path)!r}: {_STATE} is missing; name a directory that Policy.save wrote")
    check_same_adapter(f"resume = {str(path)!r}", decode(*read(path))[0], setup.learner)
    return state
