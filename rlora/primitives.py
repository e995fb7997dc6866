"""The steps of training as separate functions: sample, forward_backward, optim_step, save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
    """Start a learner and engines, and yield a policy to sample from and to train step by step.

    Entering the context blocks until all processes are ready; leaving the context ends them. `config` and `changes` are
    as in `rlora.train`, but only `model` is required: `Policy.sample` takes prompts as arguments, and without a reward
    function the sampled episodes have no reward. `resume` is a directory that `Policy.save` wrote, from whose state
    training continues. Raises RloraError for an invalid config, and if the adapter in `resume` does not fit the config.
    """
    with policies(config, {"policy": changes}, {"policy": resume} if resume else {}) as opened:
        yield opened["policy"]


@contextmanager
def policies(
    config: Source, members: Mapping[str, Mapping[str, Any]], resume: Mapping[str, str | PathLike[str]] | None = None
) -> Iterator[Mapping[str, Policy]]:
    """Start learners and engines, and yield several policies over one base, by name.

    `members` maps each policy's name to the fields that differ from `config`. `resume` maps names to directories that
    `Policy.save` wrote. Blocks as `policy` does. Raises RloraError as `policy` does, and for policies that can't share
    processes.
    """
    from rlora import cluster

    resume = resume or {}
    if unknown := resume.keys() - members.keys():
        raise RloraError(f"resume = {sorted(unknown)}: not in members; use names from members: {', '.join(members)}")
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
    """The frozen base with one adapter in training. `policy` and `policies` yield such objects. All methods block."""

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
        """The version with the current weights. The first access after `optim_step` makes a new version."""
        if self._stepped:
            self._adapter, self._stepped = self._learner.next_version(self.name), False
        return self._adapter

    def sample(
        self, prompts: Sequence[Prompt | str], group_size: int | None = None, temperature: float | None = None
    ) -> list[Group]:
        """Sample completions under the current version, and score them. Returns a group per prompt, in order.

        `group_size` is the number of completions per prompt, by default the config's, or 1 if `temperature` is 0
        (greedy). The learner's logprobs are at `sampling.temperature`. Another `temperature` is for evaluation and for
        losses without importance ratios, and `update` does not accept the groups. A new version is first delivered to
        every engine and verified. Raises RloraError for an invalid temperature, DeliveryError if an engine serves
        something other than the version, and RewardError if the reward functions fail.
        """
        from rlora.rollout.evaluate import answer
        from rlora.rollout.stream import sampling_of

        default = 1 if temperature == 0 else self.config.group_size
        sampling = sampling_of(self.config, group_size or default, temperature)
        adapter, tokenised = self.adapter, self._tokenise(prompts)
        if adapter is not self._delivered:
            self._fleet.swap(adapter, oldest=adapter.number)
            self._delivered = adapter
        groups = answer(self.config, tokenised, sampling, self._fleet, self._loop)
        return [replace(group, temperature=temperature) for group in groups]

    def samples(self, group: Group, advantages: Sequence[float]) -> list[Sample]:
        """Return the training samples of a group. `advantages` has one value per episode, for all its sampled tokens.

        Episodes without sampled tokens have no sample.
        """
        from rlora.core.batch import sample_of

        pairs = zip(group.episodes, advantages, strict=True)
        return [
            sample_of(group.prompt.token_ids, episode, advantage)
            for episode, advantage in pairs
            if episode.sampled_tokens
        ]

    def forward(self, groups: Groups, reference: bool = False) -> list[list[Tensor]]:
        """Return the logprobs of each sample's C targets, nested like `groups`: (C,) float32 on the CPU, in nats.

        They are computed under the policy, or with `reference` under the base without an adapter.
        """
        return self._learner.forward(self.name, groups, reference)

    def forward_backward(self, groups: Groups, loss: Loss) -> ForwardBackwardOutput:
        """Accumulate the gradient of `loss` over the samples, for the next `optim_step`.

        `loss(outputs, microbatch)` returns a sum over the microbatch's C targets, and a dict of metrics, (C,) each.
        The samples of a group share a prompt, which is computed once. Returns the sums of the metrics over all targets,
        and the logprobs of each sample's targets. An exception in `loss` discards the accumulated gradient.
        """
        return self._learner.forward_backward(self.name, groups, loss)

    def optim_step(self, adam: Adam) -> StepStats:
        """Take one step of Adam with these settings along the accumulated gradient, and clear the gradient.

        Without a finite gradient the weights do not change, and `StepStats.stepped` is False.
        """
        self._stepped = True
        return self._learner.optim_step(self.name, adam)

    def update(self, groups: Sequence[Group]) -> UpdateStats:
        """Update the policy with the config's algorithm on scored groups, like one step of `rlora.train`.

        Discards a gradient that `forward_backward` has accumulated. Raises RloraError if an episode has no reward, and
        for groups that were sampled at a temperature other than `sampling.temperature`.
        """
        trained_at = self.config.sampling.temperature
        for group in groups:
            if group.temperature not in (None, trained_at):
                raise RloraError(
                    f"update: a group was sampled at temperature {group.temperature}, and the learner's probabilities "
                    f"are at sampling.temperature = {trained_at}; sample without `temperature`, or change this field"
                )
        if any(episode.reward is None for group in groups for episode in group.episodes):
            raise RloraError("update: an episode has no reward; set `reward` in the config, or use Group.with_rewards")
        self._adapter, stats = self._learner.update(self.name, groups)
        self._stepped = False
        return stats

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the adapter in PEFT's format to `directory`, with the learner's state, from which `resume` continues.

        An earlier save is replaced. Raises RloraError if the directory contains any other file.
        """
        path = reachable(str(directory))
        files = self.adapter.files | {_STATE: self._learner.state(self.name)}
        if foreign := sorted(set(names(path)) - files.keys()):
            raise RloraError(
                f"{path}: saving replaces the directory, which contains {', '.join(foreign[:3])}; name a directory for "
                "the adapter alone"
            )
        write_directory(path, files)

    def _tokenise(self, prompts: Sequence[Prompt | str]) -> list[Prompt]:
        from rlora.rollout.task import tokenise

        if isinstance(prompts, str):
            raise RloraError(f"prompts = {prompts!r}: a single string; pass a list of prompts")
        limit = self.config.sampling.max_prompt_tokens
        records = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
        results = [tokenise([prompt], self.task.chat, limit, self.task.tools) for prompt in records]
        for prompt, tokenised in zip(records, results, strict=True):
            if not tokenised:
                raise RloraError(
                    f"prompt {prompt.text!r}: a prompt must have 1 to sampling.max_prompt_tokens = {limit} tokens; "
                    "change the prompt, or raise sampling.max_prompt_tokens"
                )
        return [prompt for (prompt,) in results]


def _read_state(directory: str | PathLike[str], setup: Setup) -> bytes:
    """Read the learner's state that `Policy.save` wrote. Raises RloraError if there is none, or if the rank or scale of
    the saved adapter differs from the config."""
    from rlora.core.peft_format import decode
    from rlora.run.start import check_same_adapter, read

    path = reachable(str(directory))
    state = read_file(path / _STATE)
    if state is None:
        raise RloraError(f"resume = {str(path)!r}: {_STATE} is missing; name a directory that Policy.save wrote")
    check_same_adapter(f"resume = {str(path)!r}", decode(*read(path))[0], setup.learner)
    return state
